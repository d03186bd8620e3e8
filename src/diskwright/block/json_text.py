"""JSON as QEMU reads it inside of names: `json:{…}`.

It differs from the standard's in that strings may stand in single quotes, a key may occur only
once, and every refusal has QEMU's words, which the standard library's reader has not. It also
costs no import.

Invariants:
1. Whatever the text is, the result is a value or a ValueError with one line.
2. Depth is bounded by `MAX_DEPTH`, long before the interpreter's stack is.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    Token = tuple[str, object]

#: Depth of containers. QEMU accepts 1024; a graph of nodes is a few deep.
MAX_DEPTH = 128

_ESCAPES = {
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}
_KEYWORDS = {"true": True, "false": False, "null": None}
_SPACE = " \t\r\n"
_PUNCTUATION = "{}[],:"
_LOWER = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_HEX_DIGITS = frozenset("0123456789abcdefABCDEF")


def parse(text: str) -> object:
    """The value that `text` is.

    Raises:
        ValueError: it is none; its text is QEMU's sentence.
    """
    tokens = _tokens(text)
    first = next(tokens, None)
    if first is None:
        raise ValueError("Expecting a JSON value")
    found = _value(tokens, first, 0)
    try:
        ended = next(tokens, None) is None
    except ValueError:
        ended = False
    if not ended:
        raise ValueError("Expecting at most one JSON value")
    return found


def _refused(reason: str) -> ValueError:
    return ValueError(f"JSON parse error, {reason}")


# ------------------------------------------------------------------------------- words


def _tokens(text: str) -> Iterator[Token]:
    """(kind, value) pairs; kind is a punctuation mark, "value", "string" or "keyword"."""
    position = 0
    while position < len(text):
        letter = text[position]
        if letter in _SPACE:
            position += 1
        elif letter in _PUNCTUATION:
            position += 1
            yield letter, None
        elif letter in "\"'":
            string, position = _string(text, position)
            yield "string", string
        elif letter in _LOWER:
            start = position
            while position < len(text) and text[position] in _LOWER:
                position += 1
            word = text[start:position]
            yield "keyword", word
        elif letter in _DIGITS or letter == "-":
            number, position = _number(text, position)
            yield "value", number
        else:
            raise _refused(f"stray '{letter}'")


def _string(text: str, start: int) -> tuple[str, int]:
    """The string whose opening quote is at `start`, and where it ends."""
    quote = text[start]
    pieces: list[str] = []
    position = start + 1
    while position < len(text):
        letter = text[position]
        if letter == quote:
            return "".join(pieces), position + 1
        if letter < " ":
            raise _refused(f"stray '{text[start : position + 1]}'")
        if letter == "\\":
            piece, position = _escape(text, start, position + 1)
            pieces.append(piece)
        else:
            pieces.append(letter)
            position += 1
    raise _refused(f"stray '{text[start:]}'")


def _escape(text: str, start: int, position: int) -> tuple[str, int]:
    """What the escape at `position`, after its backslash, stands for, and where it ends."""
    if position >= len(text):
        raise _refused(f"stray '{text[start:]}'")
    letter = text[position]
    if letter in _ESCAPES:
        return _ESCAPES[letter], position + 1
    if letter != "u":
        raise _refused("invalid escape sequence in string")
    code = _hex4(text, position + 1)
    end = position + 5
    if 0xD800 <= code < 0xDC00 and text[end : end + 2] == "\\u":
        low = _hex4(text, end + 2)
        if 0xDC00 <= low < 0xE000:
            return chr(0x10000 + ((code - 0xD800) << 10) + low - 0xDC00), end + 6
    if 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE or not code:
        raise _refused(f"\\u{text[position + 1 : end]} is not a valid Unicode character")
    return chr(code), end


def _hex4(text: str, position: int) -> int:
    digits = text[position : position + 4]
    if len(digits) < 4 or not _HEX_DIGITS.issuperset(digits):
        before, quote, _ = digits.partition('"')
        raise _refused(f"\\u{before}{quote} is not a valid Unicode character")
    return int(digits, 16)


def _number(text: str, start: int) -> tuple[int | float, int]:
    """The number that begins at `start`, and where it ends."""

    def digits(position: int) -> int:
        """Where the digits at `position` end; there must be one."""
        end = position
        while end < len(text) and text[end] in _DIGITS:
            end += 1
        if end == position:
            raise _refused(f"stray '{text[start : position + 1]}'")
        return end

    whole = start + (text[start] == "-")
    end = digits(whole)
    if text[whole] == "0" and end > whole + 1:
        raise _refused(f"stray '{text[start : whole + 2]}'")
    is_float = False
    if text[end : end + 1] == ".":
        is_float = True
        end = digits(end + 1)
    if text[end : end + 1] in ("e", "E"):
        is_float = True
        end += 1
        end = digits(end + (text[end : end + 1] in ("+", "-")))
    word = text[start:end]
    # a whole number of more digits than any size has is a float, as for QEMU
    return (float(word) if is_float or len(word) > 20 else int(word)), end


# ------------------------------------------------------------------------------- structure


def _take(tokens: Iterator[Token]) -> Token:
    """The next token, which must be there."""
    token = next(tokens, None)
    if token is None:
        raise _refused("premature EOI")
    return token


def _value(tokens: Iterator[Token], token: Token, depth: int) -> object:
    """The value that begins with `token`."""
    kind, found = token
    if kind in ("value", "string"):
        return found
    if kind == "keyword":
        if found not in _KEYWORDS:
            raise _refused(f"invalid keyword '{found}'")
        return _KEYWORDS[str(found)]
    if kind not in ("{", "["):
        raise _refused("expecting value")
    if depth == MAX_DEPTH:
        raise ValueError("JSON nesting depth limit exceeded")
    return _object(tokens, depth + 1) if kind == "{" else _list(tokens, depth + 1)


def _object(tokens: Iterator[Token], depth: int) -> dict[str, object]:
    """The members after "{"."""
    members: dict[str, object] = {}
    token = _take(tokens)
    if token[0] == "}":
        return members
    while True:
        key = _value(tokens, token, depth)
        if token[0] != "string":
            raise _refused("key is not a string in object")
        if _take(tokens)[0] != ":":
            raise _refused("missing : in object pair")
        value = _value(tokens, _take(tokens), depth)
        if key in members:
            raise _refused("duplicate key")
        members[str(key)] = value
        separator = _take(tokens)[0]
        if separator == "}":
            return members
        if separator != ",":
            raise _refused("expected separator in dict")
        token = _take(tokens)


def _list(tokens: Iterator[Token], depth: int) -> list[object]:
    """The items after "["."""
    items: list[object] = []
    token = _take(tokens)
    if token[0] == "]":
        return items
    while True:
        items.append(_value(tokens, token, depth))
        separator = _take(tokens)[0]
        if separator == "]":
            return items
        if separator != ",":
            raise _refused("expected separator in list")
        token = _take(tokens)
