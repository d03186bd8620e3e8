"""`diskwright-nbd`: serves an image to NBD clients, with the words of qemu-nbd."""

from __future__ import annotations

import os
import sys

from diskwright.cli import output
from diskwright.cli.flags import OBJECT, snapshot_words
from diskwright.cli.grammar import (
    AllSaid,
    Arguments,
    Flag,
    HelpWanted,
    Misused,
    Parser,
    VersionWanted,
)
from diskwright.errors import DiskwrightError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.block.node import Node
    from diskwright.operations.opening import Image

PROGRAM = "diskwright-nbd"
_TRY = f"Try `{PROGRAM} --help' for more information."
#: The format of the overlay that takes what is written under -s.
_OVERLAY_FORMAT = "qcow2"
#: No number that qemu-nbd takes is higher.
_HIGHEST = (1 << 31) - 1


def _number(what: str) -> Callable[[str], object]:
    def parse(word: str) -> int:
        from diskwright.block.options import parse_int

        found = parse_int(word)
        if found is None or not 0 <= found <= _HIGHEST:
            raise OptionError(f"Invalid {what} '{word}'")
        return found

    return parse


def _offset(word: str) -> int:
    from diskwright.block.options import parse_int

    found = parse_int(word)
    if found is None:
        raise OptionError(f"Invalid offset '{word}'", field="offset")
    return found


def _mode(what: str, kind: str, quotes: str = "`'") -> Callable[[str], object]:
    """Parses one of the modes that `block/common_options.py` has under this name."""

    def parse(word: str) -> str:
        from diskwright.block import common_options

        known = getattr(common_options, kind)
        if word not in known:
            hint = f"one of {', '.join(known)}"
            raise OptionError(f"Invalid {what} mode {quotes[0]}{word}{quotes[1]}", hint=hint)
        return word

    return parse


def _detect_zeroes(word: str) -> str:
    from diskwright.block.common_options import DETECT_ZEROES_MODES

    if word not in DETECT_ZEROES_MODES:
        raise OptionError(
            f"Failed to parse detect_zeroes mode: invalid parameter value: {word}",
            hint=f"one of {', '.join(DETECT_ZEROES_MODES)}",
        )
    return word


def _told(what: str) -> Callable[[str], object]:
    """Parses what clients are told of an export."""

    def parse(word: str) -> str:
        from diskwright.exports.nbd.export import check_told

        check_told(what, word)
        return word

    return parse


def _snapshot(word: str) -> str:
    try:
        return snapshot_words(word)
    except OptionError as error:
        error.then = f"Failed in parsing snapshot param `{word}'"
        raise


def _socket(word: str) -> str:
    if not word.startswith("/"):
        raise OptionError("socket path must be absolute", field="socket")
    return word


_CACHE = _mode("cache", "CACHE_MODES")

#: How connections are encrypted.
TLS_FLAGS = (
    Flag("", "tls-creds", "ID", "encrypt, with the credentials that --object defines"),
    Flag("", "tls-authz", "ID", "let only the clients in that --object authorizes"),
)

#: Where the server is, and for how many.
SERVER_FLAGS = (
    Flag("p", "port", "PORT", "port to listen on (10809)"),
    Flag("b", "bind", "ADDRESS", "address to listen at (0.0.0.0)"),
    Flag("k", "socket", "PATH", "listen on a unix socket instead", parse=_socket),
    Flag(
        "e",
        "shared",
        "N",
        "how many clients there may be at once; 0: any number",
        parse=_number("shared device number"),
    ),
    Flag("v", "verbose", help="say why clients were left, not only in their handshakes"),
    Flag(
        "",
        "handshake-limit",
        "SECONDS",
        "how long a client's handshake may take (10); 0: as long as it likes",
        parse=_number("handshake limit"),
    ),
    Flag("", "pid-file", "PATH", "write the server's process number there"),
    Flag("A", "allocation-depth", help="offer how deep in the backing chain each run lies"),
    Flag("B", "bitmap", "NAME", "offer a dirty bitmap; may be said several times", repeats=True),
    Flag("r", "read-only", help="let clients read only"),
)

FLAGS = (
    *SERVER_FLAGS,
    Flag("t", "persistent", help="go on when the last client has left"),
    Flag(
        "x",
        "export-name",
        "NAME",
        "the name that clients ask for (an empty one)",
        parse=_told("name"),
    ),
    Flag(
        "D",
        "description",
        "TEXT",
        "what clients are told of the export",
        parse=_told("description"),
    ),
    Flag("o", "offset", "OFFSET", "where in the image the export begins", parse=_offset),
    Flag("L", "list", help="list what another server offers"),
    OBJECT,
    *TLS_FLAGS,
    Flag("", "tls-hostname", "NAME", "the name that the other server's certificate must have"),
    Flag("T", "trace", "PATTERN", "accepted; there are no trace events here", repeats=True),
    Flag("", "fork", help="go on in the background once the server is ready"),
    Flag("", "selinux-label", "LABEL", "label of the socket, where the system has SELinux"),
    Flag("c", "connect", "DEVICE", "give the image to the kernel, as this NBD device"),
    Flag("d", "disconnect", help="take an NBD device from the kernel"),
    Flag("f", "format", "FMT", "the image's format; it is probed by default"),
    Flag("s", "snapshot", help="write to an overlay that is thrown away at the end"),
    Flag(
        "l",
        "load-snapshot",
        "SNAPSHOT",
        "serve an internal snapshot, read-only: an id or else a name",
        parse=_snapshot,
    ),
    Flag("n", "nocache", help="go past the host's cache: --cache=none"),
    Flag("", "cache", "MODE", "how writes are cached (writeback)", parse=_CACHE, repeats=True),
    Flag("", "aio", "MODE", "threads, native or io_uring", parse=_mode("aio", "AIO_MODES", "''")),
    Flag("", "discard", "MODE", "ignore, or unmap", parse=_mode("discard", "DISCARD_MODES")),
    Flag(
        "",
        "detect-zeroes",
        "MODE",
        "off, on or unmap: store zeroes that are written as such",
        parse=_detect_zeroes,
    ),
    Flag("", "image-opts", help="FILE is a list of options (driver=qcow2,file.filename=...)"),
    Flag("h", "help", help="show this help and exit"),
    Flag("V", "version", help="show the version and exit"),
)


def help_text() -> str:
    """What `--help` prints."""
    from diskwright.cli.help import flag_lines

    lines = [
        f"Usage: {PROGRAM} [OPTIONS] FILE",
        f"  or:  {PROGRAM} -L [OPTIONS]",
        "Serves a disk image to NBD clients",
        "",
        *flag_lines(FLAGS),
    ]
    return "\n".join(lines) + "\n"


# --------------------------------------------------------------------------------- what is asked


def _run(arguments: Arguments, words: Sequence[str]) -> int:
    Parser(FLAGS, PROGRAM).parse(words, arguments)
    _check(arguments)
    if arguments.flag("disconnect"):
        from diskwright.cli.nbd_device import disconnect

        return disconnect(_operand(arguments))
    if arguments.flag("list"):
        return _list(arguments)
    return _serve(arguments, _operand(arguments))


def _operand(arguments: Arguments) -> str:
    if len(arguments.operands) != 1:
        raise Misused("Invalid number of arguments")
    return arguments.operands[0]


#: Options about what is served, or how; qemu-nbd passes over the others.
_OF_A_DEVICE = (
    "export-name", "description", "connect", "disconnect", "format", "load-snapshot", "bitmap",
    "allocation-depth", "nocache", "cache", "aio", "discard",
)  # fmt: skip


#: What a service manager that gives the socket has decided already: key, what it is.
_OF_A_SOCKET = (
    ("connect", "NBD device"),
    ("socket", "Unix socket"),
    ("bind", "The interface"),
    ("port", "TCP port number"),
    ("selinux-label", "SELinux label"),
)


def check_activation(arguments: Arguments) -> None:
    """Refuse words about the socket where a service manager has given one.

    Raises:
        OptionError: there are such.
    """
    from diskwright.exports.nbd.listening import is_given

    if not is_given():
        return
    for key, what in _OF_A_SOCKET:
        if arguments.flag(key):
            raise OptionError(f"{what} can't be set when using socket activation", field=key)
    if arguments.flag("list"):
        raise OptionError("List mode is incompatible with socket activation")


def check_tls(arguments: Arguments) -> None:
    """Refuse words about encryption where there is none.

    Raises:
        OptionError: there are such.
    """
    for key in ("tls-authz", "tls-hostname"):
        if arguments.flag(key) and not arguments.flag("tls-creds"):
            raise OptionError(f"--{key} is not permitted without --tls-creds")


def _check(arguments: Arguments) -> None:
    """Refuse options that contradict each other."""
    if arguments.flag("list"):
        if arguments.operands:
            raise OptionError("List mode is incompatible with a file name")
        if any(map(arguments.flag, _OF_A_DEVICE)) or arguments.number("offset"):
            raise OptionError("List mode is incompatible with per-device settings")
        if arguments.flag("fork"):
            raise OptionError("List mode is incompatible with forking")
    if not arguments.flag("disconnect"):
        check_activation(arguments)
    check_tls(arguments)
    for key in ("discard", "aio"):
        if arguments.count(key) > 1:
            raise OptionError(f"--{key} can only be specified once")
    if arguments.count("cache") + arguments.flag("nocache") > 1:
        raise OptionError("-n and --cache can only be specified once")
    if arguments.text("detect-zeroes") == "unmap" and arguments.text("discard") != "unmap":
        raise OptionError(
            "setting detect-zeroes to unmap is not allowed without setting discard "
            "operation to unmap"
        )
    if arguments.flag("selinux-label"):
        if not arguments.flag("socket"):
            raise OptionError("--selinux-label is not permitted without --socket")
        raise OptionError(
            f"Cannot set SELinux socket create context to {arguments.text('selinux-label')}: "
            "this program sets none",
            hint="run it in the context that the socket shall have",
        )
    if arguments.flag("image-opts") and arguments.flag("format"):
        raise OptionError("--image-opts and -f are mutually exclusive")


# ------------------------------------------------------------------------------------ the server


def _serve(arguments: Arguments, name: str) -> int:
    from diskwright.cli import daemon
    from diskwright.cli.serving import Serving

    connects = arguments.flag("connect")
    forks = arguments.flag("fork") or (connects and not arguments.flag("verbose"))
    background = daemon.fork() if forks else None
    if isinstance(background, int):
        return background
    with Serving(PROGRAM, arguments) as serving:
        if not connects:
            serving.listen()  # first, as qemu-nbd: an image is not locked in vain
        with serving.opening():
            node = _open(arguments, name)
        with node:
            export = serving.offer(
                node,
                arguments.text_or("export-name", ""),
                description=arguments.text_or("description", ""),
                depth=arguments.flag("allocation-depth"),
                bitmaps=arguments.texts("bitmap")[::-1],  # as qemu-nbd lists them
            )
            if connects:
                from diskwright.cli.nbd_device import connect

                serving.also(connect(arguments.text_or("connect", ""), export))
            serving.run(background)
    return 0


def _open(arguments: Arguments, name: str) -> Node:
    """Open the image as the options say.

    Raises:
        DiskwrightError: it cannot be.
    """
    from diskwright.cli.images import image_of, warn_of_guess

    image = image_of(
        arguments,
        name,
        format=arguments.text("format"),
        cache="none" if arguments.flag("nocache") else arguments.text("cache"),
        refusal=f"Failed to blk_new_open '{name}'",
    )
    image.can_unmap = arguments.text("discard") in ("unmap", "on")  # not by default
    image.aio = arguments.text("aio") or image.aio
    if arguments.flag("detect-zeroes"):
        modes = {key: arguments.text(key) for key in ("detect-zeroes", "discard")}
        given = {key: mode for key, mode in modes.items() if mode is not None}
        image.options = {**image.options, **given}
    read_only = arguments.flag("read-only") or arguments.flag("load-snapshot")
    if arguments.flag("snapshot"):
        if arguments.flag("load-snapshot"):
            raise OptionError(
                "Failed to load snapshot: Can't find snapshot",
                hint="an overlay (-s) has none; without -s a snapshot is served read-only",
            )
        from diskwright.operations.throwaway import overlay

        with overlay(image, format=_OVERLAY_FORMAT) as above:
            return _opened(arguments, above, read_only=read_only)
    node = _opened(arguments, image, read_only=read_only)
    if not read_only:
        warn_of_guess(node)
    return _at_snapshot(arguments, node, image)


def _opened(arguments: Arguments, image: Image, *, read_only: bool) -> Node:
    """The image, or where an offset is asked for, what lies behind it."""
    from diskwright.operations.opening import open_image

    if arguments.flag("offset"):
        image = _from_offset(image, arguments.number("offset") or 0, writes=not read_only)
    return open_image(image, read_only=read_only)


def _at_snapshot(arguments: Arguments, node: Node, image: Image) -> Node:
    """The node, or where one is asked for, an internal snapshot of it."""
    if not arguments.flag("load-snapshot"):
        return node
    from diskwright.operations.snapshot import open_at

    try:
        return open_at(node, image, arguments.text_or("load-snapshot", ""))
    except BaseException:
        node.close()
        raise


def _from_offset(image: Image, offset: int, *, writes: bool) -> Image:
    """The image without what lies before `offset`."""
    from diskwright.cli.images import warn_of_guess
    from diskwright.operations.opening import Image, open_image

    with open_image(image) as node:
        driver = node.driver
        if writes:
            warn_of_guess(node)
    if not 0 <= offset < 1 << 63:
        raise OptionError(
            f"Value '{offset}' is out of range for parameter 'offset'", field="offset"
        )
    inner = Image(
        {"driver": "raw", "offset": offset, "file": image.as_child(image.format or driver)},
        cache=image.cache,
        policy=image.policy,
        shown=image.shown,
    )
    inner.refusal = ""  # what is said of an offset stands alone
    inner.can_unmap = image.can_unmap
    inner.aio = image.aio
    return inner


def _list(arguments: Arguments) -> int:
    """List another server's exports."""
    from diskwright.cli import nbd_text
    from diskwright.cli.serving import credentials
    from diskwright.crypto.tls import CLIENT
    from diskwright.drivers.protocols.nbd import address, driver, security
    from diskwright.drivers.protocols.nbd.survey import list_exports

    credentials(arguments.text("tls-creds"), CLIENT)
    place = {"socket": "path"} if arguments.flag("socket") else {"bind": "host", "port": "port"}
    keys = place | {key: key for key in ("tls-creds", "tls-hostname")}
    given: dict[str, object] = {
        word: arguments.text(key) for key, word in keys.items() if arguments.flag(key)
    }
    if "path" not in given:
        given = {"host": "localhost", **given}
    options = driver.Nbd.options.validate(given)
    where = address.from_options(options)
    for line in nbd_text.list_lines(list_exports(where, security.from_options(options, where))):
        output.say(f"{line}\n")
    return 0


# ------------------------------------------------------------------------------------ the program


def run(words: Sequence[str]) -> int:
    """Run the program with these words; returns its exit code."""
    from diskwright.block.notice import listening

    arguments = Arguments(PROGRAM)

    def heard(words: str, kind: str) -> None:
        output.complain(output.noticed(PROGRAM, words, kind))

    try:
        with listening(heard):
            code = _run(arguments, words)
    except AllSaid:
        code = 0
    except HelpWanted:
        output.say(help_text())
        code = 0
    except VersionWanted:
        from diskwright.cli.run import Tool, version_line

        output.say(version_line(Tool(PROGRAM, "", commands={})))
        code = 0
    except Misused as error:
        output.complain(_misuse(error))
        code = 1
    except DiskwrightError as error:
        from diskwright.cli.run import report

        report(error, arguments)
        code = 1
    except OSError as error:
        output.complain(f"{PROGRAM}: {error.strerror or error}")
        code = 1
    output.end()
    return code


def _misuse(error: Misused) -> str:
    """What is said of a wrong command line."""
    if error.field == "getopt":
        return f"{error.message}\n{PROGRAM}: {_TRY}"
    return f"{PROGRAM}: {error.message}\n{_TRY}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code.

    A program of its own ends at once on SIGINT, until it serves.
    """
    if argv is not None:
        return run(argv)
    from diskwright.cli.start import end_on_interrupt
    from diskwright.exports.nbd.service import SWITCH_SECONDS

    end_on_interrupt()
    sys.setswitchinterval(SWITCH_SECONDS)
    os._exit(run(sys.argv[1:]))


if __name__ == "__main__":
    sys.exit(main())
