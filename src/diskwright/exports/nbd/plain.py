"""Requests whose bytes lie plainly in a file: many at once, without a call of the node for each.

Reads are sent from the file's pages, writes go from the input buffer to the file. All of a batch
happens inside one request of the gate, and nothing in it waits for the client: see "Going around
the public operations" in docs/explanation/architecture.md. Whatever is not of this kind ends the
batch and is left to `requests.py`.
"""

from __future__ import annotations

import os
from _thread import get_ident
from time import perf_counter

from diskwright.block.pages import Way
from diskwright.exports.nbd.cold import MOST_WAITING, Cold
from diskwright.exports.nbd.output import MAX_BUFFERS, VanishedPagesError
from diskwright.wire.nbd.numbers import Command
from diskwright.wire.nbd.transmission import Replies, Requests

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.exports.nbd.export import NodeExport
    from diskwright.exports.nbd.output import Output
    from diskwright.wire.nbd.messages import Negotiated

    Buffer = bytes | bytearray | memoryview

#: A batch is sent when it has this many bytes; longer requests are cut into pieces elsewhere.
BATCH = 1 << 18
#: A send that took so many seconds may have waited for the disk.
_LONG = 60e-6
#: Smaller clusters are not gone through one by one.
_SMALLEST = 4096
#: After pages could not be read so many batches go the other way.
_MISTRUST = 100


class Plain:
    """The batches of one connection.

    Args:
        export: what is served.
        agreed: with the client.
        output: where replies go.
        reads: parts of a mapping may be sent.
    """

    def __init__(
        self, export: NodeExport, agreed: Negotiated, output: Output, *, reads: bool
    ) -> None:
        self._node = export.node
        self._way = Way(export.node)
        self._output = output
        self._replies = Replies(agreed)
        requests = Requests(agreed)
        self._unpack = requests.kind_form.unpack_from
        self._header = requests.form.size
        self._magic = requests.magic
        self._write_kinds = requests.write_kinds
        self._reads = reads
        self._writes = not export.read_only
        self._mistrust = 0
        self.cold = Cold(self._node, self._replies)
        self._faults = (0, 0)

    def batch(self, buffer: memoryview, at: int, stop: int) -> int:
        """Do requests from `at` on; where the first one lies that was not done.

        Args:
            buffer: the input.
            at: where a request begins in it.
            stop: the end of what was received.
        """
        if stop - at < self._header:
            return at
        if self._mistrust:
            self._mistrust -= 1
            return at
        node = self._node
        with node.graph.request():
            if not self._way.is_open:
                return at
            out: list[Buffer] = []
            hosts: list[int] = []
            try:
                end = self._gather(buffer, (at, stop), (out, hosts))
                if hosts:
                    self._send_pages(out, hosts)
                elif out:
                    self._output.send(out)
            except VanishedPagesError:
                self._mistrust = _MISTRUST
                return at  # what was written is written again
        return end

    def _send_pages(self, out: list[Buffer], hosts: list[int]) -> None:
        """Send, and see whether that had to wait for the disk."""
        begin = perf_counter()
        self._output.send_pages(out, hosts, self._way.descriptor)
        if perf_counter() - begin > _LONG:
            before, self._faults = self._faults, _major_faults()
            if before[0] == self._faults[0] and before[1] < self._faults[1]:
                self.cold.begin()

    def send_piece(self, head: bytes, offset: int, length: int) -> bool:
        """Send `head` and what lies at [offset, offset + length); whether that could be done.

        Raises:
            IOFailure: something was sent, and the rest cannot be.
        """
        node = self._node
        with node.graph.request():
            if not (self._reads and self._way.is_open and offset + length <= node.size):
                return False
            out: list[Buffer] = [head]
            hosts: list[int] = []
            if not self._scattered((offset, length), (out, hosts)):
                return False
            try:
                self._output.send_pages(out, hosts, self._way.descriptor)
            except VanishedPagesError:
                return False
        return True

    def write_piece(self, offset: int, payload: memoryview) -> bool:
        """Write what lies plainly; whether that could be done: if not, the node is asked to."""
        node = self._node
        with node.graph.request():
            is_inside = offset + len(payload) <= node.size
            return is_inside and self._way.is_open and self._write(offset, payload)

    def _gather(
        self,
        buffer: memoryview,
        span: tuple[int, int],
        into: tuple[list[Buffer], list[int]],
    ) -> int:
        """Write what is to be written, and collect replies with the pages that they send."""
        at, stop = span
        out, hosts = into
        unpack, header, magic = self._unpack, self._header, self._magic
        node, way = self._node, self._way
        base = way.base
        locate, size = node.locate, node.size
        data = self._replies.data
        pages = way.pages()
        view = pages.view
        reach = len(view)
        cold = self.cold
        held = 0
        while at + header <= stop and held < BATCH and len(out) < MAX_BUFFERS:
            begin, kind, cookie, offset, length = unpack(buffer, at)
            if begin != magic or not 0 < length <= BATCH or offset + length > size:
                break
            if kind != Command.READ:
                end = at + header + length
                if kind not in self._write_kinds or end > stop:
                    break
                if not self._write(offset, buffer[at + header : end]):
                    break
                out.append(self._replies.done(cookie, offset))
                at = end
                continue
            host = locate(offset, length) if self._reads else -1
            if host < 0 or len(cold.waiting) >= MOST_WAITING:
                if (
                    self._reads
                    and not cold.is_on
                    and self._is_divided(offset, length)
                    and self._scattered((offset, length), into, data(cookie, offset, length))
                ):
                    held += length
                    at += header
                    continue
                break
            host += base
            if cold.is_on and not hosts:
                cold.take((cookie, offset, length), host, out)
                held += length
                at += header
                continue
            if host + length > reach:
                if not pages.cover(way.descriptor, host + length):
                    break
                view = pages.view
                reach = len(view)
            out.append(data(cookie, offset, length))
            out.append(view[host : host + length])
            hosts.append(host)
            held += length
            at += header
        return at

    def _scattered(
        self,
        span: tuple[int, int],
        into: tuple[list[Buffer], list[int]],
        head: bytes = b"",
    ) -> bool:
        """Collect a read that lies plainly, cluster by cluster; whether that could be done."""
        offset, length = span
        way = self._way
        places = self._places(offset, length, write=False)
        out, hosts = into
        if not places or len(out) + len(places) > MAX_BUFFERS:
            return False
        pages = way.pages()
        if not pages.cover(way.descriptor, max(host + count for host, count in places)):
            return False
        if head:
            out.append(head)
        for host, count in places:
            out.append(pages.view[host : host + count])
            hosts.append(host)
        return True

    def _cluster(self, length: int) -> int:
        """What lies together of a request of `length` bytes."""
        return max(self._node.limits.cluster_size or length, _SMALLEST)

    def _is_divided(self, offset: int, length: int) -> bool:
        """Whether a range may lie in several places: else there is one answer for all of it."""
        cluster = self._cluster(length)
        return offset // cluster != (offset + length - 1) // cluster

    def _places(self, offset: int, length: int, *, write: bool) -> list[tuple[int, int]]:
        """(place in the file, length) of what lies at [offset, offset + length), if all does."""
        node, base, stop = self._node, self._way.base, offset + length
        cluster = self._cluster(length)
        found: list[tuple[int, int]] = []
        while offset < stop:
            end = min((offset // cluster + 1) * cluster, stop)
            host = node.locate(offset, end - offset, write=write)
            if host < 0:
                return []
            host += base
            if found and sum(found[-1]) == host:
                found[-1] = (found[-1][0], found[-1][1] + end - offset)
            else:
                found.append((host, end - offset))
            offset = end
        return found

    def _write(self, offset: int, payload: memoryview) -> bool:
        """Whether the payload could be written in place; if not, the node is asked to."""
        way = self._way
        if not self._writes or way.write_descriptor < 0:
            return False
        host = self._node.locate(offset, len(payload), write=True)
        try:
            if host >= 0:
                return os.pwrite(way.write_descriptor, payload, host + way.base) == len(payload)
            return self._is_divided(offset, len(payload)) and self._write_scattered(offset, payload)
        except OSError:
            return False  # the node says what is wrong
        finally:
            way.lender.unflushed = True

    def _write_scattered(self, offset: int, payload: memoryview) -> bool:
        """As `_write`, cluster by cluster, where all of them can be overwritten."""
        places = self._places(offset, len(payload), write=True)
        done = 0
        for host, count in places:
            piece = payload[done : done + count]
            if os.pwrite(self._way.write_descriptor, piece, host) != count:
                return False
            done += count
        return bool(places)


def _major_faults() -> tuple[int, int]:
    """This thread, and the pages that it had to wait for so far."""
    try:
        import resource
    except ImportError:  # Windows
        return 0, 0
    return get_ident(), resource.getrusage(resource.RUSAGE_THREAD).ru_majflt
