"""Wrong calls: each must be refused in QEMU's words, with its exit code, and leave its files.

A line is a command line as a user would write it; all run in a folder that has a few small
images. Nothing of what is expected stands here: qemu-img says it when the test runs.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer


def read_table() -> dict[str, list[str]]:
    """The lines of wrong_calls.txt, by the word in brackets before them."""
    table: dict[str, list[str]] = {}
    for line in (Path(__file__).parent / "wrong_calls.txt").read_text().splitlines():
        if line.startswith("["):
            lines = table.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            lines.append(line)
    return table


TABLE = read_table()
LINES = [line for lines in TABLE.values() for line in lines]


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every line runs."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "a").write_bytes(bytes(65536))
    (folder / "b").write_bytes(b"b" * 65536)
    (folder / "big").write_bytes(bytes(1 << 20))
    img = real["qemu-img"]
    for line in (
        "create -q -f qcow2 a.q 64k",
        "create -q -f qcow2 named.q 64k",
        "snapshot -c one named.q",
        "create -q -f qcow2 marked.q 64k",
        "bitmap --add marked.q b0",
        "create -q -f qcow2 -o compat=0.10 old.q 64k",
        "create -q -f qcow2 -b a.q -F qcow2 o.q",
        "create -q -f qcow2 -u -b nobase -F raw broken.q 64k",
        "create -q -f vdi a.vdi 64k",
        "create -q -f vpc a.vpc 64k",
        "create -q -f qcow2 -b a.vpc -F vpc longvpc.q 1M",
        "create -q -f qcow2 -b a.vdi -F vdi longvdi.q 1M",
    ):
        done = img.run(*line.split(), cwd=folder)
        assert done.code == 0, done
    return folder


def test_there_are_enough_of_them() -> None:
    assert len(set(LINES)) == len(LINES) >= 600


@pytest.mark.parametrize("line", LINES)
def test_wrong_call(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    before = {path.name: path.read_bytes() for path in pristine.iterdir()}
    wanted = pair.same(line)
    assert wanted.code != 0
    pair.same_tree(set(before))
    for folder in pair.folders:
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        left = {name: after[name] for name in before if after.get(name) != before[name]}
        assert not left, f"{folder.name}: changed {sorted(left)}"
