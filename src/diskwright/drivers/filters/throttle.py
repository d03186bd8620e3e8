"""throttle: at most so many requests, and so many bytes, a second.

Each limit is a leaky bucket: requests pour in what they cost, the limit's rate drains it, and
whoever finds it above its capacity waits for the excess to drain. The capacity is a tenth of
a second of the rate, or, where a burst rate is given, `max-length` seconds of that; a burst
longer than a second has a second bucket that holds it to its own rate.

QEMU's driver takes its limits from an object, `throttle-group`. Here they are the node's own
options ("limits.iops-total"); nodes of this process that name the same `throttle-group` share
one set of buckets, whose limits are those of the node that brought some.
Source: docs/throttle.txt of QEMU, the meaning of the limits.
"""

from __future__ import annotations

from _thread import allocate_lock
from _weakref import ref

from diskwright.block.filter import Filter
from diskwright.block.options import Option, Options
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from diskwright.block.opener import Opener

_KINDS = tuple(f"{unit}-{way}" for unit in ("bps", "iops") for way in ("total", "read", "write"))
_LIMITS = (
    *(name for kind in _KINDS for name in (kind, f"{kind}-max", f"{kind}-max-length")),
    "iops-size",
)
#: Largest limit that is accepted, as in QEMU: a rate above it is a mistake.
MAX_LIMIT = 10**15


class Bucket:
    """One limit; not locked, its `Group` is."""

    __slots__ = ("_burst_level", "_burst_rate", "_capacity", "_level", "_rate", "_then")

    def __init__(self, rate: int, burst_rate: int = 0, burst_seconds: int = 1) -> None:
        self._rate = rate
        self._capacity = burst_rate * burst_seconds if burst_rate else rate / 10
        self._burst_rate = burst_rate if burst_rate and burst_seconds > 1 else 0
        self._level = 0.0
        self._burst_level = 0.0
        self._then = 0.0

    def delay(self, now: float) -> float:
        """Seconds until a request that comes now may go."""
        passed = max(now - self._then, 0.0)
        self._then = now
        self._level = max(self._level - passed * self._rate, 0.0)
        wait = (self._level - self._capacity) / self._rate
        if self._burst_rate:
            self._burst_level = max(self._burst_level - passed * self._burst_rate, 0.0)
            wait = max(wait, (self._burst_level - self._burst_rate / 10) / self._burst_rate)
        return max(wait, 0.0)

    def pour(self, units: float) -> None:
        """Account for a request, which may have been told to wait."""
        self._level += units
        self._burst_level += units


class Group:
    """The buckets that one node has, or several share."""

    def __init__(self) -> None:
        self._lock = allocate_lock()
        self._buckets: dict[str, Bucket] = {}
        self._request_size = 0

    def configure(self, limits: Mapping[str, int]) -> None:
        """Take new limits; what was poured into the old ones is forgotten."""
        check_limits(limits)
        made = {
            kind: Bucket(
                limits[kind], limits.get(f"{kind}-max", 0), limits.get(f"{kind}-max-length", 1)
            )
            for kind in _KINDS
            if limits.get(kind)
        }
        with self._lock:
            self._buckets = made
            self._request_size = limits.get("iops-size", 0)

    def admit(self, length: int, is_write: bool, now: float) -> float:
        """Account for a request; returns how many seconds it has to wait."""
        way = "write" if is_write else "read"
        wait = 0.0
        with self._lock:
            count = max(length / self._request_size, 1.0) if self._request_size else 1.0
            for unit, cost in (("bps", float(length)), ("iops", count)):
                for kind in (f"{unit}-total", f"{unit}-{way}"):
                    bucket = self._buckets.get(kind)
                    if bucket is not None:
                        wait = max(wait, bucket.delay(now))
                        bucket.pour(cost)
        return wait


def check_limits(limits: Mapping[str, int]) -> None:
    """Refuse limits that contradict each other, in QEMU's words."""
    for name, value in limits.items():
        if value < 0:
            raise OptionError("Property values cannot be negative", field=name)
        if value > MAX_LIMIT:
            raise OptionError(f"bps/iops/max values must be within [0, {MAX_LIMIT}]", field=name)
    for stem in ("bps-{}", "iops-{}", "bps-{}-max", "iops-{}-max"):
        both = [limits.get(stem.format(way)) for way in ("read", "write")]
        if limits.get(stem.format("total")) and any(both):
            raise OptionError(
                "bps/iops/max total values and read/write values cannot be used at the same time",
                field=stem.format("total"),
            )
    for kind in _KINDS:
        _check_burst(limits, kind)
    if limits.get("iops-size") and not any(limits.get(kind) for kind in _KINDS[3:]):
        raise OptionError("iops size requires an iops value to be set", field="iops-size")


def _check_burst(limits: Mapping[str, int], kind: str) -> None:
    rate, burst = limits.get(kind, 0), limits.get(f"{kind}-max", 0)
    seconds = limits.get(f"{kind}-max-length", 1)
    problem = ""
    if not seconds:
        problem = "the burst length cannot be 0"
    elif seconds > 1 and not burst:
        problem = "burst length set without burst rate"
    elif burst and not rate:
        problem = "bps_max/iops_max require corresponding bps/iops values"
    elif burst and burst < rate:
        problem = "bps_max/iops_max cannot be lower than bps/iops"
    if problem:
        raise OptionError(problem, field=kind)


_groups: dict[str, ref[Group]] = {}
_groups_lock = allocate_lock()


def shared_group(name: str) -> Group:
    """The group that all nodes of this process share which name it."""
    with _groups_lock:
        known = _groups.get(name)
        group = known() if known is not None else None
        if group is None:
            group = Group()
            _groups[name] = ref(group)
        return group


def known_group(name: str) -> Group:
    """The group of that name, which an object or a node must have made.

    Raises:
        OptionError: there is none.
    """
    with _groups_lock:
        known = _groups.get(name)
        group = known() if known is not None else None
    if group is None:
        raise OptionError(
            f"Throttle group '{name}' does not exist",
            field="throttle-group",
            hint="define it with --object throttle-group,id=…, or give limits",
        )
    return group


class Throttle(Filter):
    """Holds its child's reads, writes, zeroes and discards back; flushes pass."""

    driver = "throttle"
    options = Options(
        Option(
            "throttle-group",
            help="share limits with the nodes of this process that name the same",
            strong=True,
        ),
        *(Option(f"limits.{name}", "int", None, f"limit '{name}', 0 for none") for name in _LIMITS),
        Option("limits", "any", None, "the limits as one object"),
    )

    group: Group

    def _open(self, opener: Opener, options: dict[str, object]) -> None:
        self._open_below(opener, options)
        name = options["throttle-group"]
        limits = _given_limits(options)
        if limits:
            self.group = shared_group(str(name)) if name else Group()
            self.group.configure(limits)
        elif name:
            self.group = known_group(str(name))
        else:
            raise OptionError(
                "throttle needs limits, or a group that has some",
                qemu="Please specify a throttle group",
                field="throttle-group",
                hint="limits.iops-total=100, for example",
            )

    def _wait(self, length: int, is_write: bool) -> None:
        import time

        delay = self.group.admit(length, is_write, time.monotonic())
        if delay:
            time.sleep(delay)

    def _read_into(self, offset: int, view: memoryview) -> None:
        self._wait(len(view), False)
        self.below.read_into(offset, view)

    def _write(self, offset: int, view: memoryview, fua: bool) -> None:
        self._wait(len(view), True)
        self.below.write(offset, view, fua=fua)

    def _write_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._wait(length, True)
        super()._write_zeroes(offset, length, flags)

    def _discard(self, offset: int, length: int) -> None:
        self._wait(length, True)
        self.below.discard(offset, length)


def _given_limits(options: dict[str, object]) -> dict[str, int]:
    """The limits among `options`, however they were spelt."""
    found: dict[str, int] = {}
    nested = options.get("limits")
    given = dict(nested) if isinstance(nested, dict) else {}
    for name in _LIMITS:
        value = options.get(f"limits.{name}")
        if value is not None:
            given[name] = value
    for name, value in given.items():
        if name not in _LIMITS:
            raise OptionError(
                f"Invalid parameter 'limits.{name}'",
                field="limits",
                hint=f"one of {', '.join(_LIMITS)}",
            )
        found[name] = int(str(Option(name, "int").convert(value)))
    return found
