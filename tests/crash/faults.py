"""One request to an image's file fails, or all from one on: which, and how it is arranged.

Errors are injected by our blkdebug filter between the format and its file. It has no counter,
so its states are the counter: every event of a kind goes to the next state. No event tells of a
barrier between tables, so flushes are counted, and fail, here.
"""

from __future__ import annotations

import errno

from diskwright.block.node import Node
from diskwright.drivers.filters.blkdebug.driver import Blkdebug
from diskwright.errors import DiskwrightError, errno_of, from_oserror
from tests import devices
from tests.crash.enumeration import Story, look_at, prepare
from tests.crash.guest import Guest, WrongError
from tests.crash.scenarios import Scenario
from tests.devices import Store

#: What fails -> the event that counts it, and the kind of request that fails after it.
COUNTED = {
    "write": ("pwritev", "write"),
    "zeroing": ("pwritev_zero", "write-zeroes"),
    "loading a refcount block": ("refblock_load", "read"),
    "loading an L2 table": ("l2_load", "read"),
    "reading data": ("read_aio", "read"),
    "reading for copy-on-write": ("cow_read", "read"),
}


class Fault:
    """The `number`-th request of a kind fails with `code`; unless `once`, all later ones too."""

    def __init__(self, kind: str, number: int, code: int, *, once: bool) -> None:
        self.kind = kind
        self.number = number
        self.code = code
        self.once = once
        self.met = False

    def __str__(self) -> str:
        which = f"{self.kind} {self.number}"
        return f"{errno.errorcode[self.code]} in {which}{'' if self.once else ' and all later'}"

    def around(self, file: dict[str, object]) -> dict[str, object]:
        """The filter over `file` that injects it; changes of size only pass through it."""
        if self.kind not in COUNTED:
            return {"driver": "blkdebug", "image": file}
        event, io_type = COUNTED[self.kind]
        count = [
            {"event": event, "state": state, "new_state": state + 1}
            for state in range(1, self.number)
        ]
        fail: dict[str, object] = {
            "event": event,
            "state": self.number,
            "iotype": io_type,
            "errno": self.code,
            "once": self.once,
        }
        return {"driver": "blkdebug", "image": file, "set-state": count, "inject-error": [fail]}

    def arm(self, store: Store) -> None:
        """Have a change of size fail: no filter sees those."""
        seen = 0

        def fail(kind: str) -> None:
            nonlocal seen
            if kind != "size":
                return
            seen += 1
            if seen == self.number or (seen > self.number and not self.once):
                self.met = True
                raise from_oserror(OSError(self.code, ""), "")

        if self.kind == "size":
            store.fail = fail

    def watch(self, node: Node) -> None:
        """Notice when a request meets it."""
        below = node.children["file"].node
        assert isinstance(below, Blkdebug)
        ask = below.rules.error_for
        flushes = 0

        def error_for(io_type: str, offset: int, length: int) -> int:
            nonlocal flushes
            code = ask(io_type, offset, length)
            if io_type == self.kind == "flush":
                flushes += 1
                if flushes == self.number or (flushes > self.number and not self.once):
                    code = self.code
            self.met |= bool(code)
            return code

        below.rules.error_for = error_for  # type: ignore[method-assign]


class Run:
    """A scenario with faults; `prepare` is done once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.before: Story = prepare(scenario)
        self.files = {name: bytes(devices.STORES[name].data) for name in scenario.files}
        self.counts = self._count()

    def _count(self) -> dict[str, int]:
        """How many requests of each kind there are without a fault."""
        counts = dict.fromkeys([*COUNTED, "flush", "size"], 0)
        kinds = {event: kind for kind, (event, _) in COUNTED.items()}

        def around(file: dict[str, object]) -> dict[str, object]:
            return {"driver": "blkdebug", "image": file}

        def size(kind: str) -> None:
            counts["size"] += kind == "size"

        def heard(event: str) -> None:
            if event in kinds:
                counts[kinds[event]] += 1

        self._restore()
        devices.STORES["image"].fail = size
        guest = self._guest(around, heard)
        below = guest.node.children["file"].node
        assert isinstance(below, Blkdebug)
        ask = below.rules.error_for

        def error_for(io_type: str, offset: int, length: int) -> int:
            counts["flush"] += io_type == "flush"
            return ask(io_type, offset, length)

        below.rules.error_for = error_for  # type: ignore[method-assign]
        self._act(guest)
        if guest.errors:
            raise guest.errors[0]
        return counts

    def _restore(self) -> None:
        for name, data in self.files.items():
            devices.STORES[name] = Store(data)

    def _guest(self, around: object, heard: object = None) -> Guest:
        from diskwright.block.opener import Opener, open_image

        opener = Opener(read_only=False)
        node = open_image(opener, self.scenario.spec(filters=around))  # type: ignore[arg-type]
        below = node.children["file"].node
        if heard is not None and isinstance(below, Blkdebug):
            rules, react = below.rules, below.rules.event

            def event(name: str) -> None:
                heard(name)  # type: ignore[operator]
                react(name)

            rules.event = event  # type: ignore[method-assign]
            below.event_hook = event
        before = self.before
        guest = Guest(
            node, [], before.disk.base, snapshots=before.snapshots, noted=before.noted, brave=True
        )
        if self.scenario.backing:
            guest.below = dict(before.disk.base)
        return guest

    def _act(self, guest: Guest) -> None:
        self.scenario.act(guest)
        guest.close()

    def suffer(self, fault: Fault) -> list[DiskwrightError]:
        """Run with a fault and look at what is left; returns the errors that there were.

        Raises:
            WrongError: what is left is wrong, or nobody told of the fault.
        """
        self._restore()
        fault.arm(devices.STORES["image"])
        try:
            guest = self._guest(fault.around)
        except DiskwrightError as error:
            return self._refused(fault, error)
        fault.watch(guest.node)
        self._act(guest)
        if not fault.met and not guest.errors:
            return []  # no read followed the event
        if not guest.errors:
            raise WrongError(f"{self.scenario}: {fault}: nobody was told")
        first = guest.errors[0]
        if errno_of(first) != fault.code or not str(first):
            raise WrongError(f"{self.scenario}: {fault}: told of {first!r} instead")
        self._hold(fault, guest.story(None))
        return guest.errors

    def _refused(self, fault: Fault, error: DiskwrightError) -> list[DiskwrightError]:
        """Opening failed: nothing may have changed."""
        self._hold(fault, self.before)
        return [error]

    def _hold(self, fault: Fault, story: Story) -> None:
        files = {name: bytes(devices.STORES[name].data) for name in self.scenario.files}
        try:
            look_at(self.scenario, files, story)
        except (WrongError, DiskwrightError) as error:
            raise WrongError(
                f"{self.scenario}: {fault}: afterwards: {type(error).__name__}: {error}"
            ) from error
