"""Records: slotted classes with a constructor of their own.

`dataclasses` costs more to import than the rest of a small command together, so a record
is a class with `__slots__` and an explicit `__init__` (docs/adr/0001-records.md).
"""

from __future__ import annotations


def constants(owner: type) -> dict[str, int]:
    """The named numbers of a class that has nothing else: what `enum` would cost time for."""
    return {name: value for name, value in vars(owner).items() if name.isupper()}


class Record:
    """A value with named fields, equal to another when all fields are."""

    __slots__: tuple[str, ...] = ()

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """The names of all fields, base classes first."""
        found: list[str] = []
        for base in reversed(cls.__mro__):
            found.extend(getattr(base, "__slots__", ()))
        return tuple(found)

    def as_dict(self) -> dict[str, object]:
        """The fields as a dict, in order of declaration."""
        return {name: getattr(self, name) for name in self.fields()}

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.fields())

    __hash__ = None  # type: ignore[assignment]  # records are mutable

    def __repr__(self) -> str:
        inside = ", ".join(f"{name}={getattr(self, name, None)!r}" for name in self.fields())
        return f"{type(self).__name__}({inside})"
