"""Writing compressed units where nothing is yet, one after the other."""

from __future__ import annotations

import errno

from diskwright.block import requests
from diskwright.block.extent import DATA
from diskwright.errors import DiskwrightError, IOFailure, OptionError, UnsupportedError

#: So many units QEMU begins before it looks whether one has failed.
AT_ONCE = 8

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
    _write_units(node, encoder, offset, view)


def _write_units(node: Node, encoder: Encoder, offset: int, view: memoryview) -> None:
    """Write unit for unit; beside one that fails, those are written that QEMU has begun."""
    failure: DiskwrightError | None = None
    length, unit = len(view), encoder.unit
    start = 0
    while start < length:
        try:
            _write_unit(node, encoder, offset + start, view[start : start + unit])
        except DiskwrightError as error:
            if failure is None:
                failure = error
                length = min(length, max(start // unit, AT_ONCE - 1) * unit + unit)
        start += unit
    if failure is not None:
        raise failure


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
