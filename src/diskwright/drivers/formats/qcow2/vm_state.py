"""A machine's state: guest clusters behind the disk's end, where the L1 table goes on.

Source: qcow2 specification, "VM state": it begins at the first L1 entry that the
disk does not need.
"""

from __future__ import annotations

from diskwright.block import requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.drivers.formats.qcow2.driver import Qcow2


def start_of(node: Qcow2) -> int:
    """The guest offset at which the state begins."""
    return -(-node.size >> node.l1_shift) << node.l1_shift


def read(node: Qcow2, offset: int, view: memoryview) -> None:
    """Fill `view` from the state; what was never written reads as zero."""
    node.file.event("vmstate_load")
    start = start_of(node) + offset
    inside = max(min(len(view), (len(node.l1) << node.l1_shift) - start), 0)
    if inside:
        _map_read(node, start, view[:inside])
    requests.fill_zero(view[inside:])


def _map_read(node: Qcow2, start: int, view: memoryview) -> None:
    from diskwright.block.extent import DATA

    done = 0
    while done < len(view):
        run = node.map(start + done, len(view) - done)
        part = view[done : done + min(run.length, len(view) - done)]
        if run.kind == DATA:
            node._read_into(start + done, part)
        else:
            requests.fill_zero(part)  # no backing file shows through here
        done += len(part)


def write(node: Qcow2, offset: int, view: memoryview) -> None:
    """Write to the state; the caller has the graph to itself."""
    from diskwright.drivers.formats.qcow2.resize import lengthen_l1

    node.file.event("vmstate_save")
    start = start_of(node) + offset
    lengthen_l1(node, start + len(view))
    node._write(start, view, False)
