"""`check`: is an image consistent, and can it be repaired."""

from __future__ import annotations

from diskwright.block.info import Repair
from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.cli.images import image_of, open_to_write
from diskwright.errors import DiskwrightError, strerror_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.operations.check import CheckReport

CLEAN, FAILED, CORRUPT, LEAKED, NO_CHECK = 0, 1, 2, 3, 63


def _repair_of(value: str) -> str:
    if value not in ("leaks", "all"):
        raise Misused(f"--repair (-r) expects 'leaks' or 'all' not '{value}'")
    return value


def run(arguments: Arguments) -> int:
    """Check an image; the exit code says what was found."""
    name = flags.only_operand(arguments)
    cache = flags.cache_of(arguments, "cache", source=True)
    flags.exclude_format(arguments)
    from diskwright.operations.check import check_node
    from diskwright.operations.opening import open_image

    repair = {None: Repair.NONE, "leaks": Repair.LEAKS, "all": Repair.ALL}[arguments.text("repair")]
    image = image_of(arguments, name, format=arguments.text("format"), cache=cache)
    image.checks = True
    with open_image(image) if repair == Repair.NONE else open_to_write(image) as node:
        if node.check_beyond_qemu and not arguments.friendly:
            return _no_check(arguments)
        try:
            report = check_node(node, repair=repair, report=output.complain)
        except DiskwrightError as error:
            if error.kind == "no-check":
                return _no_check(arguments)
            error.qemu = f"Check failed: {strerror_of(error)}"
            raise
    if arguments.flag("quiet"):
        pass
    elif arguments.text("output") == "json":
        _print_json(name, report)
    else:
        _print_text(report)
    if report.result.check_errors:
        output.complain(f"{arguments.program}: Check failed")
    return _code_of(report)


def _no_check(arguments: Arguments) -> int:
    output.complain(f"{arguments.program}: This image format does not support checks")
    return NO_CHECK


def _print_json(name: str, report: CheckReport) -> None:
    from diskwright.cli import json_output

    members = json_output.check_members(
        name,
        report.format,
        report.result,
        fixed=(report.leaks_fixed, report.corruptions_fixed),
    )
    output.say(json_output.dumps(members) + "\n")


def _print_text(report: CheckReport) -> None:
    from diskwright.cli import text

    if report.leaks_fixed or report.corruptions_fixed:
        output.say_lines(text.repair_lines(report.leaks_fixed, report.corruptions_fixed))
    output.say_lines(text.check_lines(report.result))


def _code_of(report: CheckReport) -> int:
    result = report.result
    if result.check_errors:
        return FAILED
    if result.corruptions:
        return CORRUPT
    return LEAKED if result.leaks else CLEAN


COMMAND = Command(
    "check",
    "Check that an image is consistent, and repair it",
    operands="FILENAME",
    flags=(
        flags.HELP,
        flags.QUIET,
        *flags.IMAGE,
        Flag("T", "cache", "CACHE", "cache mode of the image"),
        flags.SHARE,
        flags.OUTPUT,
        Flag(
            "r",
            "repair",
            "leaks|all",
            "give back space that nothing uses, or mend all",
            parse=_repair_of,
        ),
        flags.OBJECT,
    ),
    run=run,
    notes="Exit codes: 0 nothing is wrong, 1 the check failed, 2 the image is corrupt,\n"
    "3 there are leaks but nothing worse, 63 the format has no check.",
)
