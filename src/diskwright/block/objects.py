"""What `--object` defines, by id: nodes find there what their options name.

It lies below the drivers, which know what they look for, and above nothing: whoever defines an
object (a command's words, a program) puts it here.
"""

from __future__ import annotations

from diskwright.errors import OptionError

#: id -> whatever has to stay alive. QEMU's objects share one space of names.
_defined: dict[str, object] = {}


def add(name: str, made: object) -> None:
    """Keep an object under its id.

    Raises:
        OptionError: there is one of that id.
    """
    if name in _defined:
        raise OptionError(
            f"attempt to add duplicate property '{name}' to object (type 'container')",
            field="object",
        )
    _defined[name] = made


def find(name: str) -> object | None:
    """The object of that id, if there is one."""
    return _defined.get(name)


def remove(name: str) -> None:
    """Forget the object of that id; whoever uses it keeps it."""
    _defined.pop(name, None)
