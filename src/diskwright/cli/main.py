"""`diskwright`: the same commands, careful with strangers' images, and our own."""

from __future__ import annotations

from diskwright.cli.start import begin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    return begin("diskwright", argv)


if __name__ == "__main__":
    import sys

    sys.exit(main())
