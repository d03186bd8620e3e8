"""Writing compressed units where nothing is yet, one after the other."""

from __future__ import annotations

import errno

from diskwright.block import requests
from diskwright.block.extent import DATA
from diskwright.errors import IOFailure, OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.mapping import Encoder
    from diskwright.block.node import Node


def write_compressed(node: Node, offset: int, view: memoryview) -> None:
    """See `Node.write_compressed`; inside the gate."""
    encoder = node.encoder()
    if encoder is None:
        raise UnsupportedError(f"{node.describe()} stores nothing compressed", node=node.node_name)
    requests.check_writable(node)
    requests.check_range(node, offset, len(view))
    unit = encoder.unit
    stop = offset + len(view)
    if offset % unit or (stop % unit and stop != node.size):
        raise OptionError(
            f"{len(view)} bytes at {offset} are no whole units of {unit} bytes", field="length"
        )
    for start in range(0, len(view), unit):
        _write_unit(node, encoder, offset + start, view[start : start + unit])


def _write_unit(node: Node, encoder: Encoder, offset: int, part: memoryview) -> None:
    for run in requests.walk_extents(node, offset, len(part), 0):
        if run.host_offset is not None or (run.kind == DATA and run.allocated):
            raise IOFailure(
                f"{node.describe()} has data at {run.offset} already",
                errno=errno.EIO,
                offset=offset,
            )
    whole = part
    if len(part) < encoder.unit:
        whole = memoryview(bytes(part).ljust(encoder.unit, b"\0"))
    payload = encoder.encode(whole)
    if payload is None:
        requests.write_checked(node, offset, part, False)
    else:
        node.write_encoded(offset, payload, encoder.unit)
