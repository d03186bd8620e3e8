"""A virtual machine on our servers: its disk, its kernel as an NBD client, and `-c` inside."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import require
from tests.differential.nbd_servers import serving
from tests.differential.programs import ended, environment
from tests.rooms import ROOT

pytestmark = [pytest.mark.peer, pytest.mark.guest, pytest.mark.timeout(400)]

GUEST = ROOT / "tests" / "peers" / "guest.sh"
NBD = [sys.executable, "-m", "diskwright.cli.nbd"]
#: what the guest does: $PORT is the server's, $SHARE a folder of ours, $NBD our program
SCRIPT = r"""
set -e
use() {
  mkfs.ext4 -q -F "$1"
  mkdir -p /mnt/disk
  mount "$1" /mnt/disk
  dd if=/dev/urandom of=/mnt/disk/data bs=64k count=32 status=none
  sum=$(sha256sum </mnt/disk/data)
  umount /mnt/disk
  echo 3 >/proc/sys/vm/drop_caches
  mount "$1" /mnt/disk
  [[ $(sha256sum </mnt/disk/data) == "$sum" ]]
  fstrim /mnt/disk
  umount /mnt/disk
  e2fsck -fn "$1" >/dev/null 2>&1
  echo "$2: $(blockdev --getsize64 "$1") bytes, the same"
}
use /dev/vda disk
nbd-client 10.0.2.2 "$PORT" /dev/nbd0 -N disk -b 512 >/dev/null
use /dev/nbd0 client
nbd-client -d /dev/nbd0 >/dev/null
$NBD -c /dev/nbd1 -f qcow2 --discard=unmap "$SHARE/inside"
use /dev/nbd1 device
$NBD -d /dev/nbd1
for _ in 1 2 3 4 5 6 7 8 9 10; do pgrep -f cli.nbd >/dev/null || break; sleep 0.2; done
! pgrep -fa cli.nbd
! $NBD -c /dev/nbd7 -f qcow2 "$SHARE/inside" 2>"$SHARE/refused"
"""


def test_the_kernel_uses_our_disks(real, tmp_path):
    """A file system on each, written, read back and trimmed; the images are sound afterwards."""
    if os.geteuid() != 0 or shutil.which("qemu-system-x86_64") is None:
        require("root and qemu-system-x86_64")
    for name in ("attached", "outside", "inside"):
        done = real["qemu-img"].run("create", "-q", "-f", "qcow2", name, "64M", cwd=tmp_path)
        assert done.code == 0
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = ["-t", "-e", "4", "-b", "127.0.0.1", "-p", str(port), "-x", "disk", "-f", "qcow2"]
    server = subprocess.Popen([*NBD, *words, "outside"], cwd=tmp_path, env=environment())
    attached = [*NBD, f"--socket={tmp_path / 's'}", "--share=2", "--discard=unmap", "attached"]
    with ended(server), serving(attached, tmp_path):
        _wait_for(port)
        disk = f"file=nbd+unix://?socket={tmp_path / 's'},format=raw,if=virtio,discard=unmap"
        done = subprocess.run(
            [GUEST, "--timeout", "300", "--share", str(tmp_path), "--modules",
             "ext4 virtio_blk nbd:nbds_max=4",
             "--qemu", f"-drive {disk}", "--env", "PORT", "--env", "SHARE", "--env", "NBD",
             "--", "bash", "-c", SCRIPT],
            env={**environment(), "PORT": str(port), "SHARE": str(tmp_path), "NBD": " ".join(NBD)},
            capture_output=True, text=True, timeout=390, cwd=ROOT,
        )  # fmt: skip
        server.terminate()
        assert server.wait(20) == 0
    assert done.returncode == 0, done.stdout + done.stderr
    assert "disk: 67108864 bytes, the same" in done.stdout
    assert "client: 67108864 bytes, the same" in done.stdout
    assert "device: 67108864 bytes, the same" in done.stdout
    assert "/dev/nbd1 disconnected" in done.stdout
    assert "modprobe nbd" in (tmp_path / "refused").read_text()
    for name in ("attached", "outside", "inside"):
        check = real["qemu-img"].run("check", name, cwd=tmp_path)
        assert check.code == 0, check


def _wait_for(port: int) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.05)
