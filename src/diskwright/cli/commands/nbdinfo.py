"""`nbdinfo`: what an NBD server serves, and what it can do; no disk is opened."""

from __future__ import annotations

from diskwright.cli import flags, output
from diskwright.cli.grammar import Arguments, Command, Flag, Misused
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from diskwright.drivers.protocols.nbd.address import Address
    from diskwright.drivers.protocols.nbd.security import Security

#: The exit code of --can and --is where it cannot, or is not.
_NO = 2


def run(arguments: Arguments) -> int:
    """Ask a server, and print its answers."""
    if len(arguments.operands) != 1:
        raise Misused("Expecting one URI of an NBD server")
    asked = [name for name in ("list", "map", "size", "can") if arguments.flag(name)]
    if len(asked) > 1:
        raise Misused(f"--{asked[0]} and --{asked[1]} exclude each other")
    if arguments.flag("totals") and not arguments.flag("map"):
        raise Misused("--totals needs --map")
    where, security = _server(arguments)
    if arguments.flag("map"):
        return _map(arguments, where, security)
    if arguments.flag("can"):
        return _can(arguments, where, security)
    from diskwright.drivers.protocols.nbd.survey import list_exports, look_at_export

    look = list_exports if arguments.flag("list") else look_at_export
    found = look(where, security)
    if arguments.flag("size"):
        output.say(f"{found.exports[0].size}\n")
        return 0
    from diskwright.cli import nbd_text

    if _wants_json(arguments):
        _say_json(nbd_text.members(found, where))
    else:
        _say(nbd_text.info_lines(found, where))
    return 0


def _server(arguments: Arguments) -> tuple[Address, Security | None]:
    """Whom to ask, and how to encrypt what is said."""
    from diskwright.block.filename import parse
    from diskwright.drivers.protocols.nbd import address, driver, security

    options = parse(arguments.operands[0])
    if options.pop("driver") != "nbd":
        raise OptionError(
            f"'{arguments.operands[0]}' is no URI of an NBD server",
            hint="it is nbd://HOST[:PORT]/[EXPORT] or nbd+unix:///[EXPORT]?socket=PATH",
        )
    for name in ("tls-creds", "tls-hostname"):
        if arguments.flag(name):
            options[name] = arguments.text(name)
    valid = driver.Nbd.options.validate(options)
    where = address.from_options(valid)
    how = security.from_options(valid, where)
    if how is not None and where.tls is None:
        where.tls = {}  # it is shown as such
    return where, how


def _map(arguments: Arguments, where: Address, security: Security | None) -> int:
    from diskwright.cli import nbd_text
    from diskwright.drivers.protocols.nbd.survey import runs_of_export
    from diskwright.wire.nbd.numbers import BASE_ALLOCATION

    asked = arguments.text("map")
    context = BASE_ALLOCATION if asked is None else asked
    found = runs_of_export(where, context, security)
    summed = arguments.flag("totals")
    if _wants_json(arguments):
        as_members = nbd_text.totals_members if summed else nbd_text.map_members
        _say_json(as_members(found, context))
    else:
        _say((nbd_text.totals_lines if summed else nbd_text.map_lines)(found, context))
    return 0


def _can(arguments: Arguments, where: Address, security: Security | None) -> int:
    from diskwright.cli.nbd_text import can
    from diskwright.drivers.protocols.nbd.survey import look_at_export

    feature = arguments.text_or("can", "")
    answer = can(look_at_export(where, security), feature)
    if answer is None:
        raise OptionError(f"There is no feature '{feature}' to ask about", field="can")
    return 0 if answer else _NO


def _wants_json(arguments: Arguments) -> bool:
    return arguments.flag("json") or arguments.text("output") == "json"


def _say(lines: Iterable[str]) -> None:
    """Lines with tabs in them, which are no control characters of a name."""
    for line in lines:
        bare = line.lstrip("\t")
        output.say("\t" * (len(line) - len(bare)))
        output.say_lines([bare], escaped=True)


def _say_json(value: object) -> None:
    import json

    output.say(json.dumps(value, indent=2) + "\n")


COMMAND = Command(
    "nbdinfo",
    "Say what an NBD server serves and can do",
    operands="URI",
    flags=(
        flags.HELP,
        Flag("L", "list", help="ask about all exports, not only the one that the URI names"),
        Flag("", "map", "CONTEXT", "show the runs of the export, by base:allocation or another "
             "context", optional=True),
        Flag("", "totals", help="with --map: sum up the runs of each kind"),
        Flag("", "no-content", help="accepted: what an export holds is not guessed here"),
        Flag("", "color", help="accepted: nothing is coloured", key="color"),
        Flag("", "colour", help="the same as --color", key="color"),
        Flag("", "size", help="show the size alone, in bytes"),
        Flag("", "can", "FEATURE", "exit with 0 where the server can do that, else with 2"),
        Flag("", "is", "FEATURE", "the same as --can", key="can"),
        Flag("", "json", help="the same as --output=json"),
        flags.OUTPUT,
        Flag("", "tls-creds", "ID", "encrypt, with the credentials that --object defines"),
        Flag("", "tls-hostname", "NAME", "the server's name in its certificate"),
        flags.OBJECT,
    ),
    run=run,
    notes="Words and layout are those of libnbd's program of that name, but for its guess at what\n"
    "an export holds (`content`): `diskwright inspect` tells that of images. Features are: cache,\n"
    "connect, df, extended-headers, fast-zero, flush, fua, multi-conn, read, read-only,\n"
    "rotational, structured-reply, tls, trim, write and zero.",
)  # fmt: skip
