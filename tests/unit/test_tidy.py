"""The sizes and names of the style, held as numbers.

`EXCEPTIONS` may only shrink: what is in it was measured, and a test fails when the code has become
better than its entry says.
"""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rooms import ROOT, sources

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 70  # without its docstring
MAX_POSITIONAL = 4
MAX_NESTING = 4
MAX_BLOB_BYTES = 200_000

#: "rule place" -> what was measured there. Lower or remove, never add or raise.
EXCEPTIONS: dict[str, int] = {}

BANNED_FILE_NAMES = {"utils", "util", "common", "helpers", "helper", "misc"}
BANNED_FUNCTION_STARTS = ("do_", "process_")
BANNED_CLASS_ENDS = ("Manager", "Helper", "Util", "Utils")
BANNED_NAMES = {"info2", "tmp2", "foo", "handle", "process"}

#: Imports that cost more than small commands do; inside of functions they are fine.
DEAR_IMPORTS = {
    "typing",
    "dataclasses",
    "re",
    "json",
    "argparse",
    "logging",
    "pathlib",
    "asyncio",
    "threading",
    "socket",
    "numpy",
    "subprocess",
    "tempfile",
    "inspect",
}
#: Files that no small command loads; these may import what they like at their top.
HEAVY_FILES = {
    "src/diskwright/drivers/protocols/nbd/stream.py",  # loaded where there is a socket to open
    "src/diskwright/crypto/tls_channel.py",  # loaded where there is one to encrypt
    "src/diskwright/cli/nbd_device.py",  # loaded where a server begins
    "src/diskwright/exports/nbd/channel.py",
    "src/diskwright/exports/nbd/listening.py",
    "src/diskwright/exports/nbd/output.py",
    "src/diskwright/exports/nbd/secure.py",
    "src/diskwright/exports/nbd/server.py",
    "src/diskwright/exports/nbd/service.py",
    "src/diskwright/block/patience.py",  # loaded where there is a socket
}

#: Words that stand nowhere in the tree, cut in two so that this file may say them.
BANNED_WORDS = [
    "/wo" + "rk/",
    "/tmp/" + "dw",
    "/ro" + "ot/",
    "pypi" + ".org",
    "debian" + ".org",
    "npmjs" + ".org",
    "FIX" + "ME",
    "XX" + "X",
]


def place(path: Path, name: str = "") -> str:
    """tests and messages name things so: src/diskwright/x.py::function"""
    return f"{path.relative_to(ROOT)}{'::' + name if name else ''}"


def over(rule: str, limit: int, measured: dict[str, int]) -> list[str]:
    """What breaks `limit`, with the exceptions considered, and exceptions that are stale."""
    found = []
    for where, value in sorted(measured.items()):
        allowed = EXCEPTIONS.get(f"{rule} {where}")
        if allowed is None and value > limit:
            found.append(f"{where}: {rule} is {value}, at most {limit}")
        elif allowed is not None and value > allowed:
            found.append(f"{where}: {rule} grew from {allowed} to {value}")
        elif allowed is not None and value <= limit:
            found.append(f"{where}: {rule} is {value} now; remove its exception")
        elif allowed is not None and value < allowed:
            found.append(f"{where}: {rule} is {value} now; lower its exception from {allowed}")
    for key in EXCEPTIONS:
        kind, _, where = key.partition(" ")
        if kind == rule and where not in measured:
            found.append(f"{where}: is gone; remove its exception from {rule}")
    return found


def suites() -> list[Path]:
    """The files of the tests."""
    return sorted((ROOT / "tests").rglob("*.py"))


class Function:
    """A function, by its place."""

    def __init__(self, path: Path, name: str, node: ast.FunctionDef) -> None:
        self.where = place(path, name)
        self.node = node


def functions(paths: list[Path]) -> Iterator[Function]:
    """Every function, methods and inner ones included, with its dotted name."""
    for path in paths:
        waiting: list[tuple[str, ast.AST]] = [("", ast.parse(path.read_bytes(), str(path)))]
        while waiting:
            prefix, outer = waiting.pop()
            for inner in ast.iter_child_nodes(outer):
                if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    name = f"{prefix}{inner.name}"
                    waiting.append((f"{name}.", inner))
                    if isinstance(inner, ast.FunctionDef):
                        yield Function(path, name, inner)
                else:
                    waiting.append((prefix, inner))


def length(function: ast.FunctionDef) -> int:
    """Lines from `def` to the end, without the docstring."""
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        lines -= (first.end_lineno or first.lineno) - first.lineno + 1
    return lines


def nesting(node: ast.AST) -> int:
    """How deep blocks lie in blocks; `elif` is not deeper than its `if`."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef | ast.Lambda):
            continue
        inner = nesting(child)
        opens = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try | ast.Match)
        is_elif = (
            isinstance(node, ast.If)
            and isinstance(child, ast.If)
            and node.orelse == [child]
            and child.col_offset == node.col_offset
        )
        deepest = max(deepest, inner + (opens and not is_elif))
    return deepest


def positional(function: ast.FunctionDef) -> int:
    """Parameters that may be given by position, without self."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    names = [argument.arg for argument in arguments]
    return len(names) - (bool(names) and names[0] in ("self", "cls"))


def is_record_constructor(function: ast.FunctionDef) -> bool:
    """A constructor that does nothing but keep its arguments: a record's."""
    return function.name == "__init__" and all(
        isinstance(statement, ast.Assign | ast.AnnAssign | ast.Expr) for statement in function.body
    )


def test_files_are_short():
    measured = {place(path): len(path.read_text().splitlines()) for path in [*sources(), *suites()]}
    assert not over("lines", MAX_FILE_LINES, measured), over("lines", MAX_FILE_LINES, measured)


def test_functions_are_short():
    measured = {item.where: length(item.node) for item in functions(sources())}
    found = over("length", MAX_FUNCTION_LINES, measured)
    assert not found, "\n".join(found)


def test_parameters_have_names():
    measured = {
        item.where: positional(item.node)
        for item in functions(sources())
        if not is_record_constructor(item.node)
    }
    found = over("positional", MAX_POSITIONAL, measured)
    assert not found, "\n".join(found)


def test_blocks_are_not_deep():
    measured = {item.where: nesting(item.node) for item in functions(sources())}
    found = over("nesting", MAX_NESTING, measured)
    assert not found, "\n".join(found)


def test_names_say_something():
    found = []
    for path in [*sources(), *suites()]:
        if path.stem in BANNED_FILE_NAMES:
            found.append(f"{place(path)}: a name for anything")
    for path in sources():
        for node in ast.walk(ast.parse(path.read_bytes(), str(path))):
            name = getattr(node, "name", "")
            if isinstance(node, ast.ClassDef) and name.endswith(BANNED_CLASS_ENDS):
                found.append(f"{place(path, name)}: a class for anything")
            if isinstance(node, ast.FunctionDef) and (
                name.lstrip("_").startswith(BANNED_FUNCTION_STARTS) or name in BANNED_NAMES
            ):
                found.append(f"{place(path, name)}: a name for anything")
    assert not found, "\n".join(found)


def test_dear_modules_are_imported_where_they_are_needed():
    found = []
    for path in sources():
        if place(path) in HEAVY_FILES:
            continue
        for node in ast.parse(path.read_bytes(), str(path)).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                if name.split(".")[0] in DEAR_IMPORTS:
                    found.append(f"{place(path)}:{node.lineno}: {name} at the top")
    assert not found, "\n".join(found)


def test_there_are_no_dataclasses():
    found = [
        f"{place(path)}:{node.lineno}"
        for path in sources()
        for node in ast.walk(ast.parse(path.read_bytes(), str(path)))
        if isinstance(node, ast.ImportFrom) and node.module == "dataclasses"
    ]
    assert not found, f"see docs/adr/0001-records.md: {found}"


def tracked() -> list[Path]:
    """The files of the tree, as git has them."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode != 0:
        pytest.skip("not a checkout of git's")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_tree_has_no_large_blobs():
    large = {place(path): path.stat().st_size for path in tracked()}
    found = over("bytes", MAX_BLOB_BYTES, large)
    assert not found, "\n".join(found)


def test_the_tree_has_no_banned_words():
    found = []
    for path in tracked():
        if path.name == "LICENSE":
            continue
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            found += [f"{place(path)}:{number}: {word}" for word in BANNED_WORDS if word in line]
    assert not found, "\n".join(found)


def test_every_file_postpones_annotations():
    found = [
        place(path)
        for path in sources()
        if "from __future__ import annotations" not in path.read_text()
        and len(path.read_text().splitlines()) > 1
    ]
    assert not found, found
