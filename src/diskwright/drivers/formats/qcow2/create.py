"""Making a new qcow2 image: header, refcount table, refcount block, L1 table, in that order."""

from __future__ import annotations

import os
from array import array

from diskwright.block import filename
from diskwright.block.existing import parse_target
from diskwright.block.graph import Graph
from diskwright.block.limits import MAX_LENGTH
from diskwright.block.opener import open_image
from diskwright.block.options import whole
from diskwright.drivers.formats.qcow2.create_options import ENCRYPTION, refcount_width
from diskwright.drivers.formats.qcow2.extensions import Extensions
from diskwright.drivers.formats.qcow2.header import (
    COMPRESSION_NAMES,
    MAX_L1_BYTES,
    MAX_REFTABLE_BYTES,
    Autoclear,
    Compatible,
    Header,
    Incompatible,
)
from diskwright.errors import DiskwrightError, IOFailure, OptionError, Step, UnsupportedError

_V2_WORDS = ("0.10", "v2")

#: QEMU's names of drivers that a backing file may have, whether they are built here or not.
_DRIVERS = (
    "blkdebug blklogwrites blkverify bochs cloop compress copy-before-write copy-on-read dmg file "
    "ftp ftps gluster host_cdrom host_device http https io_uring iscsi iser luks nbd nfs "
    "null-aio null-co nvme nvme-io_uring parallels preallocate qcow qcow2 qed quorum raw rbd "
    "replication snapshot-access ssh throttle vdi vhdx virtio-blk-vfio-pci virtio-blk-vhost-user "
    "virtio-blk-vhost-vdpa vmdk vpc vvfat"
)

#: option, what QEMU calls it, its words
_WORDS = (
    ("compat", "version", ("1.1", "v3", *_V2_WORDS)),
    ("backing_fmt", "backing-fmt", tuple(_DRIVERS.split())),
    ("preallocation", "preallocation", ("off", "metadata", "falloc", "full")),
    ("compression_type", "compression-type", COMPRESSION_NAMES),
)

#: The longest write of zeroes.
_PIECE = 1 << 20

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener


def create(opener: Opener, size: int, options: dict[str, object]) -> None:
    """Write an image of `size` bytes, rounded up to a sector, to options["filename"].

    Raises:
        OptionError: an option's value is impossible, or impossible together with another.
        UnsupportedError: the option is for a feature that is not built.
    """
    header, extensions = _plan(size, options)
    layout = _Layout(header)
    if extensions.data_file is not None:
        extensions.data_file = _place_of_data(options)
    first = _pack(header, extensions)
    preallocation = str(options.get("preallocation") or "off")
    made = opener.make_file({"filename": options["filename"]})
    if extensions.data_file is not None:
        _make_data_file(opener, str(options["data_file"]), header.size, preallocation)
    with opener.open_made(made) as file:
        layout.write(file, first)
        file.flush()
    if preallocation == "off" and options.get("data_file_raw"):
        preallocation = "metadata"  # so that it reads the same as a raw image from the beginning
    if preallocation != "off":
        _preallocate(opener, options, preallocation)


def _pack(header: Header, extensions: Extensions) -> bytes:
    try:
        return extensions.pack(header)
    except DiskwrightError as error:
        form = extensions.backing_format
        how = f"with format '{form}'" if form else "to image"
        error.within(f"Could not assign backing file '{extensions.backing_file}' {how}")
        raise


def _place_of_data(options: dict[str, object]) -> str:
    """The data file's name as the image is to have it: a path where it is a file.

    Raises:
        OptionError: it is the image, which is there: in QEMU's words, and before it is emptied.
            One that is not there yet has its maker's lock by the time the data file is made.
    """
    if str(options["data_file"]).startswith("json:"):
        raise OptionError("Unknown protocol 'json'", field="data_file")
    specs = [parse_target(str(options[name])) for name in ("filename", "data_file")]
    places = [str(spec.get("filename", "")) for spec in specs]
    if all(map(os.path.exists, places)) and os.path.samefile(*places):
        raise OptionError(
            f"'{places[1]}' is the image itself",
            qemu='Failed to get shared "resize" lock\n'
            f"Is another process using the image [{places[1]}]?",
            field="data_file",
        )
    return places[1] or str(options["data_file"])


def _make_data_file(opener: Opener, name: str, size: int, preallocation: str) -> None:
    """Make the file for the guest's data, of zeroes."""
    mode = preallocation if preallocation in ("falloc", "full") else "off"
    with opener.create_file({"filename": name}) as file:
        if file.size >= size:
            return  # a device
        try:
            file.truncate(size, exact=False, preallocation=mode)
        except (IOFailure, UnsupportedError) as error:
            error.within("Could not resize image")
            raise


def _preallocate(opener: Opener, options: dict[str, object], mode: str) -> None:
    from diskwright.drivers.formats.qcow2.driver import Qcow2
    from diskwright.drivers.formats.qcow2.resize import preallocate

    inner = opener.derive(read_only=False, graph=Graph(), follow_backing=False)
    spec: dict[str, object] = {
        "driver": "qcow2",
        "file": filename.parse(str(options["filename"])),
    }
    if options.get("data_file") is not None:
        spec["data-file"] = filename.parse(str(options["data_file"]))
    with open_image(inner, spec) as node:
        assert isinstance(node, Qcow2)
        node.before_write()
        try:
            preallocate(node, 0, node.size, mode)
        except BaseException as error:
            # What is on the disk is an image without what was to be reserved, and most often it
            # goes too: nobody wants to wait until the tables are written.
            node.break_off("its space could not be reserved")
            if isinstance(error, (IOFailure, UnsupportedError)):
                error.within("Could not resize image")
            raise


def _plan(size: int, options: dict[str, object]) -> tuple[Header, Extensions]:
    """The header and extensions for these options, before the places are known."""
    _check_words(options)
    given = options.get("cluster_size")
    cluster = 65536 if given is None else whole(given)
    version = 2 if options.get("compat") in _V2_WORDS else 3
    _check_clusters(options, version, cluster)
    _check_backing(options)
    header = Header(
        version=version, cluster_bits=cluster.bit_length() - 1, size=-(-size // 512) * 512
    )
    _plan_features(header, options)
    extensions = Extensions()
    if options.get("data_file") is not None:
        extensions.data_file = str(options["data_file"])
    # QEMU leaves the table out where it would fill much of the cluster.
    extensions.names_features = cluster > 4096
    backing = options.get("backing_file")
    if backing:
        extensions.backing_file = str(backing)
        form = options.get("backing_fmt")
        extensions.backing_format = str(form) if form else None
    return header, extensions


def _check_words(options: dict[str, object]) -> None:
    """Refuse words that are none of the choices, in the order in which QEMU looks at them."""
    for name, shown, words in _WORDS:
        value = options.get(name)
        if value is not None and value not in words:
            raise OptionError(
                f"Parameter '{shown}' does not accept value '{value}'",
                field=name,
                hint=f"{name} is one of: {', '.join(words)}",
            )


def _check_clusters(options: dict[str, object], version: int, cluster: int) -> None:
    if options.get("extended_l2") and version < 3:
        raise _too_old("Extended L2 entries are", "extended_l2")
    if cluster & (cluster - 1) or not 512 <= cluster <= 2 << 20:
        raise OptionError(
            "Cluster size must be a power of two between 512 and 2048k", field="cluster_size"
        )
    if options.get("extended_l2") and cluster < 1 << 14:
        raise OptionError(
            "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            field="extended_l2",
        )
    for option in ENCRYPTION:
        if options.get(option.name):
            raise UnsupportedError(
                f"The qcow2 option '{option.name}' is not supported yet", field=option.name
            )


def _check_backing(options: dict[str, object]) -> None:
    preallocated = options.get("preallocation") not in (None, "off")
    if options.get("backing_file") and preallocated and not options.get("extended_l2"):
        raise OptionError(
            "Backing file and preallocation can only be used at the same time if extended_l2 is on",
            field="preallocation",
        )
    if options.get("backing_fmt") and not options.get("backing_file"):
        raise OptionError("Backing format cannot be used without backing file", field="backing_fmt")


def _check_data_file(options: dict[str, object], version: int) -> None:
    raw = options.get("data_file_raw")
    if options.get("data_file") is None:
        if raw:
            raise OptionError("data-file-raw requires data-file", field="data_file_raw")
        return
    if version < 3:
        raise _too_old("External data files are", "data_file")
    if raw and options.get("backing_file"):
        raise OptionError(
            "Backing file and data-file-raw cannot be used at the same time", field="data_file_raw"
        )


def _too_old(what: str, field: str) -> OptionError:
    return OptionError(
        f"{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)",
        field=field,
    )


def _plan_features(header: Header, options: dict[str, object]) -> None:
    """Set the header's features, and refuse what is amiss in the order in which QEMU does."""
    if options.get("lazy_refcounts"):
        if header.version < 3:
            raise _too_old("Lazy refcounts", "lazy_refcounts")
        header.compatible_features |= Compatible.LAZY_REFCOUNTS
    given = options.get("refcount_bits")
    bits = 16 if given is None else whole(given)
    refcount_width(bits, version=header.version, newer="version=v3")
    _check_data_file(options, header.version)
    if options.get("extended_l2"):
        header.incompatible_features |= Incompatible.EXTENDED_L2
    if options.get("data_file") is not None:
        header.incompatible_features |= Incompatible.DATA_FILE
        if options.get("data_file_raw"):
            header.autoclear_features |= Autoclear.RAW_DATA_FILE
    header.refcount_order = bits.bit_length() - 1
    header.compression_type = COMPRESSION_NAMES.index(
        str(options.get("compression_type") or "zlib")
    )
    if header.compression_type:
        if header.version < 3:
            raise _too_old("Non-zlib compression type is", "compression_type")
        header.incompatible_features |= Incompatible.COMPRESSION


def _check_size(size: int, l1_bytes: int) -> None:
    if size >= 1 << 63:
        raise OptionError(
            f"{size} bytes are too many for a disk",
            qemu="Could not resize image: Image size cannot be negative",
            field="size",
        )
    if size > MAX_LENGTH:
        raise OptionError(
            f"Could not resize image: offset({size}) exceeds maximum({MAX_LENGTH})", field="size"
        )
    if l1_bytes > MAX_L1_BYTES:
        raise OptionError(
            f"{size} bytes need an L1 table of {l1_bytes} bytes, {MAX_L1_BYTES} are possible",
            kind="too-large",
            qemu="Could not resize image: Failed to grow the L1 table: File too large",
            hint="an image with larger clusters can be longer",
            field="size",
        )


class _Layout:
    """Where the first tables lie, as QEMU has them.

    Header, refcount table and first refcount block, then the L1 table, then more refcount
    blocks if the L1 table is that long.
    """

    def __init__(self, header: Header) -> None:
        self.header = header
        cluster = header.cluster_size
        l1_entries = -(-header.size >> header.l1_shift)
        _check_size(header.size, l1_entries * 8)
        l1_clusters = -(-l1_entries * 8 // cluster)
        per_block = cluster * 8 // header.refcount_bits
        table_clusters = blocks = 1
        while True:
            total = 1 + table_clusters + blocks + l1_clusters
            if blocks * per_block < total:
                blocks += 1
            elif table_clusters * cluster // 8 < blocks:
                table_clusters += 1
            else:
                break
        if table_clusters * cluster > MAX_REFTABLE_BYTES:
            raise OptionError("The refcount table would be too large", field="size")
        self.total = total
        header.refcount_table_offset = cluster
        header.refcount_table_clusters = table_clusters
        header.l1_size = l1_entries
        l1 = 2 + table_clusters
        header.l1_table_offset = l1 * cluster if l1_entries else 0
        self.table_bytes = table_clusters * cluster
        self.l1_bytes = l1_entries * 8
        #: in clusters
        self.blocks = [1 + table_clusters, *range(l1 + l1_clusters, l1 + l1_clusters + blocks - 1)]

    def write(self, file: object, first: bytes) -> None:
        """Write all of it to an empty file; `first`, what the header's cluster holds, last."""
        from diskwright.block.node import Node

        assert isinstance(file, Node)
        header, cluster = self.header, self.header.cluster_size
        table = array("Q", bytes(self.table_bytes))
        for number, place in enumerate(self.blocks):
            table[number] = place * cluster
        table.byteswap()
        end = header.l1_table_offset + self.l1_bytes
        file.truncate(max(end, (self.blocks[-1] + 1) * cluster), exact=False)
        counts = self._counts()
        with Step("Could not write qcow2 header"):
            file.write(0, bytes(cluster))  # whole: others take holes for lost space
        with Step("Could not write refcount table"):
            file.write(header.refcount_table_offset, memoryview(table).cast("B"))
            file.write(self.blocks[0] * cluster, counts[:cluster])
        with Step("Could not resize image: Failed to grow the L1 table"):
            for start in range(0, self.l1_bytes, _PIECE):
                zeroes = bytes(min(_PIECE, self.l1_bytes - start))
                file.write(header.l1_table_offset + start, zeroes)
            for number, place in enumerate(self.blocks[1:], 1):
                file.write(place * cluster, counts[number * cluster : (number + 1) * cluster])
        file.write(0, first)

    def _counts(self) -> bytes:
        """The refcount blocks with ones for all clusters in use."""
        bits = self.header.refcount_bits
        length = len(self.blocks) * self.header.cluster_size
        if bits >= 8:
            one = (1).to_bytes(bits // 8, "big")
            return (one * self.total).ljust(length, b"\0")
        per_byte = 8 // bits
        full = sum(1 << (bits * at) for at in range(per_byte))
        rest = self.total % per_byte
        last = sum(1 << (bits * at) for at in range(rest))
        return (bytes([full]) * (self.total // per_byte) + bytes([last])).ljust(length, b"\0")
