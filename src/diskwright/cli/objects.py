"""`--object`: what the words define, for the nodes of this process.

A `throttle-group` is a set of limits that nodes of the driver `throttle` share by its name.
`tls-creds-x509` and `tls-creds-psk` are what connections are encrypted with. A `secret` is checked
and kept: it may be the password of a key; what else would use one, encrypted images, is refused by
name. Of the other kinds that QEMU's tools know, what they say of a wrong definition is known too.
"""

from __future__ import annotations

from diskwright.block import objects
from diskwright.errors import OptionError, UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Words = dict[str, object]

_ID_SENTENCE = "Parameter 'id' expects an identifier"
_ID_HELP = "Identifiers consist of letters, digits, '-', '.', '_', starting with a letter."
#: Kinds that QEMU's tools make, of which nothing here could make use -> what they must have.
_FOREIGN: dict[str, tuple[str, ...]] = {
    "main-loop": (),
    "pr-manager-helper": ("path",),
    "secret_keyring": ("serial",),
    "thread-context": (),
    "tls-creds-anon": (),
}
#: Kinds that only its emulator makes -> what they must have.
_EMULATOR: dict[str, tuple[str, ...]] = {
    "acpi-generic-initiator": ("pci-dev",),
    "authz-pam": ("service",),
    "can-bus": (),
    "can-host-socketcan": ("if",),
    "colo-compare": ("primary_in",),
    "cryptodev-backend": (),
    "cryptodev-backend-builtin": (),
    "dbus-vmstate": ("addr",),
    "filter-buffer": ("netdev",),
    "input-barrier": ("name",),
    "iommufd": (),
    "iothread": (),
    "memory-backend-file": ("size",),
    "memory-backend-ram": ("size",),
    "pef-guest": (),
    "qtest": ("chardev",),
    "rng-builtin": (),
    "rng-egd": ("chardev",),
    "rng-random": (),
    "sev-guest": ("reduced-phys-bits",),
    "tls-cipher-suites": (),
    "x-remote-object": ("fd",),
}


def define(text: str) -> None:
    """Make the object that `text` describes: "secret,id=x,data=y", or JSON.

    Raises:
        OptionError: it is no such description.
        UnsupportedError: QEMU has such objects, we have not.
    """
    words = _words(text)
    kind = _take_text(words, "qom-type")
    make = _KINDS.get(kind)
    if make is None and kind not in _FOREIGN and kind not in _EMULATOR:
        raise OptionError(
            f"Parameter 'qom-type' does not accept value '{kind}'",
            field="object",
            hint=f"one of {', '.join(_KINDS)}",
        )
    name = _take_text(words, "id")
    if make is None:
        _refuse(kind, words)
    if not _is_identifier(name):
        raise OptionError(_ID_SENTENCE, qemu=f"{_ID_SENTENCE}\n{_ID_HELP}", field="object")
    assert make is not None
    objects.add(name, make(name, words))


def _refuse(kind: str, words: Words) -> None:
    """Say what is wrong with an object of a kind that is not made here."""
    for needed in _FOREIGN.get(kind, _EMULATOR.get(kind, ())):
        if needed not in words:
            raise OptionError(f"Parameter '{needed}' is missing", field="object")
    if kind in _EMULATOR:
        raise OptionError(f"invalid object type: {kind}", field="object")
    if kind == "tls-creds-anon":
        if words.get("endpoint", "client") not in ("client", "server"):
            raise _not_accepted("endpoint", words["endpoint"])
        _check_names(words, _ANON)
        raise UnsupportedError(
            "TLS without any identity (tls-creds-anon) is not supported: whoever is in between "
            "could read along",
            hint="use certificates: tls-creds-x509",
        )
    raise UnsupportedError(f"Objects of type '{kind}' are not supported")


def help_of(text: str) -> str | None:
    """What QEMU's tools answer to a question in the place of an object; None where it is none."""
    if text.startswith("{"):
        return None
    first, *rest = text.split(",")
    if first in ("help", "?"):
        return _list_of_kinds()
    if "help" not in rest and "?" not in rest:
        return None
    properties = {
        "authz-list": _AUTHZ_LIST,
        "authz-simple": _AUTHZ_SIMPLE,
        "secret": _SECRET,
        "throttle-group": _throttle_properties(),
        "tls-creds-psk": _PSK,
        "tls-creds-x509": _X509,
    }.get(first.removeprefix("qom-type="))
    if properties is None:
        return _list_of_kinds()
    lines = [f"{first} options:", *(f"  {name}=<{type}>" for name, type in properties.items())]
    return "\n".join(lines) + "\n"


def _list_of_kinds() -> str:
    return "\n".join(["List of user creatable objects:", *(f"  {kind}" for kind in _KINDS)]) + "\n"


def _words(text: str) -> Words:
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
    for name, value in pairs:
        if value is None:
            raise OptionError(f"Expected '=' after parameter '{name}'", field="object")
    return words_as_dict(pairs)


def _is_identifier(name: str) -> bool:
    rest = name[1:].replace("-", "").replace(".", "").replace("_", "")
    return name.isascii() and name[:1].isalpha() and (not rest or rest.isalnum())


def _take_text(words: Words, word: str) -> str:
    """Take out what every object must have."""
    if word not in words:
        raise OptionError(f"Parameter '{word}' is missing", field="object")
    _require_text(word, words[word])
    return str(words.pop(word))


def _require_text(word: str, value: object) -> None:
    if not isinstance(value, str):
        raise OptionError(f"Invalid parameter type for '{word}', expected: string", field="object")


def _not_accepted(name: str, value: object) -> OptionError:
    return OptionError(f"Parameter '{name}' does not accept value '{value}'", field="object")


def _check_names(words: Words, known: dict[str, str]) -> None:
    for word in words:
        if word not in known:
            raise OptionError(f"Parameter '{word}' is unexpected", field="object")


# --------------------------------------------------------------------------------- secrets

_SECRET = {
    "data": "string",
    "file": "string",
    "format": "QCryptoSecretFormat",
    "iv": "string",
    "keyid": "string",
}


def _secret(name: str, words: Words) -> object:
    """A secret's bytes."""
    for word, value in words.items():
        if word in _SECRET:
            _require_text(word, value)
    format = words.get("format", "raw")
    if format not in ("raw", "base64"):
        raise _not_accepted("format", format)
    _check_names(words, _SECRET)
    key = words.get("keyid")
    stored = _stored_bytes(words)
    if key is not None and not isinstance(objects.find(str(key)), bytes):
        raise OptionError(f"No secret with id '{key}'", field="object")
    if key is not None:
        raise UnsupportedError("Secrets that are encrypted themselves are not supported")
    return from_base64(stored) if format == "base64" else stored


def _stored_bytes(words: Words) -> bytes:
    """What was written, or what a file has."""
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
        # For a library of C a folder can be opened, and only not be read.
        failed = "Error reading" if isinstance(error, IsADirectoryError) else "Failed to open"
        raise OptionError(
            f"Unable to read {path}: {failed} file “{path}”: {error.strerror}",
            field="object",
        ) from error


def from_base64(text: bytes) -> bytes:
    """Decoded as QEMU's tools do: each four characters by themselves, padding among them."""
    from binascii import a2b_base64

    letters = text.replace(b"\n", b"")
    if letters.strip(b"+/=") and not letters.translate(None, b"+/=").isalnum():
        raise OptionError("Base64 data contains invalid characters", field="object")
    decoded = bytearray()
    for start in range(0, len(letters) - 3, 4):
        four = letters[start : start + 4]
        three = a2b_base64(four.replace(b"=", b"A"))
        there = (True, four[2:3] != b"=", four[3:] != b"=")
        decoded += bytes(byte for byte, is_there in zip(three, there, strict=True) if is_there)
    return bytes(decoded)


# ------------------------------------------------------------------------------- credentials

_CREDENTIALS = {"dir": "string", "endpoint": "QCryptoTLSCredsEndpoint"}
_X509 = {
    **_CREDENTIALS,
    "passwordid": "string",
    "priority": "string",
    "sanity-check": "bool",
    "verify-peer": "bool",
}
_ANON = {**_CREDENTIALS, "priority": "string", "verify-peer": "bool"}
_PSK = {**_CREDENTIALS, "priority": "string", "username": "string", "verify-peer": "bool"}


def _credentials(words: Words, known: dict[str, str]) -> tuple[str, dict[str, str]]:
    """The folder, and what both kinds of credentials take."""
    endpoint = words.get("endpoint", "client")
    if endpoint not in ("client", "server"):
        raise _not_accepted("endpoint", endpoint)
    for word in known:
        if known[word] == "bool":
            _switch(words, word)
    _check_names(words, known)
    if "dir" not in words:
        raise OptionError("Missing 'dir' property value", field="object")
    priority = str(words.get("priority", ""))
    return str(words["dir"]), {"endpoint": str(endpoint), "priority": priority}


def _switch(words: Words, name: str) -> bool:
    from diskwright.block.options import Option

    return bool(Option(name, "bool").convert(words.get(name, True)))


def _x509(name: str, words: Words) -> object:
    """Certificates in a folder."""
    from diskwright.crypto.tls import X509Credentials

    folder, both = _credentials(words, _X509)
    key = words.get("passwordid")
    password = b"" if key is None else objects.find(str(key))
    if not isinstance(password, bytes):
        raise OptionError(f"No secret with id '{key}'", field="object")
    return X509Credentials(
        folder,
        **both,
        verify_peer=_switch(words, "verify-peer"),
        password=password,
        sanity_check=_switch(words, "sanity-check"),
    )


def _psk(name: str, words: Words) -> object:
    """Keys that both sides know."""
    from diskwright.crypto.tls import PSK_NAME, PskCredentials

    folder, both = _credentials(words, _PSK)
    return PskCredentials(folder, **both, username=str(words.get("username", PSK_NAME)))


# --------------------------------------------------------------------------------- throttles


def _throttle_properties() -> dict[str, str]:
    limits = {
        f"x-{unit}-{way}{what}": "int"
        for unit in ("bps", "iops")
        for way in ("read", "total", "write")
        for what in ("-max-length", "-max", "")
    }
    limits["x-iops-size"] = "int"
    return {"limits": "ThrottleLimits", **dict(sorted(limits.items(), key=_longest_first))}


def _longest_first(item: tuple[str, str]) -> str:
    """The order in which QEMU lists them: what a name goes on with comes before its end."""
    return item[0] + "~"


def _throttle_group(name: str, words: Words) -> object:
    """A set of limits, kept alive under its name."""
    from diskwright.drivers.filters.throttle import shared_group

    known = _throttle_properties()
    limits: dict[str, int] = {}
    for word, value in words.items():
        inner = word.startswith("limits.") or isinstance(value, dict)
        given = value if isinstance(value, dict) else {word.removeprefix("limits."): value}
        for key, number in given.items():
            shown = f"limits.{key}" if inner else key
            if f"x-{key}" not in known if inner else key not in known:
                raise OptionError(f"Parameter '{shown}' is unexpected", field="object")
            try:
                limits[key.removeprefix("x-")] = int(str(number), 0)
            except ValueError:
                raise OptionError(f"Parameter '{shown}' expects integer", field="object") from None
    group = shared_group(name)
    group.configure(limits)
    return group


# ----------------------------------------------------------------------------- authorization

_AUTHZ_SIMPLE = {"identity": "string"}
_AUTHZ_LIST = {"policy": "QAuthZListPolicy", "rules": "QAuthZListRule"}


def _authz_simple(name: str, words: Words) -> object:
    """One name that is let in."""
    from diskwright.crypto.authz import ALLOW, Authorization, Rule

    if "identity" not in words:
        raise OptionError("Parameter 'identity' is missing", field="object")
    _check_names(words, _AUTHZ_SIMPLE)
    return Authorization([Rule(str(words["identity"]), ALLOW)])


def _authz_list(name: str, words: Words) -> object:
    """Rules, of which the first that fits decides."""
    from diskwright.block.filename import nested
    from diskwright.crypto.authz import DENY, EXACT, Authorization, Rule

    given = nested(words)
    _check_names(given, _AUTHZ_LIST)
    rules = given.get("rules", [])
    if isinstance(rules, dict):
        rules = [rules[key] for key in sorted(rules, key=int)]
    assert isinstance(rules, list)
    made = []
    for number, rule in enumerate(rules):
        for needed in ("match", "policy"):
            if needed not in rule:
                raise OptionError(f"Parameter 'rules.{number}.{needed}' is missing", field="object")
        made.append(Rule(str(rule["match"]), str(rule["policy"]), str(rule.get("format", EXACT))))
    return Authorization(made, str(given.get("policy", DENY)))


_KINDS: dict[str, Callable[[str, Words], object]] = {
    "authz-list": _authz_list,
    "authz-simple": _authz_simple,
    "secret": _secret,
    "throttle-group": _throttle_group,
    "tls-creds-psk": _psk,
    "tls-creds-x509": _x509,
}
