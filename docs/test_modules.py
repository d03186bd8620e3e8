"""What a module of tests has at its top, for the pages that name the tests of an option."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


class TestModule:
    """The parsed source of a module of tests.

    Attributes:
        stem: the file's name without its ending.
        tables: name -> the expression that it is assigned.
        functions: name -> definition; tests are those whose name begins so.
    """

    def __init__(self, path: Path) -> None:
        tree = ast.parse(path.read_bytes(), str(path))
        self.stem = path.stem
        self.tables = {
            target.id: node.value
            for node in tree.body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        self.functions = {
            node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)
        }

    def tests(self) -> Iterator[tuple[str, ast.FunctionDef]]:
        """(what the pages call it, definition) of each test."""
        for name, node in self.functions.items():
            if name.startswith("test_"):
                yield f"{self.stem}::{name}", node
