"""Making new images: what QEMU's `create` checks, in its order, and what it announces."""

from __future__ import annotations

from errno import EFBIG

from diskwright.block import filename, registry
from diskwright.block.cancel import cancellable, check_cancelled
from diskwright.block.options import Options, SizeRangeError, parse_size, parse_words, whole
from diskwright.block.record import Record
from diskwright.errors import DiskwrightError, OptionError, UnsupportedError, errno_of
from diskwright.operations.opening import SECTOR, Image, disk_size, open_image, path_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from os import PathLike

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.opener import Made
    from diskwright.block.policy import Policy

MAX_SIZE = (1 << 63) - 1
#: As with QEMU, this is the number that stands for a size that was not said.
_NO_SIZE = (1 << 64) - 1

#: create options that say what the others are about, not how
_BACKING = "backing_file"
_BACKING_FORMAT = "backing_fmt"


class NewImage(Record):
    """An image to be made.

    Attributes:
        name: a path, or `protocol:rest`.
        format: the driver.
        size: in bytes; None takes it from the options or the backing file.
        options: create options of the format and its file, by name, as words or values.
        backing, backing_format: what shows through where the image has nothing.
        check_backing: open the backing file before it is named; False is QEMU's `-u`.
        policy: which files that the backing file names may be opened; it may itself.
        as_qemu: refuse `backing` where QEMU's driver has no such thing, though ours has.
    """

    __slots__ = (
        "as_qemu",
        "backing",
        "backing_format",
        "check_backing",
        "format",
        "name",
        "options",
        "policy",
        "size",
    )

    def __init__(
        self,
        name: str,
        *,
        format: str = registry.DEFAULT_FORMAT,
        size: int | None = None,
        options: Mapping[str, object] | None = None,
        backing: str | None = None,
        backing_format: str | None = None,
        check_backing: bool = True,
        policy: Policy | None = None,
        as_qemu: bool = False,
    ) -> None:
        self.name = name
        self.format = format
        self.size = size
        self.options = dict(options or {})
        self.backing = backing
        self.backing_format = backing_format
        self.check_backing = check_backing
        self.policy = policy
        self.as_qemu = as_qemu


class Created(Record):
    """An image that was made: its name, format, size in bytes, and what QEMU announces."""

    __slots__ = ("announcement", "backing", "backing_format", "format", "name", "size")

    def __init__(
        self,
        name: str,
        format: str,
        size: int,
        *,
        backing: str | None,
        backing_format: str | None,
        announcement: str,
    ) -> None:
        self.name = name
        self.format = format
        self.size = size
        self.backing = backing
        self.backing_format = backing_format
        self.announcement = announcement


def format_class(format: str) -> type[Node]:
    """The class of a format.

    Raises:
        OptionError: there is no such format.
    """
    try:
        return registry.driver_class(format)
    except OptionError as error:
        error.qemu = f"Unknown file format '{format}'"
        raise


def creatable(format: str) -> type[Node]:
    """The class of a format that images can be made of.

    Raises:
        OptionError: there is no such format.
        UnsupportedError: the driver only reads, or is no format.
    """
    from diskwright.block.existing import require_creation

    cls = format_class(format)
    require_creation(cls, f"Format driver '{format}'")
    return cls


def protocol_class(name: str) -> type[Node]:
    """The class of the protocol that `name` begins with, or of plain files.

    Raises:
        OptionError: no driver knows it.
    """
    return registry.driver_class(filename.driver_of(filename.protocol_of(name) or "file"))


def create_options(format: str, name: str = "") -> Options:
    """The options for making an image of `format` at `name`: the format's, then its file's.

    Raises: as `creatable` and `protocol_class`.
    """
    from diskwright.block.existing import require_creation

    cls = creatable(format)
    below = protocol_class(name)
    require_creation(below, f"Protocol driver '{below.driver}'")
    return cls.create_options if cls is below else cls.create_options + below.create_options


def create_image(wanted: NewImage, *, announce: Callable[[str], None] | None = None) -> Created:
    """Make an image.

    Args:
        wanted: what to make.
        announce: gets "Formatting '…', fmt=…" before anything is written.

    Raises:
        DiskwrightError: its `qemu` begins with the image's name. Of a file that was not there
            before nothing is left.
    """
    try:
        return _create(wanted, announce)
    except DiskwrightError as error:
        error.qemu = f"{wanted.name}: {error.qemu_message}"
        raise


def _create(wanted: NewImage, announce: Callable[[str], None] | None) -> Created:
    cls = creatable(wanted.format)
    declared = create_options(wanted.format, wanted.name)
    given = check_words(declared, wanted.options)
    take_backing(cls, declared, given, wanted)
    backing, backing_format = backing_of(cls, given)
    check_backing_name(backing, wanted.name)
    size = _size(wanted, given)
    if backing is not None and cls.parent_option:
        size = size or _size_of_parent(wanted, backing, cls.driver)
    elif backing is not None:
        size = _look_at_backing(wanted, backing, backing_format, size)
    if size is None:
        raise OptionError("Image creation needs a size parameter", field="size")
    given["size"] = size
    announcement = f"Formatting '{wanted.name}', fmt={cls.driver}{declared.announcement(given)}"
    if announce is not None:
        announce(announcement)
    try:
        close_files(make(cls, declared, given, wanted))
    except DiskwrightError as error:
        if errno_of(error) == EFBIG:
            advice = " (try using a larger cluster size)" if "cluster_size" in declared else ""
            error.qemu = f"The image size is too large for file format '{cls.driver}'{advice}"
        raise
    return Created(
        wanted.name,
        cls.driver,
        -(-size // SECTOR) * SECTOR,
        backing=backing,
        backing_format=backing_format,
        announcement=announcement,
    )


def check_words(declared: Options, words: Mapping[str, object]) -> dict[str, object]:
    """`words`, if all are declared and have values of their type.

    Enums, which are looked at later, and booleans, which are announced so, stay words.

    Raises:
        OptionError: otherwise.
    """
    given: dict[str, object] = {}
    for name, value in words.items():
        option = declared.get(name)
        if option is None:
            known = ", ".join(option.name for option in declared)
            raise OptionError(
                f"Invalid parameter '{name}'", field=name, hint=f"known options: {known}"
            )
        converted = value if option.type == "enum" else option.convert(value)
        given[name] = value if option.type == "bool" else converted
    return given


def take_backing(
    cls: type[Node], declared: Options, given: dict[str, object], wanted: NewImage
) -> None:
    """Put the backing file and its format among the options, where the format has such."""
    if cls.parent_option and not wanted.as_qemu:
        _take_parent(cls, given, wanted)
    else:
        _take_as_qemu(cls, declared, given, wanted)


def check_backing_name(backing: str | None, image: str) -> None:
    """Refuse a backing file that no image can have.

    Raises:
        OptionError: its name is empty, or the new image's own.
    """
    if backing == "":
        raise OptionError("Expected backing file name, got empty string", field="backing")
    if backing is not None and backing == image:
        raise OptionError(
            "Error: Trying to create an image with the same filename as the backing file",
            field="backing",
        )


def _take_parent(cls: type[Node], given: dict[str, object], wanted: NewImage) -> None:
    """The backing file of a format that names none but images of its own kind."""
    if wanted.backing is not None:
        given[cls.parent_option] = wanted.backing
    if wanted.backing_format not in (None, cls.driver):
        raise OptionError(
            f"The backing file of a {cls.driver} image is a {cls.driver} image too, "
            f"not {wanted.backing_format}",
            field="backing_format",
        )


def _take_as_qemu(
    cls: type[Node], declared: Options, given: dict[str, object], wanted: NewImage
) -> None:
    for name, value, what in (
        (_BACKING, wanted.backing, "file"),
        (_BACKING_FORMAT, wanted.backing_format, "file format"),
    ):
        if value is None:
            continue
        if name not in declared:
            error = UnsupportedError(
                f"Backing {what} not supported for file format '{wanted.format}'"
            )
            if cls.parent_option:
                error.hint = f"it is an option here, -o {cls.parent_option}=…"
                error.beyond_qemu()
            raise error
        given[name] = value


def backing_of(cls: type[Node], given: Mapping[str, object]) -> tuple[str | None, str | None]:
    """The backing file among checked options and its format; None where it was not said."""
    if cls.parent_option:
        parent = _text(given.get(cls.parent_option))
        return parent, None if parent is None else cls.driver
    return _text(given.get(_BACKING)), _text(given.get(_BACKING_FORMAT))


def _size(wanted: NewImage, given: dict[str, object]) -> int | None:
    size = given.get("size")
    if wanted.size is not None:
        if size is not None:
            raise OptionError("The image size must be specified only once", field="size")
        size = wanted.size
    if size is None or size == _NO_SIZE:
        return None
    assert isinstance(size, int)
    return size


def _look_at_backing(
    wanted: NewImage, name: str, format: str | None, size: int | None
) -> int | None:
    """Open the backing file and learn its size and format, unless that is not wanted."""
    found = ""
    if wanted.check_backing:
        # Only its header is of interest, which others may go on writing to.
        image = Image(
            _join(wanted.name, name), format=format, policy=wanted.policy, force_share=True
        )
        image.looks_only = True
        try:
            with open_image(image) as node:
                size = disk_size(node) if size is None else size
                found = node.driver
        except DiskwrightError as error:
            # QEMU puts no sentence of its own around this one
            nested = f"Could not open '{image.title}': "
            text = error.qemu_message.removeprefix(nested)
            error.qemu = f"{text}\nCould not open backing image."
            raise
    if format is None:
        detected = f"\nDetected format of {found}." if found else ""
        raise OptionError(
            "Backing file specified without backing format",
            qemu=f"Backing file specified without backing format{detected}",
            field=_BACKING_FORMAT,
            hint=f"say it: {found}" if found else "say raw, qcow2 or what it is",
        )
    return size


def look_behind(wanted: NewImage, name: str, format: str | None) -> None:
    """See that the backing file of an image can be opened before anything is overwritten."""
    image = Image(_join(wanted.name, name), format=format, policy=wanted.policy, force_share=True)
    try:
        open_image(image).close()
    except DiskwrightError as error:
        error.qemu = error.qemu_message.removeprefix(f"Could not open '{image.title}': ")
        error.within(f"Could not open '{wanted.name}': Could not open backing file")
        raise


def _size_of_parent(wanted: NewImage, name: str, format: str) -> int:
    """Open the backing file, without which nobody knows what the new image is to say of it."""
    image = Image(_join(wanted.name, name), format=format, policy=wanted.policy, force_share=True)
    try:
        with open_image(image, follow_backing=wanted.check_backing) as node:
            return disk_size(node)
    except DiskwrightError as error:
        error.qemu = error.qemu_message.removeprefix(f"Could not open '{image.title}': ")
        error.within(f"Could not open the backing file '{image.title}'")
        raise


def _join(image: str, reference: str) -> str:
    return filename.join(image, reference)


def following(wanted: NewImage) -> Policy:
    """The policy for the new image: what it names was named by the caller, what those name not."""
    from diskwright.block.policy import Policy, SameFolder

    class Named(Policy):
        def refusal(self, role: str, reference: str, image: str) -> str | None:
            if image.removeprefix("file:") == wanted.name.removeprefix("file:"):
                return None
            return below.refusal(role, reference, image)

    below = wanted.policy or SameFolder()
    return Named()


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _check_place(name: str) -> None:
    """Where the image is to be is looked at before its options, as QEMU does."""
    from diskwright.block.existing import parse_target

    spec = parse_target(name)
    if "filename" in spec:
        registry.driver_class(str(spec.get("driver", "file"))).check_place(spec)


def make(
    cls: type[Node],
    declared: Options,
    given: Mapping[str, object],
    wanted: NewImage,
    *,
    cache: str = "writeback",
) -> list[Made]:
    """Let the driver write the image; of a new file that failed nothing is left.

    Args:
        cls: the format.
        declared: its options and its file's.
        given: those that were said, "size" among them.
        wanted: the name and the policy.
        cache: the mode in which it is written.

    Returns:
        The files that it is in, which nobody else may write to until the caller has closed or
        removed them (`close_files`, `remove_files`).
    """
    from diskwright.block.opener import Opener

    _check_place(wanted.name)
    values = declared.validate(given)
    size = -(-whole(given["size"]) // SECTOR) * SECTOR
    if size >= 1 << 64:
        raise OptionError(
            f"A size of {given['size']} bytes is more than {MAX_SIZE}",
            qemu="Image size is too large",
            field="size",
        )
    opener = Opener(policy=following(wanted), read_only=False, cache=cache)
    try:
        cls.create(opener, size, {**values, "size": size, "filename": wanted.name})
    except BaseException:
        remove_files(made for made in opener.made if made.fresh)
        close_files(opener.made)
        raise
    return opener.made


def close_files(made: Iterable[Made]) -> None:
    """Let others have the files of an image that is finished."""
    for one in made:
        one.close()


def remove_files(made: Iterable[Made]) -> None:
    """Remove the files of an image that was not finished."""
    for one in made:
        one.remove()


def size_of(value: int | str) -> int:
    """A size in bytes from a number or QEMU's words.

    Raises:
        OptionError: it is none.
    """
    try:
        size = parse_size(value)
        if size > MAX_SIZE:
            raise SizeRangeError(str(value))
    except SizeRangeError:
        raise OptionError(
            f"Invalid image size specified. Must be between 0 and {MAX_SIZE}.", field="size"
        ) from None
    except ValueError:
        raise OptionError(f"Invalid image size specified: '{value}'.", field="size") from None
    return size


def options_of(options: Mapping[str, object] | str | None) -> dict[str, object]:
    """Options as a dict; text is split as QEMU's `-o` words are."""
    if options is None or options == "":
        return {}
    if isinstance(options, str):
        return parse_words(options)
    try:
        return dict(options)
    except (TypeError, ValueError):
        raise OptionError(
            f"Options are words or a dict, not an object of type {type(options).__name__}",
            field="options",
        ) from None


def create(
    name: str | PathLike[str],
    size: int | str | None = None,
    *,
    format: str = registry.DEFAULT_FORMAT,
    options: Mapping[str, object] | str | None = None,
    backing: str | PathLike[str] | None = None,
    backing_format: str | None = None,
    check_backing: bool = True,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> Created:
    """Make a new image; a file of that name is overwritten.

    Args:
        name: a path, or `protocol:rest`.
        size: in bytes or QEMU's words ("10G"); taken from the backing file if None.
        format: "qcow2", "raw", "vdi", "vpc" or what else is registered.
        options: create options of the format, a dict or QEMU's words ("cluster_size=1M").
        backing: the backing file, as the image shall name it: relative to the image. That of
            a vdi or vpc image is of the same format; the new image is a differencing one.
        backing_format: its format, which the image names too.
        check_backing: whether the backing file must be there; vdi and vpc ask it for its
            identifier, so there it must always.
        policy: which files that it names may be opened.
        cancel: a `threading.Event` or the like that ends it; nothing of a
            new file is left.

    Raises:
        OptionError, UnsupportedError: see their sentences.
        IOFailure: the file could not be made; nothing of a new one is left.
        CancelledError: the flag was set.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("base.qcow2", "64M", format="qcow2")
        >>> made.size
        67108864
        >>> made = diskwright.create(
        ...     "over.qcow2", format="qcow2", backing="base.qcow2", backing_format="qcow2"
        ... )
        >>> made.size, made.backing
        (67108864, 'base.qcow2')
    """
    wanted = NewImage(
        path_of(name),
        format=format,
        size=None if size is None else size_of(size),
        options=options_of(options),
        backing=None if backing is None else path_of(backing),
        backing_format=backing_format,
        check_backing=check_backing,
        policy=policy,
    )
    with cancellable(cancel):
        check_cancelled()
        return create_image(wanted)
