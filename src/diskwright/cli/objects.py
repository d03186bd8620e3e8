"""`--object`: what the words define, for the nodes of this process.

A `throttle-group` is a set of limits that nodes of the driver `throttle` share by its name. A
`secret` is checked and kept; what would use one, encrypted images, is refused by name.
"""

from __future__ import annotations

from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: What was defined: id -> whatever has to stay alive. QEMU's objects share one space of names.
_defined: dict[str, object] = {}

_ID_SENTENCE = (
    "Parameter 'id' expects an identifier\n"
    "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
)
#: Kinds that QEMU's tools know too, of which nothing here could make use.
_FOREIGN = (
    "authz-list",
    "authz-list-file",
    "authz-simple",
    "main-loop",
    "pr-manager-helper",
    "secret_keyring",
    "thread-context",
    "tls-creds-anon",
    "tls-creds-psk",
    "tls-creds-x509",
)


def define(text: str) -> None:
    """Make the object that `text` describes: "secret,id=x,data=y", or JSON.

    Raises:
        OptionError: it is no such description.
        UnsupportedError: QEMU has such objects, we have not.
    """
    words = _words(text)
    kind = words.pop("qom-type", None)
    if kind is None:
        raise OptionError("Parameter 'qom-type' is missing", field="object")
    if kind in _FOREIGN:
        raise UnsupportedError(f"Objects of type '{kind}' are not supported")
    make = _KINDS.get(str(kind))
    if make is None:
        raise OptionError(
            f"Parameter 'qom-type' does not accept value '{kind}'",
            field="object",
            hint=f"one of {', '.join(_KINDS)}",
        )
    name = words.pop("id", None)
    if name is None:
        raise OptionError("Parameter 'id' is missing", field="object")
    if not _is_identifier(str(name)):
        raise OptionError(_ID_SENTENCE, field="object")
    made = make(str(name), words)
    if str(name) in _defined:
        raise OptionError(
            f"attempt to add duplicate property '{name}' to object (type 'container')",
            field="object",
        )
    _defined[str(name)] = made


def _words(text: str) -> dict[str, object]:
    """The description as a dict."""
    if text.startswith("{"):
        from diskwright.block import json_text

        try:
            loaded = json_text.parse(text)
        except ValueError as error:
            raise OptionError(str(error), field="object") from None
        assert isinstance(loaded, dict)
        return loaded
    from diskwright.block.options import split_words, words_as_dict

    pairs = split_words(text)
    if pairs and pairs[0][1] is None:
        pairs[0] = ("qom-type", pairs[0][0])
    return words_as_dict(pairs)


def _is_identifier(name: str) -> bool:
    rest = name[1:].replace("-", "").replace(".", "").replace("_", "")
    return name.isascii() and name[:1].isalpha() and (not rest or rest.isalnum())


def _secret(name: str, words: dict[str, object]) -> object:
    """A secret's bytes."""
    for word in words:
        if word not in ("data", "file", "format", "iv", "keyid"):
            raise OptionError(f"Parameter '{word}' is unexpected", field="object")
    if "keyid" in words or "iv" in words:
        raise UnsupportedError("Secrets that are encrypted themselves are not supported")
    if ("data" in words) == ("file" in words):
        if "data" in words:
            raise OptionError("'file' and 'data' are mutually exclusive", field="object")
        raise OptionError("Either 'file' or 'data' must be provided", field="object")
    if "data" in words:
        return str(words["data"]).encode("utf-8", "surrogateescape")
    path = str(words["file"])
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise OptionError(
            f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}",
            field="object",
        ) from error


def _throttle_group(name: str, words: dict[str, object]) -> object:
    """A set of limits, kept alive under its name."""
    from diskwright.drivers.filters.throttle import shared_group

    limits: dict[str, int] = {}
    for word, value in words.items():
        given = value if isinstance(value, dict) else {word: value}
        for key, number in given.items():
            limit = str(key).removeprefix("x-").removeprefix("limits.")
            try:
                limits[limit] = int(str(number))
            except ValueError:
                raise OptionError(f"Parameter '{word}' expects a number", field="object") from None
    group = shared_group(name)
    group.configure(limits)
    return group


_KINDS: dict[str, Callable[[str, dict[str, object]], object]] = {
    "secret": _secret,
    "throttle-group": _throttle_group,
}
