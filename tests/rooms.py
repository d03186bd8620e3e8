"""The rooms of the source tree: who may import whom, read from the files themselves.

tests/unit/test_layers.py holds the tree to `MAY_IMPORT`; docs/generate.py draws the same table
for the docs, with what is really imported.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "diskwright"

#: room -> rooms it may import, from docs/explanation/architecture.md; itself is understood.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "system": frozenset({"errors"}),
    "codecs": frozenset({"errors"}),
    "crypto": frozenset({"errors"}),
    "wire": frozenset({"errors"}),
    "block": frozenset({"system", "errors"}),
    "drivers": frozenset({"block", "wire", "codecs", "crypto", "system", "errors"}),
    "operations": frozenset({"block", "errors"}),
    "exports": frozenset({"block", "wire", "crypto", "errors"}),
    "daemon": frozenset({"operations", "exports", "block", "wire", "errors"}),
    "face": frozenset({"operations", "exports", "block", "crypto", "errors"}),
    "cli": frozenset(
        {
            "face",
            "daemon",
            "exports",
            "operations",
            "drivers",
            "block",
            "wire",
            "codecs",
            "crypto",
            "system",
            "errors",
        }
    ),
}

#: What the rooms are for, in a few words.
PURPOSE = {
    "cli": "commands: words in, text out",
    "face": "what users import: `import diskwright`",
    "daemon": "QMP",
    "exports": "a node offered to other programs",
    "operations": "what is done with nodes; names no driver",
    "drivers": "formats, protocols, filters; none imports another",
    "block": "the engine; names no driver",
    "wire": "messages of protocols as bytes",
    "codecs": "encode and decode one unit",
    "crypto": "ciphers, and credentials of TLS",
    "system": "the operating system behind one set of names",
    "errors": "every error there is",
}


class Import:
    """One import statement: where it stands and which of our modules it names."""

    def __init__(self, path: Path, line: int, module: str) -> None:
        self.path = path
        self.line = line
        self.module = module

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}: imports {self.module}"


def sources() -> list[Path]:
    """Every file of the package."""
    return sorted(SOURCE.rglob("*.py"))


def module_of(path: Path) -> str:
    """src/diskwright/block/node.py -> diskwright.block.node"""
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    """diskwright.block.node -> block; the package's own __init__ is the face."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "face"


def driver_of(module: str) -> str | None:
    """diskwright.drivers.formats.qcow2.tables -> formats.qcow2, for what belongs to a driver."""
    parts = module.split(".")
    if parts[1:2] != ["drivers"] or len(parts) < 4:
        return None
    return ".".join(parts[2:4])


def imports_of(path: Path) -> Iterator[Import]:
    """Our own modules that a file imports: for type checkers and inside functions too."""
    tree = ast.parse(path.read_bytes(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = _from_names(node)
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}:{node.lineno}: relative imports hide the room")
        else:
            continue
        for name in names:
            if name.split(".")[0] == "diskwright":
                yield Import(path, node.lineno, name)


def _from_names(node: ast.ImportFrom) -> list[str]:
    """`from a.b import c` names a.b.c where that is a module, else a.b."""
    module = node.module or ""
    found = []
    for alias in node.names:
        inner = SOURCE.parent.joinpath(*module.split("."), alias.name)
        is_module = inner.is_dir() or inner.with_suffix(".py").exists()
        found.append(f"{module}.{alias.name}" if is_module else module)
    return found


def edges() -> dict[str, set[str]]:
    """room -> rooms that its files import now."""
    found: dict[str, set[str]] = {}
    for path in sources():
        room = room_of(module_of(path))
        found.setdefault(room, set())
        for imported in imports_of(path):
            target = room_of(imported.module)
            if target != room:
                found[room].add(target)
    return found


def picture() -> str:
    """The rooms that exist, top to bottom, with what each imports, as text for a fence."""
    real = edges()
    order = [room for room in PURPOSE if room in real]
    width = max(map(len, order))
    lines = []
    for room in order:
        below = [name for name in order if name in real[room]]
        arrow = f"-> {' '.join(below)}" if below else ""
        lines.append(f"{room:<{width}}  {PURPOSE[room]:<52} {arrow}".rstrip())
    return "\n".join(lines)
