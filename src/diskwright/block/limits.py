"""What requests a node accepts without padding or splitting."""

from __future__ import annotations

from diskwright.block.record import Record

#: The length of the longest disk, as QEMU has it.
MAX_LENGTH = (1 << 63) - (1 << 30)


class Limits(Record):
    """Sizes in bytes, powers of two; 0 means that there is no such limit.

    Attributes:
        request_alignment: offsets and lengths of reads and writes; the public operation pads.
        memory_alignment: addresses of buffers (direct I/O); the node bounces what is not.
        zero_alignment, discard_alignment: below these, zeroing or discarding gains nothing.
        max_transfer: the longest request; longer ones are cut.
        cluster_size: the allocation unit, for callers that want whole ones.
    """

    __slots__ = (
        "request_alignment",
        "memory_alignment",
        "zero_alignment",
        "discard_alignment",
        "max_transfer",
        "cluster_size",
    )

    def __init__(
        self,
        *,
        request_alignment: int = 1,
        memory_alignment: int = 1,
        zero_alignment: int = 1,
        discard_alignment: int = 1,
        max_transfer: int = 0,
        cluster_size: int = 0,
    ) -> None:
        self.request_alignment = request_alignment
        self.memory_alignment = memory_alignment
        self.zero_alignment = zero_alignment
        self.discard_alignment = discard_alignment
        self.max_transfer = max_transfer
        self.cluster_size = cluster_size
