"""The numbers of the protocol, and the longest things that either side takes.

Source: NetworkBlockDevice/nbd, doc/proto.md, "Values".
"""

from __future__ import annotations

#: Handshake: what a server begins with, and what every option and its reply begins with.
HELLO = 0x4E42444D41474943  # "NBDMAGIC"
OPTION_MAGIC = 0x49484156454F5054  # "IHAVEOPT"
OLDSTYLE_MAGIC = 0x00420281861253
REPLY_MAGIC = 0x3E889045565A9

#: Transmission: what requests and replies begin with.
REQUEST_MAGIC = 0x25609513
EXTENDED_REQUEST_MAGIC = 0x21E41C71
SIMPLE_REPLY_MAGIC = 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REPLY_MAGIC = 0x6E8A278C

#: Bytes of zero after the answer to EXPORT_NAME, unless both sides do without.
PADDING = 124

#: The longest name, description or query, and data of an option that a server looks at.
MAX_STRING = 4096
MAX_OPTION = 16 * MAX_STRING
#: A peer that announces more than this in the handshake is not listened to any longer.
MAX_SKIPPED = 32 << 20
#: The longest payload of a request or of a chunk.
MAX_PAYLOAD = 32 << 20
#: Queries, contexts and information requests in one option.
MAX_ITEMS = 1024


class Handshake:
    """Flags before the options: the server's and the client's have the same numbers."""

    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option:
    """What a client asks for in the handshake."""

    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10
    EXTENDED_HEADERS = 11


class Answer:
    """Kinds of replies to options; those from ERROR on refuse."""

    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERROR = 1 << 31
    UNSUPPORTED = ERROR | 1
    POLICY = ERROR | 2
    INVALID = ERROR | 3
    PLATFORM = ERROR | 4
    TLS_REQUIRED = ERROR | 5
    UNKNOWN = ERROR | 6
    SHUTDOWN = ERROR | 7
    BLOCK_SIZE_REQUIRED = ERROR | 8
    TOO_BIG = ERROR | 9
    EXTENDED_REQUIRED = ERROR | 10
    EXTENDED_HEADERS_REQUIRED = ERROR | 10


class Info:
    """Kinds of information about an export."""

    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class Transmission:
    """Flags of an export."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


class Command:
    """Requests."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7
    RESIZE = 8


class Flag:
    """Flags of a request."""

    FUA = 1 << 0
    NO_HOLE = 1 << 1
    DF = 1 << 2
    REQ_ONE = 1 << 3
    FAST_ZERO = 1 << 4
    PAYLOAD_LEN = 1 << 5


class Chunk:
    """Kinds of structured and extended replies; those from ERROR on report one."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    BLOCK_STATUS_EXT = 6
    ERROR = (1 << 15) | 1
    ERROR_OFFSET = (1 << 15) | 2

    #: the flag of the last chunk, and the bit of every kind of error
    DONE = 1
    IS_ERROR = 1 << 15


class Error:
    """Numbers of errors; they are those of Linux, wherever a side runs."""

    EPERM = 1
    EIO = 5
    ENOMEM = 12
    EINVAL = 22
    ENOSPC = 28
    EOVERFLOW = 75
    ENOTSUP = 95
    ESHUTDOWN = 108


class Allocation:
    """Bits of `base:allocation`."""

    HOLE = 1
    ZERO = 2


#: Contexts that a block status may be about.
BASE_ALLOCATION = "base:allocation"
ALLOCATION_DEPTH = "qemu:allocation-depth"
DIRTY_BITMAP = "qemu:dirty-bitmap:"


def names_of(owner: type) -> dict[int, str]:
    """number -> name of a class above, for messages."""
    return {number: name for name, number in vars(owner).items() if name.isupper()}
