"""The encoder of qcow2's compressed clusters."""

from __future__ import annotations

from diskwright.block.mapped import Encoder


class ClusterEncoder(Encoder):
    """One cluster to a payload shorter than it; pure, so many may run at once."""

    def __init__(self, cluster_size: int, compression_type: int) -> None:
        self.unit = cluster_size
        if compression_type:
            from diskwright.codecs import zstd as codec
        else:
            from diskwright.codecs import deflate as codec  # type: ignore[no-redef]
        self._encode = codec.encode

    def encode(self, view: memoryview) -> bytes | None:
        """The payload, or None where the cluster does not become shorter."""
        payload = self._encode(view)
        return payload if len(payload) < self.unit else None
