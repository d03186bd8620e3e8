"""Rules of blkdebug: what they say, the state they change, the requests they stop.

Source: QEMU's docs/devel/testing/blkdebug.rst and the QMP reference, BlockdevOptionsBlkdebug;
the order in which rules take effect is that of its tools, observed.
"""

from __future__ import annotations

import errno
from _thread import get_ident

from diskwright.block.inflight import Condition
from diskwright.block.options import Option, Options
from diskwright.block.record import Record
from diskwright.errors import NotFoundError, OptionError, from_oserror

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_REFUSAL = "invalid parameter value: {value}"

EVENTS = tuple(
    """
    l1_update l1_grow_alloc_table l1_grow_write_table l1_grow_activate_table l2_load l2_update
    l2_update_compressed l2_alloc_cow_read l2_alloc_write read_aio read_backing_aio
    read_compressed write_aio write_compressed vmstate_load vmstate_save cow_read cow_write
    reftable_load reftable_grow reftable_update refblock_load refblock_update
    refblock_update_part refblock_alloc refblock_alloc_hookup refblock_alloc_write
    refblock_alloc_write_blocks refblock_alloc_write_table refblock_alloc_switch_table
    cluster_alloc cluster_alloc_bytes cluster_free flush_to_os flush_to_disk pwritev_rmw_head
    pwritev_rmw_after_head pwritev_rmw_tail pwritev_rmw_after_tail pwritev pwritev_zero
    pwritev_done empty_image_prepare l1_shrink_write_table l1_shrink_free_l2_clusters cor_write
    cluster_alloc_space none
    """.split()
)
IO_TYPES = ("read", "write", "write-zeroes", "discard", "flush", "block-status")

_COMMON = (
    Option("event", "enum", None, "when", choices=EVENTS, refusal=_REFUSAL),
    Option("state", "int", 0, "only in this state; 0: in any"),
)
SECTIONS = {
    "inject-error": Options(
        *_COMMON,
        Option("iotype", "enum", None, "only these", choices=IO_TYPES, refusal=_REFUSAL),
        Option("errno", "int", errno.EIO, "the error's number; 0: none"),
        Option("sector", "int", -1, "only requests that reach this sector; -1: any"),
        Option("once", "bool", False, "only once"),
        Option("immediately", "bool", False, "accepted; every error is immediate"),
    ),
    "set-state": Options(*_COMMON, Option("new_state", "int", 0, "the state to go to")),
    "delay": Options(*_COMMON, Option("milliseconds", "int", 0, "how long to wait")),
}


class Rule(Record):
    """What to do at an event; `section` is "inject-error", "set-state" or "delay"."""

    __slots__ = ("section", "event", "state", "settings")

    def __init__(self, section: str, settings: dict[str, object]) -> None:
        self.section = section
        self.event = str(settings["event"])
        self.state = number(settings["state"])
        self.settings = settings

    def fits(self, io_type: str, offset: int, length: int) -> bool:
        """Whether an active error rule is about the request."""
        wanted = self.settings["iotype"]
        if wanted is None and io_type == "block-status":
            return False
        if wanted is not None and wanted != io_type:
            return False
        byte = number(self.settings["sector"]) * 512
        return byte < 0 or (byte < offset + length and offset < byte + 512)


class Rules:
    """The rules of one node, its state and its stopped requests; thread-safe."""

    def __init__(self) -> None:
        #: gets "blkdebug: Suspended request 'A'" and the like, as QEMU's tools print them
        self.report: Callable[[str], None] | None = None
        self._changed = Condition()  # guards all that follows
        self._rules: list[Rule] = []
        self._active: list[Rule] = []
        self._state = 1
        self._breakpoints: list[tuple[str, str]] = []  # (event, tag)
        self._stopped: dict[str, list[int]] = {}  # tag -> the threads that wait, in order

    def add(self, section: str, given: dict[str, object]) -> None:
        """Declare a rule.

        Raises:
            OptionError: its words are wrong.
        """
        options = SECTIONS[section]
        unknown = f"[{section}] section doesn't support the option '{{name}}'"
        settings = options.validate(given, unknown=unknown)
        if settings["event"] is None:
            raise OptionError("Missing event name for rule", field=section)
        self._rules.append(Rule(section, settings))

    def event(self, name: str) -> None:
        """React to an event: may wait."""
        with self._changed:
            rules = [
                rule
                for rule in self._rules
                if rule.event == name and rule.state in (0, self._state)
            ]
            errors = [rule for rule in rules if rule.section == "inject-error"]
            if errors:
                self._active = errors
            for rule in rules:
                if rule.section == "set-state":
                    self._state = number(rule.settings["new_state"])
            tags = self._take_breakpoints(name)
            if tags:
                self._stop(tags)
        for rule in rules:
            if rule.section == "delay":
                _sleep(number(rule.settings["milliseconds"]) / 1000)

    def error_for(self, io_type: str, offset: int, length: int) -> int:
        """The errno that the request is to fail with, or 0."""
        with self._changed:
            for rule in self._active:
                if rule.fits(io_type, offset, length):
                    if rule.settings["once"]:
                        self._active = [other for other in self._active if other is not rule]
                        self._rules = [other for other in self._rules if other is not rule]
                    return number(rule.settings["errno"])
        return 0

    # -------------------------------------------------------------------- breakpoints

    def add_breakpoint(self, event: str, tag: str) -> None:
        """Stop the next request that comes to the event."""
        if event not in EVENTS:
            raise NotFoundError(
                f"There is no event '{event}'",
                errno=errno.ENOENT,
                qemu="Could not set breakpoint: No such file or directory",
            )
        with self._changed:
            self._breakpoints.append((event, tag))

    def _take_breakpoints(self, event: str) -> list[str]:
        """The tags of all breakpoints at an event, which are used up; the latest comes first."""
        tags = [tag for at, tag in reversed(self._breakpoints) if at == event]
        self._breakpoints = [(at, tag) for at, tag in self._breakpoints if at != event]
        return tags

    def _stop(self, tags: list[str]) -> None:
        """Wait, the lock given up, until somebody has resumed each of the tags."""
        me = get_ident()
        for tag in tags:
            self._report(f"blkdebug: Suspended request '{tag}'")
            self._stopped.setdefault(tag, []).append(me)
        self._changed.notify_all()
        while any(me in self._stopped[tag] for tag in tags):
            self._changed.wait()

    def resume(self, tag: str, *, all_of_them: bool = False) -> int:
        """Let the latest request stopped at `tag` go on, or all; returns how many."""
        with self._changed:
            waiting = self._stopped.get(tag, [])
            count = len(waiting) if all_of_them else min(len(waiting), 1)
            for _ in range(count):
                self._report(f"blkdebug: Resuming request '{tag}'")
                waiting.pop()
            self._changed.notify_all()
        return count

    def resume_one(self, tag: str) -> None:
        """Let one request go that stopped at the breakpoint."""
        if not self.resume(tag):
            raise NotFoundError(
                f"No request is stopped at '{tag}'",
                errno=errno.ENOENT,
                qemu="Could not resume request: No such file or directory",
            )

    def remove_breakpoint(self, tag: str) -> None:
        """Forget the breakpoint, and let every request go that it stopped.

        A breakpoint that has stopped a request is gone: to remove it is refused, as in QEMU, and
        the request goes on.
        """
        found = self._drop_breakpoint(tag)
        self.resume(tag, all_of_them=True)
        if not found:
            raise NotFoundError(
                f"There is no breakpoint '{tag}'",
                errno=errno.ENOENT,
                qemu=f"Could not remove breakpoint {tag}: No such file or directory",
            )

    def _drop_breakpoint(self, tag: str) -> bool:
        """Forget breakpoints with the tag; whether there were any."""
        with self._changed:
            kept = [entry for entry in self._breakpoints if entry[1] != tag]
            found = len(kept) != len(self._breakpoints)
            self._breakpoints = kept
        return found

    def _report(self, line: str) -> None:
        if self.report is not None:
            self.report(line)

    def wait_stopped(self, tag: str) -> None:
        """Wait until a request has stopped at `tag`."""
        with self._changed:
            while not self._stopped.get(tag):
                self._changed.wait()

    def is_stopped(self, tag: str) -> bool:
        """Whether a request waits at `tag`."""
        with self._changed:
            return bool(self._stopped.get(tag))

    def release_all(self) -> None:
        """Let everybody go and stop nobody any more."""
        with self._changed:
            self._breakpoints = []
            tags = [tag for tag, waiting in self._stopped.items() if waiting]
        for tag in tags:
            self.resume(tag, all_of_them=True)


def number(value: object) -> int:
    """A setting whose option is declared as a number."""
    assert isinstance(value, int)
    return value


def _sleep(seconds: float) -> None:
    import time

    time.sleep(seconds)


def as_list(given: object, name: str) -> list[object]:
    """A list, also where dotted words made {"0": …, "1": …} of it."""
    if given is None:
        return []
    if isinstance(given, list):
        return given
    if isinstance(given, dict) and all(str(key).isdecimal() for key in given):
        return [given[key] for key in sorted(given, key=int)]
    raise OptionError(f"'{name}' must be a list", field=name)


def rule_objects(given: object, section: str) -> Iterator[dict[str, object]]:
    """The rules in the value of option `section`: a list, or one of them alone."""
    if isinstance(given, dict) and not all(str(key).isdecimal() for key in given):
        given = [given]
    for rule in as_list(given, section):
        if not isinstance(rule, dict):
            raise OptionError(f"'{section}' must be a list of objects", field=section)
        yield rule


def read_config(path: str) -> list[tuple[str, dict[str, object]]]:
    """The sections of a file of rules: `[inject-error]`, then lines `name = "value"`."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read(1 << 20).splitlines()
    except OSError as error:
        raise from_oserror(error, "Could not read blkdebug config file", path=path) from error
    sections: list[tuple[str, dict[str, object]]] = []
    for line in lines:
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if text.startswith("[") and text.endswith("]"):
            _check_names(sections, path)
            name = (text[1:-1].split() or [""])[0]
            if name not in SECTIONS:
                raise OptionError(f"There is no option group '{name}'", field="config")
            sections.append((name, {}))
            continue
        if not sections:
            raise OptionError("no group defined", field="config")
        word, _, rest = text.partition(" ")
        before, equals, value = (part.strip() for part in rest.partition("="))
        quoted = len(value) >= 2 and value[0] == value[-1] == '"'
        sections[-1][1][word] = value[1:-1] if equals and quoted and not before else ""
    _check_names(sections, path)
    return sections


def _check_names(sections: list[tuple[str, dict[str, object]]], path: str) -> None:
    """Refuse names that the last section does not know, by the one that QEMU's tools tell of."""
    if not sections:
        return
    section, settings = sections[-1]
    unknown = [name for name in settings if name not in SECTIONS[section]]
    if unknown:
        name = min(unknown, key=_bucket)
        raise OptionError(f"Invalid parameter '{name}'", field="config", path=path)


def _bucket(name: str) -> int:
    """Where a name stands in QEMU's order of dictionaries: that of trivial databases' hashes."""
    letters = name.encode()
    value = 0x238F13AF * len(letters)
    value += sum(letter << (at * 5 % 24) for at, letter in enumerate(letters))
    return (1103515243 * value + 12345) % 512
