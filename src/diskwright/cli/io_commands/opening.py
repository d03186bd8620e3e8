"""`open`, `close`, `reopen`: which image is worked on, and how it is open."""

from __future__ import annotations

from diskwright.cli.grammar import Arguments, Flag
from diskwright.cli.io_commands.declaration import IoCommand, WrongUsage
from diskwright.errors import DiskwrightError, OptionError, ReadOnlyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from diskwright.block.node import Node
    from diskwright.cli.io_commands.session import Session
    from diskwright.operations.opening import Image

#: The format of the overlay that takes what is written under -s.
OVERLAY_FORMAT = "qcow2"


def _constant(word: str) -> Callable[[str], object]:
    """What an option without a value stands for."""
    return lambda _: word


def _cache(word: str) -> str:
    from diskwright.block.common_options import CACHE_MODES

    return _one_of(word, CACHE_MODES, "cache")


def _discard(word: str) -> str:
    from diskwright.block.common_options import DISCARD_MODES

    return _one_of(word, DISCARD_MODES, "discard")


def _aio(word: str) -> str:
    from diskwright.block.common_options import AIO_MODES

    return _one_of(word, AIO_MODES, "aio")


def _one_of(word: str, known: Collection[str], what: str) -> str:
    if word not in known:
        raise OptionError(f"Invalid {what} option: {word}", hint=f"one of {', '.join(known)}")
    return word


#: Options that the program and its command `open` have in common.
OPEN_FLAGS = (
    Flag("r", "read-only", help="write nothing to the image"),
    Flag("s", "snapshot", help="write to an overlay that is thrown away at the end"),
    Flag(
        "n", "nocache", help="go past the host's cache: -t none", parse=_constant("none"), key="t"
    ),
    Flag("C", "copy-on-read", help="keep in the image what is read from its backing file"),
    Flag("k", "native-aio", help="the same as -i native", parse=_constant("native"), key="i"),
    Flag("i", "aio", "MODE", "threads, native or io_uring", parse=_aio, key="i"),
    Flag("t", "cache", "MODE", "how writes are cached (writethrough)", parse=_cache, key="t"),
    Flag("d", "discard", "MODE", "ignore discards, or unmap (the default)", parse=_discard),
    Flag("U", "force-share", help="open although another process may write to it"),
)


def open_as_said(
    session: Session,
    arguments: Arguments,
    name: str | None,
    *,
    format: str | None = None,
    options: dict[str, object] | None = None,
) -> None:
    """Open an image as the options say, and work on it from now on.

    Args:
        session: where it is kept.
        arguments: with the values of `OPEN_FLAGS`.
        name: of the image, where it has one.
        format: its driver.
        options: more options of it, with dotted names.

    Raises:
        DiskwrightError: it cannot be opened.
    """
    from diskwright.block.policy import FollowAll
    from diskwright.operations.opening import Image, path_of

    if session.is_open:
        raise OptionError("file open already, try 'help close'")
    refusal = "can't open" if name is None else f"can't open device {name}"
    given = _nested(options or {}, named=name is not None, refusal=refusal)
    if arguments.flag("force-share") and given.get("force-share", "on") != "on":
        raise OptionError("-U conflicts with image options", field="force-share")
    driver = given.pop("driver", None) if name is not None else None
    image = Image(
        given if name is None else path_of(name),
        format=format or (None if driver is None else str(driver)),
        options=given if name is not None else None,
        cache=arguments.text("t") or "writethrough",  # as qemu-io
        force_share=arguments.flag("force-share"),
        policy=FollowAll(),
    )
    image.refusal = refusal
    image.can_unmap = arguments.text("discard") not in ("ignore", "off")
    image.unmaps_unasked = image.can_unmap
    image.copy_on_read = arguments.flag("copy-on-read")
    image.aio = arguments.text("i") or image.aio
    session.take(_opened(image, arguments))


def _nested(options: dict[str, object], *, named: bool, refusal: str) -> dict[str, object]:
    """Options with dotted names as nested ones; without a name they say what to open."""
    from diskwright.block import filename

    try:
        nested = filename.nested(options)
        return filename.taken(nested) if named else filename.written(nested)
    except DiskwrightError as error:
        error.within(refusal)
        raise


def _opened(image: Image, arguments: Arguments) -> Node:
    from diskwright.cli.images import warn_of_guess
    from diskwright.operations.opening import open_image

    read_only = arguments.flag("read-only")
    if arguments.flag("snapshot"):
        from diskwright.operations.throwaway import overlay

        with overlay(image, format=OVERLAY_FORMAT) as above:
            return open_image(above, read_only=read_only)
    node = open_image(image, read_only=read_only)
    if not read_only:
        warn_of_guess(node)
    return node


def warn_of_bare_words(session: Session, text: str) -> None:
    """Say of each word without a value how it should be."""
    from diskwright.block.notice import WARNING
    from diskwright.block.options import split_words, words_as_dict

    for pair in split_words(text):
        if pair[1] is None:
            ((name, value),) = words_as_dict([pair]).items()
            session.hear(
                f"short-form boolean option '{pair[0]}' deprecated\n"
                f"Please use {name}={value} instead",
                WARNING,
            )


def plain_options(session: Session, text: str) -> dict[str, object]:
    """Words like "driver=qcow2,file.filename=x" as options with dotted names."""
    from diskwright.block.options import split_words, words_as_dict

    warn_of_bare_words(session, text)
    return words_as_dict(split_words(text))


def open_command(session: Session, arguments: Arguments) -> None:
    """Open an image."""
    text = arguments.text("o")
    name = arguments.operands[0] if arguments.operands else None
    if len(arguments.operands) > 1 or (name is None and text is None):
        raise WrongUsage
    options = None if text is None else plain_options(session, text)
    open_as_said(session, arguments, name, options=options)


def close(session: Session, arguments: Arguments) -> None:
    """Close the image."""
    session.close()


def reopen(session: Session, arguments: Arguments) -> None:
    """Change how the image is open."""
    from diskwright.block.reopen import Reopening, reopen_with

    if arguments.operands:
        raise WrongUsage
    if arguments.count("r") + arguments.count("w") > 1:
        raise OptionError("Only one -r/-w option may be given")
    read_only = arguments.flag("r") if arguments.flag("r") or arguments.flag("w") else None
    cache = arguments.text("c")
    text = arguments.text("o")
    options = {} if text is None else plain_options(session, text)
    if read_only is not None and "read-only" in options:
        raise OptionError("Cannot set both -r/-w and 'read-only'", field="read-only")
    if cache is not None and {"cache.direct", "cache.no-flush"} & options.keys():
        raise OptionError("Cannot set both -c and the cache options", field="cache")
    if "read-only" in options:
        read_only = _read_only_option(session.node, options.pop("read-only"))
    if "file.read-only" in options:
        _check_storage(session.node, options.pop("file.read-only"), read_only)
    wanted = Reopening.to(read_only=read_only, cache=cache)
    wanted.share_writes = True
    # By their names as they were written: those of the library have underscores.
    reopen_with(session.node, wanted, options)
    session.outstanding.report()


def _read_only_option(node: Node, value: object) -> bool:
    """The value of the option read-only, which does not end the use for writing, as -r does."""
    from diskwright.block.common_options import option_flag

    wanted = option_flag(value, "read-only")
    if wanted and not node.read_only:
        raise _has_writers(node)
    return wanted


def _check_storage(node: Node, value: object, read_only: bool | None) -> None:
    """Refuse that storage is to be read-only below an image that is written to.

    Elsewhere it is as the image needs it: there is nothing to change.
    """
    from diskwright.block.common_options import option_flag

    writes = not node.read_only if read_only is None else not read_only
    if option_flag(value, "read-only") and writes:
        if node.read_only:
            raise ReadOnlyError("Block node is read-only", node=node.node_name)
        raise _has_writers(node.children["file"].node if "file" in node.children else node)


def _has_writers(node: Node) -> OptionError:
    return OptionError(
        f"Read-only block node '{node.node_name}' cannot support read-write users",
        field="read-only",
    )


OPEN = IoCommand(
    "open",
    "open an image",
    open_command,
    synopsis="[-rsCnkU] [-t cache] [-d discard] [-o options] [path]",
    words=(1, None),
    flags=(*OPEN_FLAGS, Flag("o", "", "OPTIONS", "options of the image's driver")),
    needs_image=False,
    notes="`open -n -o driver=raw disk.img` opens a raw image for reading and writing, uncached.",
)
CLOSE = IoCommand("close", "close the image", close)
REOPEN = IoCommand(
    "reopen",
    "change how the image is open",
    reopen,
    synopsis="[(-r|-w)] [-c cache] [-o options]",
    words=(0, None),
    flags=(
        Flag("r", "", help="make it read-only"),
        Flag("w", "", help="make it writable"),
        Flag("c", "", "CACHE", "another cache mode", parse=_cache),
        Flag("o", "", "OPTIONS", "options of the image's driver"),
    ),
    notes="`reopen -o lazy-refcounts=on` lets a qcow2 image postpone its refcounts.",
)
