"""Diskwright: disks and their images, as a library, as commands, and as servers.

Everything is loaded when it is first used: importing the package costs nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from diskwright.block.policy import Ask, FollowAll, FollowNothing, Policy, SameFolder
    from diskwright.crypto.tls import PskCredentials, X509Credentials
    from diskwright.errors import DiskwrightError
    from diskwright.exports.nbd.service import serve
    from diskwright.operations.amend import amend
    from diskwright.operations.bench import bench
    from diskwright.operations.bitmap import bitmap
    from diskwright.operations.check import check
    from diskwright.operations.commit import commit
    from diskwright.operations.compare import compare
    from diskwright.operations.convert import convert
    from diskwright.operations.create import create
    from diskwright.operations.info import info
    from diskwright.operations.inspect import inspect
    from diskwright.operations.map import map
    from diskwright.operations.measure import measure
    from diskwright.operations.opening import open
    from diskwright.operations.rebase import rebase
    from diskwright.operations.resize import resize
    from diskwright.operations.snapshot import snapshot

__version__ = "0.1.0"

__all__ = [
    "open",
    "create",
    "convert",
    "info",
    "inspect",
    "check",
    "map",
    "compare",
    "snapshot",
    "bitmap",
    "resize",
    "commit",
    "rebase",
    "measure",
    "bench",
    "amend",
    "serve",
    "Policy",
    "SameFolder",
    "FollowAll",
    "FollowNothing",
    "Ask",
    "X509Credentials",
    "PskCredentials",
    "DiskwrightError",
]

#: Operations come first, policies after them, then credentials.
_FIRST_POLICY = __all__.index("Policy")
_FIRST_CREDENTIALS = __all__.index("X509Credentials")

#: name -> the module it lives in
_HOMES = {
    **{name: f"diskwright.operations.{name}" for name in __all__[1:_FIRST_POLICY]},
    "open": "diskwright.operations.opening",
    "serve": "diskwright.exports.nbd.service",
    **dict.fromkeys(__all__[_FIRST_POLICY:_FIRST_CREDENTIALS], "diskwright.block.policy"),
    **dict.fromkeys(__all__[_FIRST_CREDENTIALS:-1], "diskwright.crypto.tls"),
    "DiskwrightError": "diskwright.errors",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'diskwright' has no attribute '{name}'")
    from importlib import import_module

    found = getattr(import_module(home), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
