"""`--object` with every command, and options that no other suite has in a line that works."""

from __future__ import annotations

from pathlib import Path

import pytest

from diskwright.cli.objects import from_base64
from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

LINES = """
check --object secret,id=x,data=y a.q
check --object secret,id=x,file=b -U a.q
check -U --output=json a.q
check --force-share -f qcow2 a.q
commit --object secret,id=x,data=YWJj,format=base64 o.q
compare --object secret,id=x,data=abc,iv=foo a.q o.q
compare --object secret,id=x,data=,format=base64 a a
convert --object throttle-group,id=t,x-iops-total=1000 -O qcow2 a t
create --object throttle-group,id=t,limits.iops-total=1000 t 1M
dd --object secret,id=x,data=YWJj=,format=base64 if=a of=t
info --object '{"qom-type":"secret","id":"x","data":"y"}' a.q
info --object id=x,data=1,qom-type=secret a.q
info --object '{"qom-type":"throttle-group","id":"t","limits":{"iops-total":1}}' a.q
info --object throttle-group,id=t --image-opts driver=throttle,throttle-group=t,file.filename=a
map --object secret,id=x,data=y a.q
map -U --object secret,id=x,data=y --object secret,id=z,data=y --output=json o.q
measure --object secret,id=x,data=y -O qcow2 a.q
rebase --object secret,id=x,data=y -u -f qcow2 -b a.q -F qcow2 o.q
rebase -f qcow2 -b '' o.q
resize --object secret,id=x,data=y a.q 2M
snapshot --object secret,id=x,data=y -l a.q
info --object secret,id=x,data=YQ==YQ==,format=base64 a.q
info --object secret,id=x,data=YQ=a,format=base64 a.q
info --object secret,help
info --object throttle-group,help
""".strip().splitlines()


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "a").write_bytes(bytes(65536))
    (folder / "b").write_bytes(b"secret")
    for line in ("create -q -f qcow2 a.q 64k", "create -q -f qcow2 -b a.q -F qcow2 o.q"):
        assert real["qemu-img"].run(*line.split(), cwd=folder).code == 0
    return folder


@pytest.mark.parametrize("line", LINES)
def test_with_objects(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    pair.same(line, expect=0)
    pair.same_tree()


BASE64 = [
    "YQ==YQ==", "YQ", "YWI", "YWJj", "YWJjYQ", "YWJjY", "YQ=a", "YQ==YWJj", "YWI=YWI=",
    "Y=Q=YWJj", "YWJj\nYQ==", "YWI=YQ", "",
]  # fmt: skip


@pytest.mark.parametrize("text", BASE64)
def test_secrets_are_decoded_as_qemu_does(text: str, real, tmp_path: Path) -> None:
    """What it makes of the text opens what was encrypted with what we make of it."""
    (tmp_path / "text").write_text(text)
    (tmp_path / "key").write_bytes(from_base64(text.encode()))
    made = real["qemu-img"].run(
        *"create -q -f luks --object secret,id=s,file=key".split(),
        *"-o key-secret=s,iter-time=10 l 64k".split(),
        cwd=tmp_path,
    )
    assert made.code == 0, made
    opened = real["qemu-io"].run(
        *"-r --object secret,id=s,file=text,format=base64".split(),
        *"--image-opts driver=luks,key-secret=s,file.filename=l -c".split(),
        "read 0 512",
        cwd=tmp_path,
    )
    assert opened.code == 0, opened


@pytest.mark.parametrize("words", ["help", "?", "secret,help", "throttle-group,?"])
@pytest.mark.parametrize("program", ["qemu-img", "qemu-io", "qemu-nbd"])
def test_what_objects_there_are(words, program, real, ours, io, nbd, tmp_path: Path) -> None:
    """Every program tells it, and ends: all that is said here QEMU's says too."""
    mine = {"qemu-img": ours, "qemu-io": io, "qemu-nbd": nbd}[program]
    line = (*(["info"] if program == "qemu-img" else []), "--object", words)
    theirs, found = (each.run(*line, cwd=tmp_path) for each in (real[program], mine))
    assert (found.code, found.err) == (theirs.code, theirs.err) == (0, "")
    told = found.out.splitlines()
    assert len(told) > 2
    assert set(told) <= set(theirs.out.splitlines())
