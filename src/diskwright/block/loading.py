"""Loading what is used only sometimes, by its name."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def load_named(target: str) -> Any:
    """What "module:attribute" names.

    It is what `importlib.import_module` does, which would load `warnings` first.
    """
    module, _, attribute = target.partition(":")
    __import__(module)
    return getattr(sys.modules[module], attribute)
