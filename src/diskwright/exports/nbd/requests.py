"""One request, done by the node: whatever is not plain enough for `plain.py`.

Nothing here waits for the client: a request that is longer than `PIECE` is cut by the session.
"""

from __future__ import annotations

from diskwright.block.extent import DATA
from diskwright.errors import DiskwrightError, RangeError, UnsupportedError, errno_of
from diskwright.wire.nbd.messages import ProtocolError
from diskwright.wire.nbd.numbers import Command, Error, Flag
from diskwright.wire.nbd.transmission import MAX_NARROW, Replies, Requests, to_wire

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.exports.nbd.export import NodeExport
    from diskwright.wire.nbd.messages import Negotiated

    Buffer = bytes | bytearray | memoryview
    #: flags, cookie, offset, length
    Asked = tuple[int, int, int, int]

#: Longer requests are read and written in pieces of this length.
PIECE = 1 << 18
#: Runs that a reply about block status has at most, in all contexts together and in one.
_MOST_RUNS = 1 << 17
#: Shorter reads are not worth a look for holes.
_SPARSE = 1 << 16


class Executor:
    """Does requests of one client on a node.

    Args:
        export: what is served.
        agreed: with the client.
    """

    def __init__(self, export: NodeExport, agreed: Negotiated) -> None:
        self.export = export
        self._node = export.node
        self._agreed = agreed
        self.replies = Replies(agreed)
        self.requests = Requests(agreed)

    def execute(
        self, command: int, asked: Asked, payload: Buffer, scratch: memoryview
    ) -> list[Buffer]:
        """Do a request; returns the reply, an error if it failed.

        Args:
            command: of `numbers.Command`.
            asked: (flags, cookie, offset, length), which `requests.refusal` had nothing against.
            payload: what came with it.
            scratch: room for what is read, at least as long as the request, where it is a read;
                the reply may be a part of it.
        """
        _, cookie, offset, _ = asked
        try:
            return self._ACTS[command](self, asked, payload, scratch)
        except (DiskwrightError, OSError) as error:
            return [self.failure(error, cookie, offset)]

    def failure(self, error: Exception, cookie: int, offset: int) -> bytes:
        """The reply that says what went wrong."""
        number = to_wire(errno_of(error))
        if isinstance(error, UnsupportedError):
            number = Error.ENOTSUP
        return self.replies.error(cookie, number, str(error), offset)

    # ------------------------------------------------------------------------------ acts

    def _read(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        flags, cookie, offset, length = asked
        if not length:
            if self.replies.structured:
                return [self.replies.done(cookie, offset)]
            return [self.replies.data(cookie, offset, 0)]
        if self.replies.structured and not flags & Flag.DF and length >= _SPARSE:
            return self._read_sparse(cookie, offset, length, scratch)
        view = scratch[:length]
        self.read_into(offset, view)
        return [self.replies.data(cookie, offset, length), view]

    def _read_sparse(
        self, cookie: int, offset: int, length: int, scratch: memoryview
    ) -> list[Buffer]:
        """Data as they are, and holes told of."""
        out: list[Buffer] = []
        stop = offset + length
        for start, count, is_data in self.runs(offset, length):
            done = start + count == stop
            if not is_data:
                out.append(self.replies.hole(cookie, start, count, of=offset, done=done))
                continue
            view = scratch[start - offset :][:count]
            try:
                self.read_into(start, view)
            except (DiskwrightError, OSError) as error:
                out.append(self.failure(error, cookie, offset))
                break
            out += [self.replies.data(cookie, start, count, of=offset, done=done), view]
        return out

    def runs(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(offset, length, whether there are data) of what is to be read."""
        found: list[tuple[int, int, bool]] = []
        node = self._node
        inside = max(min(length, node.size - offset), 0)
        for extent in node.extents(offset, inside) if inside else ():
            is_data = extent.kind == DATA
            if found and found[-1][2] == is_data:
                found[-1] = (found[-1][0], found[-1][1] + extent.length, is_data)
            else:
                found.append((extent.offset, extent.length, is_data))
        if inside < length:
            found.append((offset + inside, length - inside, False))
        return found

    def read_into(self, offset: int, view: memoryview) -> None:
        """Read; behind the node's end, in its last sector, is zero."""
        node = self._node
        inside = max(min(len(view), node.size - offset), 0)
        if inside:
            node.read_into(offset, view[:inside])
        if inside < len(view):
            view[inside:] = bytes(len(view) - inside)

    def write(self, offset: int, payload: Buffer, *, fua: bool) -> None:
        """Write a piece; a node that ends inside of its last sector grows where that is written."""
        self._reach(offset + len(payload))
        self._node.write(offset, payload, fua=fua)

    def _reach(self, stop: int) -> None:
        node = self._node
        if stop > node.size:
            if stop > self.export.told.size:
                raise RangeError(f"{node.describe()} has become shorter")
            node.truncate(stop, exact=False)

    def _write(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        flags, cookie, offset, _ = asked
        self.write(offset, payload, fua=bool(flags & Flag.FUA))
        return [self.replies.done(cookie, offset)]

    def _flush(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        if not self._node.read_only:
            self._node.flush()
        return [self.replies.done(asked[1], asked[2])]

    def _trim(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        flags, cookie, offset, length = asked
        inside = min(length, self._node.size - offset)
        if inside > 0:
            self._node.discard(offset, inside)
        if flags & Flag.FUA:
            self._node.flush()
        return [self.replies.done(cookie, offset)]

    def _zero(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        flags, cookie, offset, length = asked
        self._reach(offset + length)
        if length:
            self._node.write_zeroes(
                offset,
                length,
                unmap=not flags & Flag.NO_HOLE,
                fast=bool(flags & Flag.FAST_ZERO),
                fua=bool(flags & Flag.FUA),
            )
        return [self.replies.done(cookie, offset)]

    def _cache(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        """Have bytes brought near: up from a backing file, to memory, to that of a server behind.

        Zeroes stay where they are: QEMU notes them in the image.
        """
        from diskwright.block.pages import read_ahead

        _, cookie, offset, length = asked
        node = self._node
        length = min(length, node.size - offset)
        if node.backing is not None and not self.export.read_only:
            node.populate(offset, length)
        else:
            read_ahead(node, offset, length)
        return [self.replies.done(cookie, offset)]

    def _status(self, asked: Asked, payload: Buffer, scratch: memoryview) -> list[Buffer]:
        flags, cookie, offset, length = asked
        contexts = self._agreed.contexts
        if flags & Flag.PAYLOAD_LEN:
            try:
                length, wanted = self.requests.status_range(offset, bytes(payload))
            except ProtocolError as error:
                return [self.replies.error(cookie, Error.EINVAL, str(error), offset)]
            contexts = {number: contexts[number] for number in wanted}
        if not self._agreed.extended:
            length = min(length, MAX_NARROW)
        limit = 1 if flags & Flag.REQ_ONE else _MOST_RUNS
        out: list[Buffer] = []
        for left, (number, name) in zip(
            range(len(contexts) - 1, -1, -1), contexts.items(), strict=True
        ):
            runs = self.export.status(name, offset, length, limit)
            out.append(self.replies.status(cookie, (offset, number), runs, done=not left))
        return out or [self.replies.done(cookie, offset)]

    _ACTS: dict[int, Callable[[Executor, Asked, Buffer, memoryview], list[Buffer]]] = {
        Command.READ: _read,
        Command.WRITE: _write,
        Command.FLUSH: _flush,
        Command.TRIM: _trim,
        Command.CACHE: _cache,
        Command.WRITE_ZEROES: _zero,
        Command.BLOCK_STATUS: _status,
    }
