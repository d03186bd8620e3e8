"""The part of the compatibility page about `diskwright-img`: commands, options, and their tests."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from diskwright.cli import tools
from diskwright.cli.grammar import Command, Flag
from diskwright.cli.run import STANDARD_FLAGS
from docs.test_modules import TestModule

TESTS = Path(__file__).resolve().parent.parent / "tests" / "differential"
#: Of a row that many tests show, so many are named.
MOST_NAMED = 6
#: Commands of qemu-img 10.0.2.
QEMU = (
    "amend bench bitmap check commit compare convert create dd info map measure rebase resize "
    "snapshot"
)
#: (command or "", key of the option) -> why the answer is "partly".
PARTLY = {
    ("", "trace"): "there are no trace events here",
    ("", "version"): "the version is ours",
    ("", "object"): "`secret`, `throttle-group`, `tls-creds-x509`, and, from Python 3.13 on, "
    "`tls-creds-psk`",
    ("bench", "native"): "no choice: each of the requests under way has a thread",
    ("bench", "aio"): "no choice: each of the requests under way has a thread",
    ("snapshot", "create"): "the long word takes a name; qemu-img's does not work",
    ("snapshot", "apply"): "the long word takes a name; qemu-img's does not work",
    ("snapshot", "delete"): "the long word takes a name; qemu-img's does not work",
}
#: Tests of lines that fail: they show a refusal, not that an option works.
REFUSALS = ("test_img_wrong_calls", "test_img_doubly_wrong", "test_img_every_option")


def compatibility() -> list[str]:
    """Lines for the compatibility page."""
    used = uses()
    lines = ["", "## diskwright-img", ""]
    lines += [
        "Commands and options of qemu-img 10.0.2; *yes* stands only beside tests that compare them",
        "where they work. How each option is refused is compared by `test_img_every_option` and",
        "`test_img_wrong_calls`. What differs on purpose, as the words of `--help` do, is listed",
        "with [the commands](reference/commands/README.md).",
        "",
        "| command | option | like qemu-img | compared by |",
        "| --- | --- | --- | --- |",
    ]
    for flag in STANDARD_FLAGS[1:]:
        lines.append(_row("", flag, used))
    for name in QEMU.split():
        if name not in tools.IMG.commands:
            lines.append(f"| `{name}` | | no: not built yet | |")
            continue
        command = tools.IMG.load(name)
        lines.append(f"| `{name}` | | {_answer(used.get((name, ''), set()), '')}")
        for flag in command.flags:
            if not flag.hidden and flag.key != "help":
                lines.append(_row(name, flag, used))
    return lines


def _row(command: str, flag: Flag, used: dict[tuple[str, str], set[str]]) -> str:
    words = [f"`-{flag.short}`"] if flag.short else []
    words += [f"`--{flag.long}`"] if flag.long else []
    why = PARTLY.get((command, flag.key), PARTLY.get(("", flag.key), ""))
    answer = _answer(used.get((command, flag.key), set()), why)
    shown = f"`{command}`" if command else ""
    return f"| {shown} | {', '.join(words)} | {answer}"


def _answer(tests: set[str], why: str) -> str:
    proofs = sorted(tests)
    named = ", ".join(f"`{test}`" for test in proofs[:MOST_NAMED])
    if len(proofs) > MOST_NAMED:
        named += f" and {len(proofs) - MOST_NAMED} more"
    if not proofs:
        return f"not compared{f': {why}' if why else ''} | |"
    return f"{f'partly: {why}' if why else 'yes'} | {named} |"


# ------------------------------------------------------------------ what the tests compare


def uses() -> dict[tuple[str, str], set[str]]:
    """(command, option's key or "") -> the tests that run such a line."""
    commands = {name: tools.IMG.load(name) for name in tools.IMG.commands}
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(TESTS.glob("test_*.py")):
        if path.stem in REFUSALS or path.stem.startswith("test_io_"):
            continue
        module = TestModule(path)
        for name, node in module.tests():
            for words in _lines(node, {**module.tables, **module.functions}, set()):
                for use in _said(words, commands):
                    found.setdefault(use, set()).add(name)
    return found


def _lines(node: ast.AST, named: dict[str, ast.AST], seen: set[str]) -> Iterator[list[str]]:
    """The command lines in a test, in tables and functions of its module that it uses."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Name) and inner.id in named and inner.id not in seen:
            seen.add(inner.id)
            yield from _lines(named[inner.id], named, seen)
        elif isinstance(inner, ast.List | ast.Tuple):
            yield [word for part in inner.elts for word in _words_of(part)]
        elif isinstance(inner, ast.Call):
            yield [word for part in inner.args for word in _words_of(part)]
        elif isinstance(inner, ast.Constant | ast.JoinedStr):
            for line in _text_of(inner).splitlines():
                yield _split(line)


def _words_of(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Starred):
        node = node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [word for part in node.elts for word in _words_of(part)]
    return _split(_text_of(node))


def _text_of(node: ast.AST) -> str:
    """A string; what is put into it when it runs counts as one word."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text_of(part) or "X" for part in node.values)
    return ""


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError:
        return []


def _said(words: list[str], commands: dict[str, Command]) -> Iterator[tuple[str, str]]:
    """(command, key of an option) of each option in a command line, ("", key) before it."""
    for word in words:
        for flag in STANDARD_FLAGS:
            if words[0] == word == f"--{flag.long}":
                yield "", flag.key
    if not words or words[0] not in commands:
        return
    command = commands[words[0]]
    yield command.name, ""
    for word in words[1:]:
        for flag in command.flags:
            long = flag.long and word.partition("=")[0] == f"--{flag.long}"
            short = flag.short and re.match(rf"-[a-zA-Z]*{re.escape(flag.short)}", word)
            if long or (short and not word.startswith("--")):
                yield command.name, flag.key
