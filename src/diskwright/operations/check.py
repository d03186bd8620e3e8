"""Is an image's metadata consistent, and if not, can it be repaired."""

from __future__ import annotations

from diskwright.block.cancel import cancellable
from diskwright.block.info import CheckResult, Repair
from diskwright.block.record import Record
from diskwright.errors import OptionError, UnsupportedError
from diskwright.operations.opening import Image, open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.block.cancel import Flag
    from diskwright.block.node import Node
    from diskwright.block.policy import Policy
    from diskwright.operations.opening import Name

REPAIRS = {"leaks": Repair.LEAKS, "all": Repair.ALL}


class CheckReport(Record):
    """What a check found and did.

    Attributes:
        name, format: of the image.
        result: the counts as the image is now (`diskwright.block.info.CheckResult`).
        corruptions_fixed, leaks_fixed: what a repair did away with.
        lines: what was found, in QEMU's words, one after the other.
    """

    __slots__ = ("corruptions_fixed", "format", "leaks_fixed", "lines", "name", "result")

    def __init__(self, name: str, format: str, result: CheckResult, lines: list[str]) -> None:
        self.name = name
        self.format = format
        self.result = result
        self.lines = lines
        self.corruptions_fixed = result.corruptions_fixed
        self.leaks_fixed = result.leaks_fixed

    @property
    def corruptions(self) -> int:
        """How many errors of the metadata there are (now)."""
        return self.result.corruptions

    @property
    def leaks(self) -> int:
        """How many clusters nothing uses (now)."""
        return self.result.leaks

    @property
    def clean(self) -> bool:
        """Whether nothing is wrong (any more)."""
        return self.result.clean


def check_node(
    node: Node, *, repair: int = Repair.NONE, report: Callable[[str], None] | None = None
) -> CheckReport:
    """Check a node that is open; what a repair changed is checked once more.

    Args:
        node: writable, if there is to be a repair.
        repair: what may be changed.
        report: gets each line at once.

    Raises:
        UnsupportedError: the format has nothing to check, or cannot be repaired.
    """
    lines: list[str] = []

    def note(line: str) -> None:
        lines.append(line)
        if report is not None:
            report(line)

    if not node.can_check:
        raise UnsupportedError("This image format does not support checks", kind="no-check")
    result = node.check(repair, note)
    found = CheckReport(node.filename, node.driver, result, lines)
    if result.corruptions_fixed or result.leaks_fixed:
        found.result = node.check(Repair.NONE, note)
    return found


def check(
    name: Name,
    *,
    format: str | None = None,
    repair: str | None = None,
    force_share: bool = False,
    policy: Policy | None = None,
    cancel: Flag | None = None,
) -> CheckReport:
    """Count what is inconsistent in an image's metadata, and repair it if asked.

    Args:
        name, format, force_share, policy: as for `diskwright.info`.
        repair: "leaks" gives back space that nothing uses, "all" mends corruptions too.
        cancel: a `threading.Event` or the like that ends it; what a repair
            did not come to stays as it was.

    Raises:
        UnsupportedError: the format has nothing to check.
        CancelledError: the flag was set.

    Example:
        >>> import diskwright
        >>> made = diskwright.create("checked.qcow2", "1M", format="qcow2")
        >>> report = diskwright.check("checked.qcow2")
        >>> report.clean, report.corruptions, report.leaks
        (True, 0, 0)
    """
    if repair is not None and repair not in REPAIRS:
        raise OptionError(
            f"'{repair}' is not a kind of repair", field="repair", hint="leaks or all"
        )
    wanted = REPAIRS[repair] if repair is not None else Repair.NONE
    image = Image(name, format=format, force_share=force_share, policy=policy)
    image.checks = True
    with cancellable(cancel), open_image(image, read_only=wanted == Repair.NONE) as node:
        return check_node(node, repair=wanted)
