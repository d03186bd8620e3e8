"""copy-on-read: what is read from the backing file below is kept in the overlay.

Source: the QMP reference, BlockdevOptionsCor.
"""

from __future__ import annotations

from diskwright.block.filter import Filter
from diskwright.block.options import Option, Options
from diskwright.errors import OptionError, ReadOnlyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener


class CopyOnRead(Filter):
    """Reads bring up what lies in the backing file of the node below."""

    driver = "copy-on-read"
    options = Options(
        Option("bottom", help="copy only what lies above the node with this name", strong=True),
    )

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        if options["bottom"]:
            raise OptionError(f"Bottom node '{options['bottom']}' not found", field="bottom")
        if self.read_only:
            raise ReadOnlyError(
                "Nothing can be kept in an image that is open read-only",
                qemu="Block node is read-only",
            )
        self._open_below(opener, options)
        self.copy_on_read = True
