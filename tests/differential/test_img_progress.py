"""`-p`: what is written of how far a command is, however it ends."""

from __future__ import annotations

import random
import re
import shutil
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair

pytestmark = pytest.mark.peer

MIB = 1 << 20

ENDS = """
convert -p nofile x
convert -p -O foo e.q x
convert -p -o foo=1 e.q x
convert -p -B nofile -F raw -O qcow2 e.q x
convert -p e.q nodir/x
convert -p -l no e.q x
convert -p -S 1000 e.q x
convert -p -m 99 e.q x
convert -p -n big empty
convert -p -t foo e.q x
convert -p e.q
convert -p -T foo e.q x
convert -p --image-opts -f raw e.q x
convert -p -n --target-image-opts -O raw e.q x
convert -p -c -O raw e.q x
convert -p -q big x
convert -p big x
convert -p e.q x
convert -p empty x
convert -p -O qcow2 mixed x
convert -p -O qcow2 hole x
convert -p -f raw scattered x
convert -p -f raw -O qcow2 scattered x
commit -p nofile
commit -p -t foo t.q
commit -p e.q
commit -p -b nofile t.q
commit -p --image-opts foo
commit -p t.q
rebase -p t.q
rebase -p -b x nofile
rebase -p -b nofile t.q
rebase -p -u -b e.q -F foo t.q
rebase -p -b e.q -F foo t.q
rebase -p -b e.q -t foo t.q
rebase -p -u -b '' t.q
rebase -p -b '' t.q
compare -p nofile e.q
compare -p e.q nofile
compare -p -f foo e.q e.q
compare -p -T foo e.q e.q
compare -p --image-opts -f raw e.q big
compare -p e.q big
compare -p -s e.q big
compare -p big same
compare -p mixed big
compare -p empty empty
compare -p -q big same
compare -p huge.q huge.q
""".strip().splitlines()


@pytest.fixture(scope="module")
def pristine(real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    rng = random.Random(1)
    (folder / "big").write_bytes(rng.randbytes(48 * MIB))
    shutil.copy(folder / "big", folder / "same")
    (folder / "mixed").write_bytes(rng.randbytes(5 * MIB) + bytes(20 * MIB) + b"x" * 3 * MIB)
    (folder / "empty").touch()
    with (folder / "hole").open("wb") as file:
        file.write(rng.randbytes(48 * MIB))
        file.truncate(300 * MIB)
    with (folder / "scattered").open("wb") as file:
        for offset in (0, 2, 4, 32):
            file.seek(offset * MIB)
            file.write(rng.randbytes(MIB))
        file.truncate(40 * MIB)
    for line in (
        "create -q -f qcow2 e.q 1M",
        "create -q -f qcow2 -b e.q -F qcow2 t.q",
        "create -q -f qcow2 huge.q 8T",
    ):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    return folder


def once(text: str) -> str:
    """Without lines that are written again though nothing has changed: a job's clock ticks."""
    return re.sub(r"(    \([\d.]+/100%\)\r)\1+", r"\1", text)


@pytest.mark.parametrize("line", ENDS)
def test_how_far_it_is(line: str, pristine: Path, real, ours, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path)
    for folder in pair.folders:
        for each in pristine.iterdir():
            if each.suffix == ".q":
                shutil.copy(each, folder / each.name)
            else:
                (folder / each.name).symlink_to(each)
    pair.same(line, form=once)
