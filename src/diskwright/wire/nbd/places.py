"""Where NBD servers are: what both sides know of ports and of sockets with a path.

Source: NetworkBlockDevice/nbd, doc/uri.md; unix(7).
"""

from __future__ import annotations

import os

from diskwright.errors import OptionError

#: Where servers are looked for.
PORT = 10809
#: The longest path of a unix socket, its end included.
_MAX_PATH = 108


def check_path(path: str) -> None:
    """Refuse a path that is too long for a socket.

    Raises:
        OptionError: it is.
    """
    if len(os.fsencode(path)) >= _MAX_PATH:
        sentence = f"UNIX socket path '{path}' is too long"
        hint = f"Path must be less than {_MAX_PATH} bytes"
        raise OptionError(sentence, qemu=f"{sentence}\n{hint}", field="socket", hint=hint)
