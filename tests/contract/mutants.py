"""Taking one mechanism out of the engine or a driver, for as long as a `with` lasts.

A mutant is a piece of a function's source and what stands there instead. If the piece is not in
the source any more the mutant says so: it has to follow the code.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType


class Mutant:
    """`target` is "module:Class.method"; `changes` are pairs (old, new) of its source.

    "$INDENT" in `new` is the indentation of the line in which `old` begins.
    """

    def __init__(self, name: str, target: str, *changes: tuple[str, str]) -> None:
        self.name = name
        self.target = target
        self.changes = changes

    def __repr__(self) -> str:
        return self.name

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run with the mechanism gone."""
        owner, attribute, function = found(self.target)
        source = textwrap.dedent(inspect.getsource(function))
        for old, new in self.changes:
            assert old in source, f"{self.name}: {old!r} is not in {self.target} any more"
            line = next(line for line in source.splitlines() if old.splitlines()[0] in line)
            indent = line[: len(line) - len(line.lstrip())]
            source = source.replace(old, new.replace("$INDENT", indent))
        with replaced(owner, attribute, compiled(ast.parse(source), function)):
            yield


def found(target: str) -> tuple[object, str, FunctionType]:
    """(owner, attribute, function) of "module:Class.method" or "module:function"."""
    module, _, path = target.partition(":")
    name, _, attribute = path.rpartition(".")
    loaded = importlib.import_module(module)
    owner = getattr(loaded, name) if name else loaded
    function = vars(owner)[attribute]
    return owner, attribute, function


def compiled(tree: ast.Module, like: FunctionType) -> FunctionType:
    """The function that `tree` defines, with the globals of `like`."""
    names: dict[str, object] = {}
    ast.fix_missing_locations(tree)
    exec(compile(tree, f"<mutant of {like.__qualname__}>", "exec"), like.__globals__, names)
    made = names[like.__name__]
    assert isinstance(made, FunctionType)
    return made


@contextmanager
def replaced(owner: object, attribute: str, value: object) -> Iterator[None]:
    """An attribute of a class or module, changed for as long as this lasts."""
    kept = vars(owner)[attribute]
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, kept)


# ------------------------------------------------------------------------------------- barriers


class Barrier:
    """One call of `flush` in a function: what is durable before it goes on."""

    def __init__(self, module: str, method: str, number: int) -> None:
        self.module = module
        self.method = method
        self.number = number  # of the calls in the method

    def __repr__(self) -> str:
        return f"{self.module.removeprefix('diskwright.')}:{self.method}-{self.number}"

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run without it."""
        owner, attribute, function = found(f"{self.module}:{self.method}")
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        taken = _Without(self.number)
        taken.visit(tree)
        assert taken.seen > self.number, f"{self} is not there any more"
        with replaced(owner, attribute, compiled(tree, function)):
            yield


class _Without(ast.NodeTransformer):
    def __init__(self, number: int) -> None:
        self.number = number
        self.seen = 0

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        if not _is_barrier(node):
            return node
        self.seen += 1
        return ast.Pass() if self.seen - 1 == self.number else node


def _is_barrier(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
        and isinstance(node.value.func, ast.Attribute)
        and node.value.func.attr in ("flush", "flush_inside", "flush_all", "_flush_tables")
    )


def barriers(module: str) -> Iterator[Barrier]:
    """Every barrier in the functions of a module and in the methods of its classes."""
    path = importlib.import_module(module).__file__
    assert path is not None
    for outer in ast.parse(Path(path).read_bytes()).body:
        inner = outer.body if isinstance(outer, ast.ClassDef) else [outer]
        prefix = f"{outer.name}." if isinstance(outer, ast.ClassDef) else ""
        for function in inner:
            if isinstance(function, ast.FunctionDef):
                count = sum(_is_barrier(statement) for statement in ast.walk(function))
                for number in range(count):
                    yield Barrier(module, f"{prefix}{function.name}", number)
