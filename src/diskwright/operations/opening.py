"""Opening what an operation works on: one record that says how, one function that does it."""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import DiskwrightError, OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from os import PathLike

    from diskwright.block.node import Node
    from diskwright.block.opener import Made, Opener, Spec
    from diskwright.block.policy import Policy

    Name = str | bytes | PathLike[str] | PathLike[bytes] | dict[str, object]

#: What a guest sees of a disk are whole sectors; every operation counts in them.
SECTOR = 512


class Image(Record):
    """An image to be opened.

    Attributes:
        name: a path, URI, "json:{…}", or a dict of options.
        format: the driver; None probes.
        options: more options of the format, by name, dotted names for those of its file.
        cache: a cache mode.
        force_share: open although another process may write it; only for reading.
        policy: which outside references are followed; None follows those inside of the
            image's folder.
        shown: what QEMU's tools call it in their error lines, where that is not `name`.
        checks: it is opened to be checked: what a check can mend does not stop that.
        looks_only: nobody will ask for the guest's data, so that a file of these may be missing.
        can_unmap: discards are passed to it.
        unmaps_unasked: detect-zeroes=unmap needs no discard=unmap beside it.
        copy_on_read: what is read from its backing file is kept in it.
        aio: "threads", "native" or "io_uring"; native needs a cache mode without the page cache.
        refusal: what QEMU's tool puts before the reason why it cannot be opened, where that is
            not "Could not open '…'"; nothing, if it is empty.
    """

    __slots__ = (
        "aio",
        "cache",
        "can_unmap",
        "checks",
        "looks_only",
        "copy_on_read",
        "force_share",
        "format",
        "name",
        "options",
        "policy",
        "refusal",
        "shown",
        "unmaps_unasked",
    )

    def __init__(
        self,
        name: Name,
        *,
        format: str | None = None,
        options: dict[str, object] | None = None,
        cache: str | None = None,
        force_share: bool = False,
        policy: Policy | None = None,
        shown: str | None = None,
    ) -> None:
        self.name = name if isinstance(name, dict) else path_of(name)
        self.format = format
        self.options = options or {}
        given: object = self.options
        words = isinstance(given, dict) and all(isinstance(key, str) for key in given)
        require(words, "options", "a dict with names as keys", options)
        require(format is None or isinstance(format, str), "format", "a driver's name", format)
        require(policy is None or hasattr(policy, "refusal"), "policy", "a Policy", policy)
        self.cache = cache or "writeback"
        self.force_share = force_share
        self.policy = policy
        self.shown = shown
        self.checks = False
        self.looks_only = False
        self.can_unmap = True
        self.unmaps_unasked = False
        self.copy_on_read = False
        self.aio = "threads"
        self.refusal: str | None = None

    @property
    def title(self) -> str:
        """What to call it in a sentence."""
        if self.shown is not None:
            return self.shown
        if isinstance(self.name, str):
            return self.name
        from diskwright.block.filename import to_json

        return to_json(self.name)

    def spec(self) -> Spec:
        """The name, or name and options together."""
        if not self.options:
            return self.name
        from diskwright.block import filename

        given = filename.nested(self.options)
        if isinstance(self.name, dict):
            return {**self.name, **given}
        if self.name.startswith("json:"):
            return {**filename.parse_json(self.name), **given}
        if self.format is not None:
            given["driver"] = self.format
        return filename.with_name(given, self.name)

    def as_child(self, driver: str) -> dict[str, object]:
        """Options that open it, by this driver, below another node."""
        from diskwright.block import filename

        spec = self.spec()
        if isinstance(spec, str) and spec.startswith("json:"):
            spec = filename.parse_json(spec)
        below: dict[str, object] = dict(spec) if isinstance(spec, dict) else {}
        file = below.get("file", {"filename": spec} if isinstance(spec, str) else None)
        if isinstance(file, dict) and set(file) == {"filename"}:
            below["file"] = filename.parse(str(file["filename"]))
        return {**below, "driver": driver}

    def opener(self, *, read_only: bool = True, follow_backing: bool = True) -> Opener:
        """The opener for it."""
        from diskwright.block.opener import Opener
        from diskwright.block.policy import SameFolder

        return Opener(
            policy=self.policy or SameFolder(),
            read_only=read_only,
            force_share=self.force_share,
            cache=self.cache,
            follow_backing=follow_backing,
            can_unmap=self.can_unmap,
            copy_on_read=self.copy_on_read,
        )


def require(right: bool, field: str, wanted: str, given: object) -> None:
    """Refuse an argument that is of a wrong kind.

    Raises:
        OptionError: `right` is false.
    """
    if not right:
        raise OptionError(
            f"'{field}' is {wanted}, not an object of type {type(given).__name__}", field=field
        )


def path_of(name: str | bytes | PathLike[str] | PathLike[bytes]) -> str:
    """A name that was given as text, as bytes, or as a path object, as text.

    Raises:
        OptionError: no file can be called so.
    """
    from os import fsdecode, fsencode

    try:
        text = fsdecode(name)
        fsencode(text)
    except UnicodeEncodeError:
        raise OptionError(f"No file can be called {name!a}", field="filename") from None
    except TypeError:
        raise OptionError(
            "An image is named by a path, a URI or a dict of options, "
            f"not by an object of type {type(name).__name__}",
            field="filename",
        ) from None
    if "\0" in text:
        raise OptionError("A file name cannot have a zero byte in it", field="filename")
    return text


def open_image(
    image: Image,
    *,
    read_only: bool = True,
    follow_backing: bool = True,
    resizes: bool = False,
    shared: int | None = None,
    made: Sequence[Made] = (),
) -> Node:
    """Open `image` with the permissions of an outside user.

    Args:
        image: what and how.
        read_only: nothing will be written to it.
        follow_backing: open its backing file too.
        resizes: it will be made longer or shorter.
        shared: what other users may do meanwhile; all, by default.
        made: the files that were just made for it, which are locked.

    Raises:
        DiskwrightError: its `qemu` begins with the sentence that QEMU's tools put first.
    """
    from diskwright.block import opener as opening
    from diskwright.block.permission import CONSISTENT_READ, RESIZE, WRITE

    try:
        if image.force_share and not read_only:
            raise OptionError(
                "force-share=on can only be used with read-only images", field="force-share"
            )
        opener = image.opener(read_only=read_only, follow_backing=follow_backing)
        opener.checks = image.checks
        opener.looks_only = image.looks_only or (read_only and not follow_backing)
        opener.aio = image.aio
        opener.made.extend(made)
        opener.unmaps_unasked = image.unmaps_unasked
        used = CONSISTENT_READ | WRITE | RESIZE if resizes else None
        return opening.open_image(
            opener, image.spec(), format=image.format, used=used, shared=shared
        )
    except DiskwrightError as error:
        refusal = f"Could not open '{image.title}'" if image.refusal is None else image.refusal
        error.qemu = f"{refusal}: {error.qemu_message}" if refusal else error.qemu_message
        raise


def disk_size(node: Node) -> int:
    """The node's size in bytes, as whole sectors: its last one is filled with zeroes."""
    return -(-node.size // SECTOR) * SECTOR


def read_into(node: Node, offset: int, view: memoryview) -> None:
    """Fill `view` from the node; what lies behind its end is zero."""
    inside = max(min(len(view), node.size - offset), 0)
    if inside < len(view):
        from diskwright.block.requests import fill_zero

        fill_zero(view[inside:])
    if inside:
        node.read_into(offset, view[:inside])


def open(
    name: Name,
    *,
    format: str | None = None,
    read_only: bool = True,
    force_share: bool = False,
    cache: str | None = None,
    options: dict[str, object] | None = None,
    policy: Policy | None = None,
) -> Node:
    r"""Open an image; close the node, or use it with `with`.

    Args:
        name: a path, URI, "json:{…}", or a dict of options.
        format: the driver; None probes. Say it for raw images that you write to: a guest could
            write the header of another format into one.
        read_only: nothing will be written. A writable node lets other processes read only, and
            is refused where another one writes.
        force_share: look although another process may write to it.
        cache: "writeback" (the default), "writethrough", "none", "directsync" or "unsafe".
        options: more options of the driver, by name; dotted names for those of its file.
        policy: which files that the image names are opened; by default those in or below its
            own folder (`SameFolder`).

    Raises:
        NotFoundError, AccessError: the file cannot be opened.
        FormatError: it is no such image.
        LockError: another process uses it.
        PolicyError: it names a file that the policy refuses.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("disk.qcow2", "1M", format="qcow2")
        >>> with diskwright.open("disk.qcow2", read_only=False) as node:
        ...     node.write(4096, b"hello")
        ...     node.read(4094, 8), node.size
        (b'\x00\x00hello\x00', 1048576)
    """
    from diskwright.block.permission import ALL, WRITE

    require(isinstance(read_only, bool), "read_only", "True or False", read_only)
    image = Image(
        name,
        format=format,
        options=options,
        cache=cache,
        force_share=force_share,
        policy=policy,
    )
    return open_image(image, read_only=read_only, shared=None if read_only else ALL & ~WRITE)
