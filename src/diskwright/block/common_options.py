"""Options that every node takes, whatever its driver, and the words that they know.

Source: QEMU's QMP reference, BlockdevOptions; sentences as its tools were seen to have them.
"""

from __future__ import annotations

from diskwright.block.options import FALSE_WORDS, TRUE_WORDS
from diskwright.errors import OptionError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.opener import Opener

#: cache mode -> (direct, no_flush, write_through)
CACHE_MODES = {
    "none": (True, False, False),
    "off": (True, False, False),
    "directsync": (True, False, True),
    "writethrough": (False, False, True),
    "writeback": (False, False, False),
    "unsafe": (False, True, False),
}


def cache_flags(cache: str) -> tuple[bool, bool, bool]:
    """(direct, no_flush, write_through) of a cache mode.

    Raises:
        OptionError: there is no such mode.
    """
    if cache not in CACHE_MODES:
        raise OptionError(
            f"'{cache}' is not a cache mode",
            qemu=f"Invalid cache option: {cache}",
            field="cache",
            hint=f"one of {', '.join(CACHE_MODES)}",
        )
    return CACHE_MODES[cache]


#: Options that every node takes, whatever its driver.
COMMON = (
    "node-name",
    "read-only",
    "auto-read-only",
    "discard",
    "detect-zeroes",
    "cache",
    "force-share",
)


_CACHE_MEMBERS = ("direct", "no-flush")

AIO_MODES = ("threads", "native", "io_uring")
DETECT_ZEROES_MODES = ("off", "on", "unmap")
#: What `discard` says -> whether discards are passed on.
DISCARD_MODES = {"ignore": False, "off": False, "unmap": True, "on": True}


def option_flag(value: object, name: str) -> bool:
    """A value of an option that is on or off."""
    if isinstance(value, bool):
        return value
    if value in TRUE_WORDS:
        return True
    if value in FALSE_WORDS:
        return False
    raise OptionError(
        f"Parameter '{name}' expects 'on' or 'off'", field=name, hint=f"it was {value!r}"
    )


def zero_detection(word: object, unmaps: object) -> str:
    """What `detect-zeroes` says, where discards are passed on or not: "", "on" or "unmap"."""
    if word not in ("off", "on", "unmap"):
        raise OptionError(f"invalid parameter value: {word}", field="detect-zeroes")
    if word == "unmap" and not unmaps:
        raise OptionError(
            "setting detect-zeroes to unmap is not allowed without setting discard operation "
            "to unmap",
            field="detect-zeroes",
        )
    return "" if word == "off" else str(word)


def _word(value: object) -> str:
    """The word that a value stands for: true and false, as JSON has them, are on and off."""
    return ("off", "on")[value] if isinstance(value, bool) else str(value)


def common_options(opener: Opener, options: dict[str, object]) -> tuple[Opener, dict[str, object]]:
    """Take the options that every node has out of `options`; returns (opener, them)."""
    taken = {key: options.pop(key) for key in COMMON if key in options}
    changes: dict[str, object] = {}
    if "read-only" in taken:
        changes["read_only"] = option_flag(taken["read-only"], "read-only")
    if "auto-read-only" in taken:  # about storage that opens as it can: files do not
        option_flag(taken["auto-read-only"], "auto-read-only")
    if "force-share" in taken:
        changes["force_share"] = option_flag(taken["force-share"], "force-share")
    if "discard" in taken:
        word = _word(taken["discard"])
        if word not in DISCARD_MODES:
            raise OptionError("Invalid discard option", field="discard")
        changes["can_unmap"] = DISCARD_MODES[word]
    if "detect-zeroes" in taken:
        unmaps = changes.get("can_unmap", opener.unmaps_unasked)
        changes["detect_zeroes"] = zero_detection(_word(taken["detect-zeroes"]), unmaps)
    cache = taken.get("cache")
    if "cache" in taken and (not isinstance(cache, dict) or not cache):
        options["cache"] = cache  # which no driver declares either
    if isinstance(cache, dict):
        rest = {key: value for key, value in cache.items() if key not in _CACHE_MEMBERS}
        if rest:
            options["cache"] = rest  # which no driver declares
        if "direct" in cache:
            changes["direct"] = option_flag(cache["direct"], "cache.direct")
        if "no-flush" in cache:
            changes["no_flush"] = option_flag(cache["no-flush"], "cache.no-flush")
    return (opener.derive(**changes) if changes else opener), taken
