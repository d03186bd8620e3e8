"""What `create` and `amend` know of qcow2. Names, types and bounds are those of QEMU's tools."""

from __future__ import annotations

from diskwright.block.options import Option, Options
from diskwright.drivers.formats.qcow2.header import COMPRESSION_NAMES
from diskwright.errors import OptionError

#: Options of `create` that are known and refused: encryption is not built yet.
ENCRYPTION = Options(
    Option("encryption", "bool", None, "Old way to ask for encrypt.format=aes"),
    Option("encrypt.format", "str", None, "How the image is encrypted: 'aes' or 'luks'"),
    Option("encrypt.key-secret", "str", None, "Id of the secret that opens the image"),
    *(
        Option(f"encrypt.{name}", "str", None, f"LUKS: {text}")
        for name, text in (
            ("cipher-alg", "cipher"),
            ("cipher-mode", "mode of the cipher"),
            ("ivgen-alg", "how initialisation vectors are made"),
            ("ivgen-hash-alg", "hash for making them"),
            ("hash-alg", "hash for the key slots"),
        )
    ),
    Option("encrypt.iter-time", "int", None, "LUKS: how long a guess takes", unit="milliseconds"),
)


#: What `amend` knows; of encryption, which is not built yet, it says that there is none.
AMEND = Options(
    Option("backing_file", "str", None, "File name of a base image"),
    Option("backing_fmt", "str", None, "Image format of the base image"),
    Option("compat", "str", None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("data_file", "str", None, "File name of an external data file"),
    Option("data_file_raw", "bool", None, "The external data file must stay valid as a raw image"),
    Option("encrypt.iter-time", "int", None, "LUKS: how long a guess takes", unit="milliseconds"),
    Option("encrypt.keyslot", "int", None, "LUKS: the key slot to change"),
    Option("encrypt.new-secret", "str", None, 'LUKS: secret to set; "" erases'),
    Option("encrypt.old-secret", "str", None, "LUKS: key slots with this secret"),
    Option("encrypt.state", "str", None, "LUKS: 'active' or 'inactive'"),
    Option("lazy_refcounts", "bool", None, "Postpone refcount updates"),
    Option("refcount_bits", "int", None, "Width of a reference count entry in bits"),
    Option("size", "size", None, "Virtual disk size"),
)

#: What `create` knows.
CREATE = ENCRYPTION + Options(
    Option("cluster_size", "size", 65536, "qcow2 cluster size"),
    Option("extended_l2", "bool", False, "Extended L2 tables"),
    Option(
        "preallocation",
        "str",  # QEMU looks at the words after it announced them
        None,
        "Preallocation mode (allowed values: off, metadata, falloc, full)",
        choices=("off", "metadata", "falloc", "full"),
    ),
    Option(
        "compression_type",
        "str",
        "zlib",
        "Compression method used for image cluster compression",
        choices=COMPRESSION_NAMES,
    ),
    Option("size", "size", None, "Virtual disk size"),
    Option("compat", "str", None, "Compatibility level (v2 [0.10] or v3 [1.1])"),
    Option("backing_file", "str", None, "File name of a base image"),
    Option("backing_fmt", "str", None, "Image format of the base image"),
    Option("data_file", "str", None, "File name of an external data file"),
    Option("data_file_raw", "bool", None, "The external data file must stay valid as a raw image"),
    Option("lazy_refcounts", "bool", False, "Postpone refcount updates"),
    Option("refcount_bits", "int", 16, "Width of a reference count entry in bits"),
)


def refcount_width(bits: int, *, version: int = 3, newer: str = "") -> int:
    """The option `refcount_bits`, in bits, where an image of that version can have it.

    Args:
        bits: what was asked for.
        version: of the image; before 3 there is one width.
        newer: how the caller's QEMU command names a newer version.

    Raises:
        OptionError: it is no such width, in QEMU's words.
    """
    if bits & (bits - 1) or not 1 <= bits <= 64:
        raise OptionError(
            "Refcount width must be a power of two and may not exceed 64 bits",
            field="refcount_bits",
        )
    if version < 3 and bits != 16:
        raise OptionError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            f"(use {newer} or greater)",
            field="refcount_bits",
        )
    return bits
