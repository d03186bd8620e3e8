"""The operating system behind one set of names; imports nothing of ours but `errors`.

linux.py, macos.py and windows.py have the same functions; `host` is the one for this machine.
"""

from __future__ import annotations

import sys

if sys.platform == "win32":
    from diskwright.system import windows as host
elif sys.platform == "darwin":
    from diskwright.system import macos as host
else:
    from diskwright.system import linux as host

__all__ = ["host"]
