"""Converting: images, one after the other, into a new or existing image of another format.

A new target has no magic number until everything is in it: a conversion that is killed leaves
something that no format claims. One that fails or is cancelled leaves nothing at all.
"""

from __future__ import annotations

from diskwright.block.cancel import cancellable, check_cancelled
from diskwright.block.record import Record
from diskwright.block.registry import DEFAULT_FORMAT, is_known
from diskwright.errors import (
    CancelledError,
    DiskwrightError,
    OptionError,
    UnsupportedError,
)
from diskwright.operations.copy import Copying
from diskwright.operations.opening import Image, disk_size, open_image, path_of, require
from diskwright.operations.workers import Steering

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from os import PathLike

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.opener import Made
    from diskwright.block.policy import Policy
    from diskwright.operations.copy import Copied
    from diskwright.operations.opening import Name
    from diskwright.operations.source import Source

_NO_COMPRESSION = "Compression not supported for this file format"


class Target(Record):
    """Where a conversion goes.

    Attributes:
        name: a path, or `protocol:rest`.
        format: the driver.
        options: create options, by name, as words or values.
        backing, backing_format: what shows through; only what differs is copied then.
        image: an existing image to write into (QEMU's `-n`) instead of making a new one.
        cache: a cache mode. QEMU's default is "unsafe": the system writes in its own time.
        policy: which files that the backing file names may be opened; it may itself.
        as_qemu: refuse `backing` where QEMU's driver has no such thing, though ours has.
    """

    __slots__ = (
        "as_qemu",
        "backing",
        "backing_format",
        "cache",
        "format",
        "image",
        "name",
        "options",
        "policy",
    )

    def __init__(
        self,
        name: str,
        *,
        format: str = DEFAULT_FORMAT,
        options: Mapping[str, object] | None = None,
        backing: str | None = None,
        backing_format: str | None = None,
        image: Image | None = None,
        cache: str = "unsafe",
        policy: Policy | None = None,
        as_qemu: bool = False,
    ) -> None:
        self.name = name
        self.format = format
        self.options = dict(options or {})
        self.backing = backing
        self.backing_format = backing_format
        self.image = image
        self.cache = cache
        self.policy = policy
        self.as_qemu = as_qemu


class Converted(Record):
    """An image that was made or filled: name, format, size, and what was copied, in bytes.

    Attributes:
        copied: `diskwright.operations.copy.Copied`.
    """

    __slots__ = ("copied", "format", "name", "size")

    def __init__(self, name: str, format: str, size: int, copied: Copied) -> None:
        self.name = name
        self.format = format
        self.size = size
        self.copied = copied


def convert_images(
    sources: Sequence[Image],
    target: Target,
    *,
    copying: Copying | None = None,
    steering: Steering | None = None,
    snapshot: str | None = None,
) -> Converted:
    """Open images and write what they show, one after the other, into another.

    Args:
        sources: at least one.
        target: where to.
        copying: how; `target_is_zero` counts for existing targets only.
        steering: who watches.
        snapshot: read this internal snapshot: an id or else name, or QEMU's words
            "snapshot.id=…,snapshot.name=…". Of several sources the first one has it, and the
            words must be used.

    Raises:
        DiskwrightError: as `qemu-img convert` says it; a new target is gone.
    """
    copying = copying or Copying()
    _check_request(sources, target, copying)
    nodes: list[Node] = []
    try:
        for image in sources:
            nodes.append(open_image(image, shared=_shared_with_others(image)))
        if snapshot is not None:
            if len(nodes) > 1 and not snapshot.startswith("snapshot."):
                raise OptionError(
                    "No support for concatenating multiple snapshot", field="snapshot"
                )
            from diskwright.operations.snapshot import open_at

            nodes[0] = open_at(nodes[0], sources[0], snapshot)
        steering = steering or Steering()
        job = _Conversion(nodes, target, copying, steering)
        with cancellable(steering.cancel):
            return job.into_new() if target.image is None else job.into_existing()
    finally:
        for node in nodes:
            node.close()


def _shared_with_others(image: Image) -> int | None:
    """Nobody may change a source meanwhile, unless the caller said that this is well."""
    from diskwright.block.permission import ALL, RESIZE, WRITE

    return None if image.force_share else ALL & ~(WRITE | RESIZE)


def _check_request(sources: Sequence[Image], target: Target, copying: Copying) -> None:
    """What does not go together, whatever the images are."""
    if not sources:
        raise OptionError("Must specify image file name", field="source")
    if copying.sparse_bytes % 512 or not 0 <= copying.sparse_bytes <= 16 << 20:
        raise OptionError(
            "Invalid buffer size for sparse output specified. Valid sizes are multiples of 512 "
            f"up to {16 << 20}. Select 0 to disable sparse detection (fully allocates output).",
            field="sparse",
        )
    if copying.salvage is not None and copying.offload:
        raise OptionError("Cannot use copy offloading in salvaging mode", field="offload")
    if target.image is not None and target.options:
        raise OptionError("-o has no effect when skipping image creation", field="options")
    if copying.target_is_zero and target.image is None:
        raise OptionError("--target-is-zero requires use of -n flag", field="target_is_zero")


# ----------------------------------------------------------------------------------- the target


def _check_cache(mode: str) -> None:
    """Refuse a cache mode that there is not, before the target is opened or made."""
    from diskwright.block.common_options import cache_flags

    cache_flags(mode)


def _no_bitmaps(driver: str) -> UnsupportedError:
    return UnsupportedError(f"Format driver '{driver}' does not support bitmaps", field="bitmaps")


class _Conversion:
    """One conversion of nodes that are open."""

    def __init__(
        self, nodes: list[Node], target: Target, copying: Copying, steering: Steering
    ) -> None:
        self.nodes = nodes
        self.target = target
        self.copying = copying
        self.steering = steering
        self.total = sum(disk_size(node) for node in nodes)

    def into_existing(self) -> Converted:
        """Write into an image that is there; what lies behind the source's end stays."""
        target = self.target
        assert target.image is not None
        if self.copying.target_is_zero and target.backing is not None:
            raise OptionError(
                "Cannot use --target-is-zero when the destination image has a backing file",
                field="target_is_zero",
            )
        self._check_bitmaps(None)
        _check_cache(target.cache)
        with open_image(target.image, read_only=False) as node:
            if disk_size(node) < self.total:
                raise OptionError(
                    f"'{target.image.title}' has {node.size} bytes, {self.total} are needed",
                    qemu="output file is smaller than input file",
                    field="target",
                )
            source = self._source(above=target.backing is not None)
            try:
                copied = self._copy(source, node, is_zero=self.copying.target_is_zero)
            except CancelledError as error:
                error.path = target.image.title  # is neither what it was nor what it was to be
                raise
            return Converted(target.image.title, node.driver, node.size, copied)

    def into_new(self) -> Converted:
        """Make the target and fill it; if that fails it is removed."""
        from diskwright.operations import create

        target = self.target
        cls = create.creatable(target.format)
        declared = create.create_options(target.format, target.name)
        wanted = create.NewImage(
            target.name,
            format=target.format,
            options=target.options,
            backing=target.backing,
            backing_format=target.backing_format,
            policy=target.policy,
            as_qemu=target.as_qemu,
        )
        given = create.check_words(declared, wanted.options)
        create.take_backing(cls, declared, given, wanted)
        backing, backing_format = create.backing_of(cls, given)
        self._check_new(cls, given, backing, backing_format)
        create.check_backing_name(backing, target.name)
        self._check_bitmaps(cls)
        # A format that nobody knows is refused by the option that names it.
        if backing is not None and not cls.parent_option and is_known(str(backing_format)):
            create.look_behind(wanted, backing, backing_format)
        _check_cache(target.cache)
        check_cancelled()
        given["size"] = self.total
        try:
            made = create.make(cls, declared, given, wanted, cache=target.cache)
        except DiskwrightError as error:
            error.qemu = f"{target.name}: error while converting {cls.driver}: {error.qemu_message}"
            raise
        try:
            done = self._fill(create.following(wanted), made, above=backing is not None)
        except BaseException as error:
            if not made and isinstance(error, CancelledError):
                error.path = target.name  # a device, which stays
            create.remove_files(made)
            raise
        create.close_files(made)
        return done

    def _check_new(
        self,
        cls: type[Node],
        given: Mapping[str, object],
        backing: str | None,
        backing_format: str | None,
    ) -> None:
        """What a new target cannot have: it is not touched then."""
        if backing is not None:
            if len(self.nodes) > 1:
                raise OptionError(
                    "Having a backing file for the target makes no sense when concatenating "
                    "multiple input images",
                    field="backing",
                )
            if backing_format is None:
                raise OptionError(
                    "Use of backing file requires explicit backing format",
                    field="backing_format",
                )
        if self.copying.compress and not cls.encodes():
            raise UnsupportedError(_NO_COMPRESSION, field="compress")
        if self.copying.compress and given.get("data_file") is not None:
            raise UnsupportedError(
                "A data file has no compressed clusters",
                qemu="error while writing at byte 0: Operation not supported",
                hint="leave out -c, or the data file",
                field="compress",
            )
        if self.copying.compress and given.get("preallocation") not in (None, "off"):
            raise OptionError(
                "Compression and preallocation not supported at the same time", field="compress"
            )

    def _check_bitmaps(self, target: type[Node] | None) -> None:
        """Bitmaps are wanted: the source must be able to have some, and what is made of it too."""
        if not self.copying.bitmaps:
            return
        if len(self.nodes) > 1:
            raise OptionError("Copying bitmaps only possible with single source", field="bitmaps")
        if not self.nodes[0].can_keep_bitmaps:
            raise UnsupportedError("Source lacks bitmap support", field="bitmaps")
        if not self.copying.skip_broken_bitmaps:
            from diskwright.operations.bitmap import require_copyable

            require_copyable(self.nodes[0])
        if target is not None and not target.keeps_bitmaps():
            raise _no_bitmaps(target.driver)

    def _copy_bitmaps(self, node: Node) -> None:
        """After all else, so that they know nothing of the copying itself."""
        from diskwright.block.notice import warn
        from diskwright.operations.bitmap import copy_bitmaps

        source, skip = self.nodes[0], self.copying.skip_broken_bitmaps
        for kept in reversed(source.dirty_bitmaps()) if skip else ():
            if kept.inconsistent:
                warn(f"Skipping inconsistent bitmap '{kept.name}'")
        copy_bitmaps(source, node, skip_broken=skip)

    def _fill(self, policy: Policy, made: list[Made], *, above: bool) -> Converted:
        target = self.target
        image = Image(target.name, format=target.format, cache=target.cache, policy=policy)
        with Unfinished(target.name, target.cache, made) as unfinished:
            with open_image(image, read_only=False, made=made) as node:
                unfinished.begin(node)
                is_zero = node.has_zero_init and not above
                zero_from = None if node.backing is None else disk_size(node.backing.node)
                source = self._source(above=above, zero_from=zero_from)
                copied = self._copy(source, node, is_zero=is_zero)
                return Converted(target.name, node.driver, node.size, copied)

    def _source(self, *, above: bool, zero_from: int | None = None) -> Source:
        """What is copied; `above`: only what the source has above its own backing file."""
        from diskwright.operations.source import Source

        return Source(self.nodes, depth=0 if above else None, zero_from=zero_from)

    def _copy(self, source: Source, node: Node, *, is_zero: bool) -> Copied:
        """Copy, and make it durable as far as the cache mode wants that."""
        from diskwright.operations.copy import copy

        if self.copying.compress and not node.encodes():
            raise UnsupportedError(_NO_COMPRESSION, field="compress")
        if self.copying.bitmaps and not node.can_keep_bitmaps:
            raise _no_bitmaps(node.driver)
        how = Copying(
            compress=self.copying.compress,
            sparse_bytes=self.copying.sparse_bytes,
            offload=self.copying.offload,
            salvage=self.copying.salvage,
            unmapped=self.copying.unmapped,
            target_is_zero=is_zero,
            in_order=self.copying.in_order,
        )
        copied = copy(source, node, how, self.steering)
        if self.copying.compress and node.encoder() is None:  # there was nothing to refuse
            raise UnsupportedError(f"{node.describe()} stores nothing compressed", field="compress")
        if self.copying.bitmaps:
            self._copy_bitmaps(node)
        node.flush()
        return copied


class Unfinished:
    """Takes the magic number out of a new image's file until all else is in it and it is closed.

    Only numbers that probing would find are taken out, so a format without one stays as it is.

    Args:
        name: of the image.
        cache: the mode in which the number is written back.
        made: the image's files.
    """

    def __init__(self, name: str, cache: str, made: Sequence[Made]) -> None:
        self._name = name
        self._cache = cache
        self._made = made
        self._taken: list[tuple[int, bytes]] = []

    def __enter__(self) -> Unfinished:
        return self

    def begin(self, node: Node) -> None:
        """Take it out; nothing but the caller uses the node."""
        from diskwright.block.probe import MAGICS

        child = node.children.get("file")
        if child is None or node.is_filter or not child.node.is_protocol:
            return
        with node.graph.request():
            node.before_write()
            for magic in MAGICS:
                there = child.read(magic.offset, len(magic.value))
                if there == magic.value and magic.driver == node.driver:
                    child.write(magic.offset, bytes(len(magic.value)))
                    self._taken.append((magic.offset, magic.value))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or not self._taken:
            return
        from diskwright.block import filename

        file = Image(filename.parse(self._name), cache=self._cache, shown=self._name)
        with open_image(file, read_only=False, made=self._made) as node:
            for offset, value in self._taken:
                node.write(offset, value)


def convert(
    source: Name | list[Name] | tuple[Name, ...],
    target: str | PathLike[str],
    *,
    source_format: str | None = None,
    target_format: str = DEFAULT_FORMAT,
    options: Mapping[str, object] | str | None = None,
    backing: str | PathLike[str] | None = None,
    backing_format: str | None = None,
    compress: bool = False,
    sparse: int | str = 4096,
    snapshot: str | None = None,
    existing: bool = False,
    salvage: Callable[[int, DiskwrightError], None] | None = None,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    progress: Callable[[int, int], None] | None = None,
    cancel: Flag | None = None,
    rate: int | str = 0,
    threads: int | None = None,
    cache: str = "unsafe",
    force_share: bool = False,
    policy: Policy | None = None,
) -> Converted:
    """Write what one image shows, or several one after the other, into another image.

    Args:
        source: a path, URI, "json:{…}" or a dict of options; or a list of them.
        target: a path, or `protocol:rest`. A file that is there is overwritten.
        source_format: the sources' driver; None probes.
        target_format: the target's.
        options: create options, a dict or QEMU's words ("cluster_size=1M").
        backing, backing_format: the new image's backing file: only what the source has above
            its own backing file is copied.
        compress: store compressed units.
        sparse: runs of zeroes at least this long are not stored; 0 stores all of them.
        snapshot: the id or name of an internal snapshot of the source.
        existing: write into an image that is there, with its size and options.
        salvage: called with (offset, error) for each sector that cannot be read, instead of
            giving up; it is replaced by zeroes.
        bitmaps: copy the source's dirty bitmaps too.
        skip_broken_bitmaps: leave inconsistent ones out, with a warning, instead of refusing.
        progress: called with (done, total) in bytes.
        cancel: a `threading.Event` or the like that ends the conversion.
        rate: bytes a second at most.
        threads: how many may work; None: as many as the work is good for.
        cache: the target's cache mode; with "unsafe" the system writes in its own time.
        force_share: read although another process may write to the source.
        policy: which files that the source and the backing file name may be opened.

    Raises:
        CancelledError: the flag was set; of a new target nothing is left. One that was there, and
            a device, is incomplete then: `path` of the error names it.
        DiskwrightError: something failed; the same.

    Example:
        >>> import diskwright
        >>> with open("disk.raw", "wb") as file:
        ...     written = file.write(b"a disk".ljust(1 << 20, b"."))
        >>> made = diskwright.convert(
        ...     "disk.raw", "disk.qcow2", target_format="qcow2", compress=True
        ... )
        >>> made.size, made.copied.data_bytes
        (1048576, 1048576)
        >>> diskwright.compare("disk.raw", "disk.qcow2").identical
        True
    """
    from diskwright.operations.create import options_of, size_of

    for field, given in (("salvage", salvage), ("progress", progress)):
        require(given is None or callable(given), field, "a function", given)
    require(snapshot is None or isinstance(snapshot, str), "snapshot", "an id or a name", snapshot)
    require(threads is None or isinstance(threads, int), "threads", "a number", threads)
    names = list(source) if isinstance(source, (list, tuple)) else [source]
    images = [
        Image(name, format=source_format, force_share=force_share, policy=policy) for name in names
    ]
    path = path_of(target)
    wanted = Target(
        path,
        format=target_format,
        options=options_of(options),
        backing=None if backing is None else path_of(backing),
        backing_format=backing_format,
        image=Image(path, format=target_format, cache=cache, policy=policy) if existing else None,
        cache=cache,
        policy=policy,
    )
    return convert_images(
        images,
        wanted,
        copying=Copying(
            compress=compress,
            sparse_bytes=size_of(sparse),
            salvage=salvage,
            bitmaps=bitmaps,
            skip_broken_bitmaps=skip_broken_bitmaps,
            in_order=True,
        ),
        steering=Steering(progress=progress, cancel=cancel, rate=size_of(rate), threads=threads),
        snapshot=snapshot,
    )
