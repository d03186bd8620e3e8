"""NBD devices of the kernel: given an image, and taken it from them.

Source: linux/nbd.h; the conversation with the kernel is the one of any client, over a socket pair.
"""

from __future__ import annotations

import os
import socket
import threading

from diskwright.cli import output
from diskwright.errors import IOFailure, from_oserror
from diskwright.system import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from diskwright.exports.nbd.export import NodeExport
    from diskwright.exports.nbd.server import NbdServer

_HINT = "the kernel's NBD driver makes such devices: `modprobe nbd`, where the kernel has it"


def connect(path: str, export: NodeExport) -> Callable[[NbdServer], None]:
    """Open the device `path`; returns what gives it `export` as a server begins.

    Raises:
        IOFailure: there is no such device.
    """
    descriptor = _open(path, "Failed to open")

    def begin(server: NbdServer) -> None:
        ours, kernels = socket.socketpair()
        try:
            host.nbd_attach(descriptor, kernels.fileno(), export.told.size, export.told.flags)
        except OSError as error:
            raise _refused(path, error) from error
        server.adopt(ours, export)

        def serve() -> None:
            try:
                host.nbd_run(descriptor)  # until the device is taken back
            except OSError as error:
                output.complain(f"{path}: {error.strerror}")
            finally:
                host.nbd_detach(descriptor)
                os.close(descriptor)
                kernels.close()
                server.stop()

        threading.Thread(target=serve, name="nbd-device", daemon=True).start()

    return begin


def disconnect(path: str) -> int:
    """Take the device back; returns the program's exit code.

    Raises:
        IOFailure: there is no such device.
    """
    descriptor = _open(path, "Cannot open")
    try:
        host.nbd_disconnect(descriptor)
    except OSError as error:
        raise _refused(path, error) from error
    finally:
        os.close(descriptor)
    output.say(f"{path} disconnected\n")
    return 0


def _open(path: str, failure: str) -> int:
    try:
        return os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raised = from_oserror(error, f"{failure} {path}", path=path)
        raised.hint, raised.hint_always = _HINT, True
        raise raised from error


def _refused(path: str, error: OSError) -> IOFailure:
    raised = from_oserror(error, f"Failed to set NBD socket of {path}", path=path)
    assert isinstance(raised, IOFailure)
    raised.hint, raised.hint_always = f"{path} may be in use, or no NBD device; {_HINT}", True
    return raised
