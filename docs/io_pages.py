"""The reference page of `diskwright-io`, and its part of the compatibility page."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from diskwright.cli import io
from diskwright.cli.grammar import Flag
from diskwright.cli.io_commands.declaration import IoCommand
from docs.command_pages import table
from docs.test_modules import TestModule

TESTS = Path(__file__).resolve().parent.parent / "tests" / "differential"
#: What is meant to be other than in qemu-io.
DIFFERENCES = (
    "Results of `aio_*` come in the order in which the requests end. A request that ends within "
    "50 ms does so before the next command begins.",
    "`aio_read -r` and `aio_write -r` work; qemu-io 10.0.2 ends by an assertion.",
    "`aio_write -z` reports the time it took; qemu-io the time since the machine started.",
    "`wait_break` refuses where no request is under way that could stop; qemu-io waits for ever.",
    "An option that `zone_append` does not have is refused; qemu-io says so and goes on.",
    "Where closing an image fails, a line says so; qemu-io is silent, or names a cache of its own.",
    "`write -z -n` on a VDI or VHD image succeeds where the range reads as zero already.",
    "A fixed VHD gives back the space of what is discarded; qemu-io does nothing.",
    "Of blkdebug's events, those of writing tables (`l1_update`, `l2_update`, "
    "`refblock_update_part`, `reftable_update`) are told as a flush writes them, where QEMU writes "
    "a new table within the request, and every request through its cache; `refblock_load` and "
    "`l2_load` are told where a table is read, not where it is in memory; `cluster_free` as space "
    "may be used again. The other events of allocation are told within the request.",
    "`reopen -o` takes the options of qcow2 and those that every node has; others, as `size` of "
    "raw, are refused by name unless they say what is so already.",
    "An image that was found to be corrupt can still be read where it is sound.",
    "With direct I/O (`-n`), `discard` gives back whole sectors; qemu-io pieces of such too.",
    "A line of more than 1,023 characters that comes from a file or a pipe is one command; qemu-io "
    "cuts it there, and takes the rest for another one.",
    "What `--help`, `help` and a line of usage say behind ` -- ` is our own.",
)
#: Options that are accepted, and why they change nothing.
IDLE = {
    ("read", "p"): "ignored, as by qemu-io",
    ("write", "p"): "ignored, as by qemu-io",
    ("zone_append", "p"): "ignored, as by qemu-io",
    **{
        (command, "r"): "there is nothing that buffers could be registered with"
        for command in ("read", "readv", "write", "writev", "aio_read", "aio_write")
    },
}


def commands() -> list[IoCommand]:
    """All commands, by name."""
    return [io.load(name) for name in sorted(io.COMMANDS)]


def page(made_by: str) -> str:
    """The reference page."""
    lines = ["# diskwright-io", "", made_by, ""]
    lines += ["Reads and writes an image as it is told, with the words, output and exit codes of"]
    lines += ["`qemu-io` 10.0.2: for tests, for trying things, for a look at some bytes.", ""]
    lines += ["```sh", "diskwright-io [options] [-c COMMAND]... [FILE]", "```", ""]
    lines += [*table(io.program_flags()), ""]
    lines += ["Without `-c`, commands are read from standard input; a terminal has a history."]
    lines += ["The exit code is 1 where a command failed or FILE could not be opened, else 0;"]
    lines += ["the commands after one that failed are done all the same.", ""]
    lines += ["Sizes and offsets take the suffixes k, M, G, T, P and E (powers of 1024).", ""]
    lines += ["## Commands"]
    short = {name: alias for alias, name in io.ALIASES.items()}
    for command in commands():
        lines += ["", f"### {command.name}", "", f"{command.summary.capitalize()}.", ""]
        lines += ["```text", f"{command.name} {command.synopsis}".rstrip(), "```"]
        if command.flags:
            lines += ["", *table(command.flags)]
        if command.name in short:
            lines += ["", f"In short: `{short[command.name]}`."]
        if command.notes:
            lines += ["", *command.notes.splitlines()]
    lines += ["", "## Where it differs from qemu-io", ""]
    lines += [f"- {difference}" for difference in DIFFERENCES]
    return "\n".join(lines) + "\n"


def compatibility() -> list[str]:
    """Lines for the compatibility page: every command and option, and what compares it."""
    used = _uses()
    lines = ["", "## diskwright-io", ""]
    lines += [
        "Commands and options of qemu-io; *yes* stands only beside a test that compares them."
    ]
    lines += ["", "| command | option | like qemu-io | compared by |", "| --- | --- | --- | --- |"]
    for flag in io.program_flags():
        word = f"--{flag.long}"
        tests = used.get(("", flag.short), set()) | used.get(("", word), set())
        name = f"`-{flag.short}`, `{word}`" if flag.short else f"`{word}`"
        lines.append(_row("", name, tests, ""))
    for command in commands():
        lines.append(_row(f"`{command.name}`", "", used.get((command.name, ""), set()), ""))
        for flag in command.flags:
            tests = used.get((command.name, flag.short), set())
            idle = IDLE.get((command.name, flag.short), "")
            lines.append(_row(f"`{command.name}`", f"`-{flag.short}`", tests, idle))
    return lines


def _row(command: str, option: str, tests: set[str], idle: str) -> str:
    answer = "yes" if tests else "no"
    if idle:
        answer = f"{answer}: {idle}"
    proof = ", ".join(f"`{test}`" for test in sorted(tests))
    return f"| {command} | {option} | {answer} | {proof} |"


# ------------------------------------------------------------------ what the tests compare


def _uses() -> dict[tuple[str, str], set[str]]:
    """(command, letter), ("", option of the program) -> the tests that say them."""
    found: dict[tuple[str, str], set[str]] = {}
    for path in sorted(TESTS.glob("test_io_*.py")):
        module = TestModule(path)
        for name, node in module.tests():
            for text in _texts(node, module.tables):
                for use in _uses_of(text):
                    found.setdefault(use, set()).add(name)
    return found


def _texts(node: ast.AST, tables: dict[str, ast.AST], depth: int = 0) -> Iterator[str]:
    """All strings that a test says, itself or by a table, line by line."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            yield from inner.value.splitlines()
        elif isinstance(inner, ast.Name) and inner.id in tables and depth < 3:
            yield from _texts(tables[inner.id], tables, depth + 1)


def _uses_of(text: str) -> Iterator[tuple[str, str]]:
    first, *rest = text.split() or [""]
    name = io.ALIASES.get(first, first)
    if name in io.COMMANDS:
        yield name, ""
        known = {flag.short: flag for flag in io.load(name).flags}
        for word in rest:
            yield from ((name, letter) for letter in _letters(word, known))
    elif first.startswith("-"):
        known = {flag.short: flag for flag in io.program_flags() if flag.short}
        for word in (first, *rest):
            if word.startswith("--"):
                yield "", word.partition("=")[0]
            else:
                yield from (("", letter) for letter in _letters(word, known))


def _letters(word: str, known: dict[str, Flag]) -> Iterator[str]:
    """The letters of bundled options, up to one that takes the rest as its value."""
    for letter in word[1:] if word.startswith("-") else "":
        if letter not in known:
            return
        yield letter
        if known[letter].metavar:
            return
