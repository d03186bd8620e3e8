"""`map`: which file a run is said to lie in, where filters are between it and the format."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair

pytestmark = pytest.mark.peer

_FILE = '{"driver":"file","filename":"disk.qcow2"}'
_FIXED = '{"driver":"file","filename":"fixed.vhd"}'
_THROTTLE = '{"driver":"throttle","throttle-group":"g","file":%s}'
_RAW = '{"driver":"raw","offset":0,"file":%s}'


def _json(*nodes: str) -> str:
    """A name for a shell; each node is the file of the one before."""
    made = "%s"
    for node in nodes:
        made = made.replace("%s", node)
    return f"'json:{made}'"


#: How `create` makes each image.
MADE = {
    "qcow2": "disk.qcow2",
    "vpc": "disk.vhd",
    "vpc -o subformat=fixed": "fixed.vhd",
    "vdi": "disk.vdi",
}
NAMES = [
    "disk.qcow2",
    "blkdebug::disk.qcow2",
    "blkdebug:rules:disk.qcow2",
    "--image-opts driver=qcow2,file.driver=blkdebug,file.image.filename=disk.qcow2",
    _json('{"driver":"qcow2","file":%s}', _THROTTLE, _FILE),
    _json('{"driver":"qcow2","file":%s}', _RAW, _FILE),
    _json('{"driver":"raw","file":%s}', _THROTTLE, _FILE),
    _json(_THROTTLE, _RAW, _FILE),
    "-f raw blkdebug::disk.qcow2",
    "-f vpc blkdebug::disk.vhd",
    "-f vpc blkdebug::fixed.vhd",
    _json('{"driver":"raw","file":%s}', '{"driver":"vpc","file":%s}', _FIXED),
    _json(_THROTTLE, '{"driver":"vpc","file":%s}', _THROTTLE, _FIXED),
    "--image-opts driver=vdi,file.driver=blkdebug,file.image.filename=disk.vdi",
]


@pytest.mark.parametrize("name", NAMES)
def test_the_file_of_a_run(name: str, real, ours, tmp_path: Path) -> None:
    img, io = real["qemu-img"], real["qemu-io"]
    pair = Pair(img, ours, tmp_path)
    for folder in pair.folders:
        (folder / "rules").write_text("")
        for words, made in MADE.items():
            img.run("create", "-q", "-f", *words.split(), made, "1M", cwd=folder)
            done = io.run("-f", words.split()[0], "-c", "write -P 1 0 64k", made, cwd=folder)
            assert done.code == 0, done
    pair.same(f"map --object throttle-group,id=g {name}", expect=0)
    pair.same(f"info --object throttle-group,id=g {name}", expect=0)
