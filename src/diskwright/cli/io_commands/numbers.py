"""Numbers of `diskwright-io`: how they are read, and how results show them."""

from __future__ import annotations

from diskwright.cli.io_commands.declaration import Refused

#: The longest request: whole sectors in a signed number of 32 bits.
MAX_LENGTH = (1 << 31) - 512
SECTOR = 512

_UNITS = ("", "K", "M", "G", "T", "P", "E")


def parse_number(text: str) -> int:
    """A size or an offset, with a suffix.

    Raises:
        Refused: it is none.
    """
    from diskwright.block.options import SizeRangeError, parse_size

    try:
        found = parse_size(text)
    except SizeRangeError:
        found = -1
    except ValueError:
        raise Refused(
            "Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- " + text
        ) from None
    if not 0 <= found < 1 << 63:
        raise Refused(f"Parsing error: argument too large -- {text}")
    return found


def parse_pattern(text: str) -> int:
    """A byte.

    Raises:
        Refused: it is none.
    """
    from diskwright.block.options import parse_int

    found = parse_int(text)
    if found is None or not 0 <= found <= 0xFF:
        raise Refused(f"{text} is not a valid pattern byte")
    return found


def parse_plain(text: str) -> int:
    """A number without a suffix.

    Raises:
        Refused: it is none.
    """
    from diskwright.block.options import parse_int

    found = parse_int(text)
    if found is None:
        raise Refused(f"{text} is not a valid number")
    return found


def require_sectors(number: int, name: str) -> None:
    """Refuse what is not whole sectors."""
    if number % SECTOR:
        raise Refused(f"{number} is not a sector-aligned value for '{name}'")


def size_text(value: float) -> str:
    """Bytes with a unit: "64 KiB", "1.500 KiB", "0 bytes"."""
    unit = 0
    while unit + 1 < len(_UNITS) and value >= 1 << 10 * (unit + 1):
        unit += 1
    if not unit:
        return f"{value:f}".removesuffix(".000000") + " bytes"
    return f"{value / (1 << 10 * unit):.3f}".removesuffix(".000") + f" {_UNITS[unit]}iB"


def time_text(seconds: float, *, fixed: bool = False) -> str:
    """The time as "00.01 sec", or from a second on as "1:02:03.04"; always that with `fixed`."""
    hundredths = int(seconds * 100)
    whole, part = divmod(hundredths, 100)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if fixed or whole:
        return f"{hours}:{minutes:02d}:{rest:02d}.{part:02d}"
    return f"{rest:02d}.{part:02d} sec"


def report_text(
    done: str, seconds: float, *, offset: int, length: int, total: int, machine: bool
) -> str:
    """The lines about a request that was carried out.

    Args:
        done: "read", "wrote", "discard".
        seconds: how long it took.
        offset: where it began.
        length: bytes asked for.
        total: bytes done.
        machine: one line for programs.
    """
    seconds = max(seconds, 1e-9)
    rate, operations = total / seconds, 1 / seconds
    if machine:
        clock = time_text(seconds, fixed=True)
        return f"{total},1,{clock},{rate:.3f},{operations:.3f}\n"
    return (
        f"{done} {total}/{length} bytes at offset {offset}\n"
        f"{size_text(total)}, 1 ops; {time_text(seconds)} "
        f"({size_text(rate)}/sec and {operations:.4f} ops/sec)\n"
    )


def dump_lines(data: bytes | bytearray | memoryview, offset: int) -> str:
    """The bytes in hexadecimal and as letters, sixteen a line."""
    lines = []
    for start in range(0, len(data), 16):
        row = bytes(data[start : start + 16])
        letters = "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else "." for byte in row)
        cells = "".join(f"{byte:02x} " for byte in row)
        lines.append(f"{offset + start:08x}:  {cells} {letters}\n")
    return "".join(lines)
