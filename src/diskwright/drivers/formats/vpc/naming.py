"""What a differencing VHD says of its parent: who it is, and its names for two platforms."""

from __future__ import annotations

import os

from diskwright.block.record import Record
from diskwright.drivers.formats.vpc.header import EPOCH, SECTOR, DynamicHeader, Locator
from diskwright.errors import OptionError

#: UTF-16 units of the parent's name in the header, the zero that ends it included.
_NAME_UNITS = 256


class Naming(Record):
    """The parent of an image, and what it is called from there.

    Args:
        image: the image's path.
        path: the parent's.
        identifier: the parent's.
        size: of its disk, in bytes.

    Raises:
        OptionError: the name is too long for the format.
    """

    __slots__ = ("identifier", "locators", "own", "size", "timestamp")

    def __init__(self, image: str, path: str, identifier: bytes, size: int) -> None:
        self.size = size
        self.identifier = identifier
        self.timestamp = max(int(os.stat(path).st_mtime) - EPOCH, 0) & 0xFFFFFFFF
        absolute = os.path.abspath(path)
        self.own = os.path.basename(absolute).encode("utf-16-be", "surrogatepass")
        if len(self.own) >= _NAME_UNITS * 2:
            raise OptionError("The parent's name is too long for a VHD", field="backing")
        relative = os.path.relpath(absolute, os.path.dirname(os.path.abspath(image)))
        # the one path style that Windows, libvhdi and we read
        relative = relative.replace(os.sep, "\\")
        if not relative.startswith("..\\"):
            relative = f".\\{relative}"
        self.locators = [
            (code, text.encode("utf-16-le", "surrogatepass"))
            for code, text in ((b"W2ru", relative), (b"W2ku", absolute))
        ]

    @property
    def space(self) -> int:
        """Bytes that the names need outside of the header."""
        return sum(_sectors(raw) for _, raw in self.locators)

    def name_in(self, dynamic: DynamicHeader, offset: int) -> list[tuple[int, bytes]]:
        """Put the parent into a header; returns what is to be written, and where.

        Args:
            dynamic: the header.
            offset: where in the file `space` bytes are free.
        """
        dynamic.parent_id = self.identifier
        dynamic.parent_timestamp = self.timestamp
        dynamic.parent_name = self.own.ljust(_NAME_UNITS * 2, b"\0")
        pieces: list[tuple[int, bytes]] = []
        for at in range(len(dynamic.locators)):
            if at >= len(self.locators):
                dynamic.locators[at] = Locator(b"\0\0\0\0", 0, 0)
                continue
            code, raw = self.locators[at]
            dynamic.locators[at] = Locator(code, _sectors(raw), len(raw), 0, offset)
            pieces.append((offset, raw))
            offset += _sectors(raw)
        return pieces


def _sectors(raw: bytes) -> int:
    return -(-len(raw) // SECTOR) * SECTOR


def not_a_file(name: str) -> OptionError:
    """The error for a parent that has no path."""
    return OptionError(f"A VHD can name a file as its parent, not '{name}'", field="backing")
