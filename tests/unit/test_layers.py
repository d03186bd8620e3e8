"""The direction of imports: top imports bottom, never the other way."""

from __future__ import annotations

import ast

from diskwright.block import registry
from tests import rooms

#: Names of drivers that are words of the engine too: "file" is also the name of a child.
_ALSO_WORDS = {"file"}


def test_every_file_is_in_a_room_of_the_table():
    unknown = {
        path.name
        for path in rooms.SOURCE.iterdir()
        if path.is_dir() and path.name != "__pycache__" and path.name not in rooms.MAY_IMPORT
    }
    assert not unknown, f"rooms that the table does not know: {sorted(unknown)}"


def test_rooms_import_downwards_only():
    wrong = []
    for path in rooms.sources():
        room = rooms.room_of(rooms.module_of(path))
        allowed = rooms.MAY_IMPORT[room] | {room}
        for imported in rooms.imports_of(path):
            if rooms.room_of(imported.module) not in allowed:
                rule = f"{room} may import {', '.join(sorted(rooms.MAY_IMPORT[room])) or 'nothing'}"
                wrong.append(f"{imported}; rule: {rule}")
    assert not wrong, "\n".join(wrong)


def test_no_driver_imports_another():
    wrong = []
    for path in rooms.sources():
        own = rooms.driver_of(rooms.module_of(path))
        if own is None:
            continue
        for imported in rooms.imports_of(path):
            if rooms.driver_of(imported.module) not in (None, own):
                wrong.append(f"{imported}; rule: a driver imports no other driver")
    assert not wrong, "\n".join(wrong)


def test_operations_name_no_driver():
    drivers = {*registry.FORMATS, *registry.PROTOCOLS, *registry.FILTERS} - _ALSO_WORDS
    wrong = []
    for path in sorted((rooms.SOURCE / "operations").rglob("*.py")):
        tree = ast.parse(path.read_bytes(), str(path))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in drivers:
                where = f"{path.relative_to(rooms.ROOT)}:{node.lineno}"
                wrong.append(f"{where}: {node.value!r}; rule: an operation names no driver")
    assert not wrong, "\n".join(wrong)


def test_the_first_line_of_each_room_says_what_lives_there():
    silent = []
    for folder in {path.parent for path in rooms.sources()}:
        init = folder / "__init__.py"
        if not init.exists() or not ast.get_docstring(ast.parse(init.read_bytes())):
            silent.append(str(folder.relative_to(rooms.ROOT)))
    assert not silent, f"without a first line: {sorted(silent)}"
