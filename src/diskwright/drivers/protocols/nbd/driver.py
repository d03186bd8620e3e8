"""An export of an NBD server as a node."""

from __future__ import annotations

import errno

from diskwright.block.extent import DATA, ZERO, Extent
from diskwright.block.info import NodeInfo
from diskwright.block.limits import Limits
from diskwright.block.node import Node
from diskwright.block.options import Option, Options, whole
from diskwright.block.requests import FAST, UNMAP
from diskwright.drivers.protocols.nbd import address, security
from diskwright.drivers.protocols.nbd.connection import Request
from diskwright.drivers.protocols.nbd.link import CONNECTIONS, LONGEST, Link, refuse_writing
from diskwright.errors import AccessError, OptionError, UnsupportedError
from diskwright.wire.nbd.numbers import (
    ALLOCATION_DEPTH,
    BASE_ALLOCATION,
    MAX_PAYLOAD,
    Allocation,
    Command,
    Flag,
    Transmission,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener
    from diskwright.block.reopen import Finish, Reopening

_MOST_CONNECTIONS = 16
#: What stands for every depth from here on where depths are shown as block status is.
_DEEPEST = 2


class Nbd(Node):
    """`nbd://host:port/export`, `nbd+unix:///export?socket=path`, or `nbd:` and the rest.

    `nbds` in the place of `nbd` encrypts the connection.
    """

    driver = "nbd"
    is_protocol = True
    is_remote = True
    no_folder = "Cannot generate a base directory for NBD nodes"
    options = Options(
        Option("server", "any", None, "where the server is: type, then host and port, or path"),
        Option("host", help="host to connect to", loose=True),
        Option("port", help="port to connect to, 10809 unless given", loose=True),
        Option("path", help="path of the unix socket to connect to", loose=True),
        Option("export", help="name of the export to open", loose=True),
        Option("tls", "bool", None, "encrypt; without more words as the system trusts"),
        Option("tls-creds", "any", None, "id of the TLS credentials, or (in Python) those"),
        Option("tls-hostname", help="name of the server in its certificate, where it is another"),
        Option("tls-certificates", help="folder of certificates, in the place of tls-creds"),
        Option("tls-verify-peer", "bool", None, "whether the server's certificate is looked at"),
        Option(
            "x-dirty-bitmap",
            "str",
            None,
            "context that takes the place of block status: `map` shows it",
        ),
        Option(
            "reconnect-delay",
            "int",
            0,
            "for how long requests wait for a new connection after one was lost; 0: they fail",
            unit="seconds",
        ),
        Option(
            "open-timeout",
            "int",
            0,
            "for how long to go on trying to connect at first; 0: once",
            unit="seconds",
        ),
        Option(
            "multi-conn",
            "int",
            CONNECTIONS,
            "how many connections to make at most, where the server offers several",
        ),
    )

    create_options = Options(Option("size", "size", None, "Virtual disk size"))

    _link: Link
    _is_connected = False

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        where = address.from_options(options)
        connections = whole(options["multi-conn"])
        if not 0 < connections <= _MOST_CONNECTIONS:
            raise OptionError(
                f"multi-conn is a number from 1 to {_MOST_CONNECTIONS}", field="multi-conn"
            )
        context = options["x-dirty-bitmap"]
        self._link = Link(
            where,
            context=BASE_ALLOCATION if context is None else str(context),
            security=security.from_options(options, where),
            open_seconds=whole(options["open-timeout"]),
            reconnect_seconds=whole(options["reconnect-delay"]),
            connections=connections,
        )
        self._is_connected = True
        self._take_export(where, context)

    def _take_export(self, where: address.Address, context: object) -> None:
        export = self._link.export
        if not self.read_only:
            refuse_writing(export, where)
        if context is not None and self._link.context_id is None:
            raise OptionError(
                f"requested x-dirty-bitmap {context} not found",
                qemu="Could not open image: Invalid argument",
                field="x-dirty-bitmap",
            )
        if not where.switches.keys() & {"ipv4", "ipv6"}:  # a URI cannot say those
            self.filename = str(where)
        self.size = export.size
        minimum, _, maximum = export.blocks
        self.limits = Limits(
            request_alignment=minimum,
            zero_alignment=minimum,
            discard_alignment=minimum,
            max_transfer=min(maximum, MAX_PAYLOAD),
        )
        self.supports_fua = bool(export.flags & Transmission.SEND_FUA)

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, object]:
        """A URI, or `nbd:` and host and port, or the path of a socket."""
        return address.parse(name)

    # ------------------------------------------------------------------ reading and writing

    def _read_into(self, offset: int, view: memoryview) -> None:
        if view.readonly:  # before the reply is on its way, which has to go somewhere
            raise TypeError("a buffer to read into must be writable")
        self._link.call(Request(Command.READ, (offset, len(view)), into=view))

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        flags = Flag.FUA if fua else 0
        self._link.call(Request(Command.WRITE, (offset, len(view)), flags=flags, payload=view))

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        offered = self._link.export.flags
        if not offered & Transmission.SEND_WRITE_ZEROES:
            raise UnsupportedError(f"The server of {self.describe()} cannot zero a range")
        wanted = 0 if flags & UNMAP else Flag.NO_HOLE
        if flags & FAST:
            if not offered & Transmission.SEND_FAST_ZERO:
                raise UnsupportedError(f"The server of {self.describe()} does not zero fast")
            wanted |= Flag.FAST_ZERO
        self._each(Command.WRITE_ZEROES, wanted, offset, length)

    def _discard(self, offset: int, length: int) -> None:
        if self._link.export.flags & Transmission.SEND_TRIM:
            self._each(Command.TRIM, 0, offset, length)

    def _read_ahead(self, offset: int, length: int) -> None:
        if self._link.export.flags & Transmission.SEND_CACHE:
            self._each(Command.CACHE, 0, offset, length)

    def _each(self, command: int, flags: int, offset: int, length: int) -> None:
        stop = offset + length
        longest = self._link.longest
        for start in range(offset, stop, longest):
            count = min(longest, stop - start)
            self._link.call(Request(command, (start, count), flags=flags))

    def _flush(self) -> None:
        if self._link.export.flags & Transmission.SEND_FLUSH:
            self._link.call(Request(Command.FLUSH, (0, 0)))

    # -------------------------------------------------------------------------------- extents

    def _extents(self, offset: int, length: int) -> list[Extent]:
        context = self._link.context_id
        if context is None:
            return [Extent(offset, length, DATA, host_offset=offset)]
        is_depth = self._link.agreed.contexts[context] == ALLOCATION_DEPTH
        deepest = _DEEPEST if is_depth else 1 << 64

        return [
            _extent(start, count, min(bits, deepest))
            for start, count, bits in self._link.runs(offset, min(length, LONGEST))
        ]

    # ------------------------------------------------------------------------------ management

    def _truncate(self, size: int, exact: bool, preallocation: str) -> None:
        if exact and size != self.size:
            raise UnsupportedError(
                f"{self.describe()} keeps its size",
                qemu="Cannot resize NBD nodes",
                kind="fixed-size",
            )
        if size > self.size:
            raise UnsupportedError(f"{self.describe()} cannot grow", qemu="Cannot grow NBD nodes")

    def refresh_size(self) -> None:
        """The server may have told of another one as it was reached again."""
        self.size = self._link.export.size

    @property
    def can_grow(self) -> bool:
        """The server decides how long its export is."""
        return False

    def _prepare_reopen(self, wanted: Reopening) -> Finish:
        if wanted.read_only is False and self._link.export.flags & Transmission.READ_ONLY:
            raise AccessError(
                f"The server of {self.describe()} serves it for reading only",
                qemu="Can't reopen read-only NBD mount as read/write",
                errno=errno.EACCES,
            )
        return super()._prepare_reopen(wanted)

    def _info(self) -> NodeInfo:
        return NodeInfo(self.driver, self.size, dirty=None)

    def _close(self) -> None:
        if self._is_connected:
            self._link.close()

    @property
    def allocated_size(self) -> None:
        """The server does not say."""
        return

    @classmethod
    def create(cls, opener: Opener, size: int, options: dict[str, object]) -> None:
        """Clear the beginning of the export: nothing is made.

        Raises:
            UnsupportedError: it is shorter than `size`.
        """
        from diskwright.block.existing import take_existing

        spec: dict[str, object] = {"driver": cls.driver}
        for name in ("server", "host", "port", "path", "export"):
            if options.get(name) is not None:
                spec[name] = options[name]
        take_existing(opener, spec, size, str(options.get("preallocation") or "off"))


def _extent(offset: int, length: int, bits: int) -> Extent:
    """A run, by the bits of its block status."""
    bits &= Allocation.HOLE | Allocation.ZERO
    return Extent(
        offset,
        length,
        ZERO if bits & Allocation.ZERO else DATA,
        allocated=bits != Allocation.HOLE,
        host_offset=offset,
        stored=bits == Allocation.ZERO,
    )
