"""The reference page of `diskwright-nbd`, and its part of the compatibility page."""

from __future__ import annotations

import ast
from pathlib import Path

from diskwright.cli import nbd
from docs.command_pages import table
from docs.test_modules import TestModule

TESTS = Path(__file__).resolve().parent.parent / "tests" / "differential"
#: What is meant to be other than in qemu-nbd.
DIFFERENCES = (
    "A file that is no socket is not removed to make room for one: `-k` refuses it.",
    "`-c` serves the device over a pair of sockets, so `-k` says nothing with it.",
    "`-d` fails on what is no NBD device; qemu-nbd says that it was disconnected.",
    "`-v` says why a client was left.",
    "`--selinux-label` is refused: run the program in the context that its socket shall have.",
    "`-L` without `-b` asks `localhost`, which certificates name; qemu-nbd asks 0.0.0.0.",
    "A part of a certificate's name that GnuTLS has no word for is called as OpenSSL calls it, "
    "with its text; qemu-nbd has numbers there.",
    "A request to cache brings data up from a backing file; qemu-nbd notes zeroes there, too, and "
    "refuses where the image is served for reading only.",
    "An option of the handshake has at most 64 KiB; qemu-nbd listens to 32 MiB.",
    "What `--help` says is our own.",
)


def page(made_by: str) -> str:
    """The reference page."""
    lines = ["# diskwright-nbd", "", made_by, ""]
    lines += ["Serves a disk image to NBD clients, with the words and exit codes of `qemu-nbd`"]
    lines += ["10.0.2; for several images under names see [`diskwright serve`](serve.md).", ""]
    lines += ["```sh", "diskwright-nbd [options] FILE", "diskwright-nbd -L [options]", "```", ""]
    lines += [*table(nbd.FLAGS), ""]
    lines += ["Without `-t` it ends when the last client that came through its handshake leaves."]
    lines += ["SIGTERM, SIGINT and SIGHUP end it too: what was asked for is answered, clients"]
    lines += [
        "have two seconds to take it, the image is flushed and closed, the exit code is 0.",
        "",
    ]
    lines += ["Of `-e N` clients more, others wait until one leaves. Several connections of one"]
    lines += [
        "client (`can_multi_conn`) are offered where N is not 1: all of them use one node, so"
    ]
    lines += ["a flush of any covers the writes of all.", ""]
    lines += ["Clients may use simple, structured or extended replies, the contexts"]
    lines += ["`base:allocation`, with `-A` `qemu:allocation-depth`, with `-B`"]
    lines += ["`qemu:dirty-bitmap:NAME`, and requests of up to 32 MiB of data. A socket that a"]
    lines += ["service manager gives (`LISTEN_FDS=1`) takes the place of `-k`, `-b` and `-p`.", ""]
    lines += [
        "`DISKWRIGHT_NO_BYPASS=1` in the environment has every request go through the image's"
    ]
    lines += [
        "node, without the ways around it: slower, and for finding out whether those are why.",
        "",
    ]
    lines += ["## Where it differs from qemu-nbd", ""]
    lines += [f"- {difference}" for difference in DIFFERENCES]
    return "\n".join(lines) + "\n"


def compatibility() -> list[str]:
    """Lines for the compatibility page: every option, and what compares it."""
    used = _uses()
    lines = ["", "## diskwright-nbd", ""]
    lines += ["Options of qemu-nbd; *yes* stands only beside a test that compares them.", ""]
    lines += ["| option | like qemu-nbd | compared by |", "| --- | --- | --- |"]
    for flag in nbd.FLAGS:
        tests: set[str] = set()
        for word in flag.words:
            tests |= used.get(word, set())
        name = ", ".join(f"`{word}`" for word in flag.words)
        proof = ", ".join(f"`{test}`" for test in sorted(tests))
        lines.append(f"| {name} | {'yes' if tests else 'no'} | {proof} |")
    return lines


def _uses() -> dict[str, set[str]]:
    """Word of an option -> the tests that say it."""
    found: dict[str, set[str]] = {}
    for path in sorted(TESTS.glob("test_nbd_*.py")):
        module = TestModule(path)
        for name, node in module.tests():
            for text in _texts(node, module.tables):
                for word in text.split():
                    if word.startswith("-"):
                        found.setdefault(word.partition("=")[0], set()).add(name)
    return found


def _texts(node: ast.AST, tables: dict[str, ast.AST], depth: int = 0) -> list[str]:
    """All strings that a test says, itself or by a table."""
    found: list[str] = []
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            found.append(inner.value)
        elif isinstance(inner, ast.Name) and inner.id in tables and depth < 3:
            found += _texts(tables[inner.id], tables, depth + 1)
    return found
