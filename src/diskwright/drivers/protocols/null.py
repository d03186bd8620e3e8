"""A disk that is not there: reads cost nothing, writes go nowhere.

For measuring what is above it. `read-zeroes` makes it say that it reads as zero. It does so
without, too: what was in a buffer before is nobody's business, though QEMU leaves it there.
"""

from __future__ import annotations

from diskwright.block import requests
from diskwright.block.extent import DATA, ZERO, Extent
from diskwright.block.info import NodeInfo
from diskwright.block.node import Node
from diskwright.block.options import Option, Options, whole
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener


class NullCo(Node):
    """`null-co://`, or the driver null-co with a size."""

    driver = "null-co"
    is_protocol = True
    options = Options(
        Option("size", "size", 1 << 30, "size of the null block", strong=True),
        Option("latency-ns", "int", 0, "nanoseconds that every request takes"),
        Option("read-zeroes", "bool", False, "return zeroes when read", strong=True),
    )

    _latency_seconds = 0.0
    _reads_zero = False

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self.filename = f"{self.driver}://"
        self.size = whole(options["size"])
        latency = whole(options["latency-ns"])
        if not 0 <= latency < 1 << 63:
            raise OptionError("latency-ns is invalid", field="latency-ns")
        self._latency_seconds = latency / 1e9
        self._reads_zero = bool(options["read-zeroes"])

    @classmethod
    def parse_filename(cls, name: str) -> dict[str, object]:
        """Nothing follows the scheme."""
        if name != f"{cls.driver}://":
            raise OptionError(
                f"The only allowed filename for this driver is '{cls.driver}://'", field="filename"
            )
        return {}

    def _wait(self) -> None:
        if self._latency_seconds:
            import time

            time.sleep(self._latency_seconds)

    def _read_into(self, offset: int, view: memoryview) -> None:
        self._wait()
        requests.fill_zero(view)

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        self._wait()

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._wait()

    def _discard(self, offset: int, length: int) -> None:
        self._wait()

    def _flush(self) -> None:
        self._wait()

    def _info(self) -> NodeInfo:
        return NodeInfo(self.driver, self.size, dirty=None)  # QEMU's tools say nothing of it

    @property
    def allocated_size(self) -> int:
        """Nothing is stored."""
        return 0

    def _extents(self, offset: int, length: int) -> list[Extent]:
        if self._reads_zero:
            return [Extent(offset, length, ZERO, host_offset=offset)]
        return [Extent(offset, length, DATA, allocated=False)]  # readable, but stored nowhere


class NullAio(NullCo):
    """The same under QEMU's other name."""

    driver = "null-aio"
