"""Calls in which two things are wrong: what QEMU tells is told, and files are left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair
from tests.differential.programs import Program

pytestmark = pytest.mark.peer

LINES = """
create -f foo -o bar=1 x 1M
create -f foo -b nofile x
create -f foo x abc
create -f qcow2 -o bar=1 nodir/x 1M
create -f qcow2 -o bar=1 x abc
create -f qcow2 -o cluster_size=3 nodir/x 1M
create -f qcow2 -o cluster_size=3 x abc
create -f qcow2 -o bar=1 -b nofile -F raw x
create -f qcow2 -o bar=1 -b nofile -F foo x 1M
create -f qcow2 -b nofile -F foo nodir/x
create -f qcow2 -b nofile x abc
create -f qcow2 -o cluster_size=3 -b nofile -F raw x
create -f qcow2 -o size=x,bar=1 x
create -f qcow2 -o preallocation=x,compat=3 x 1M
create -f qcow2 -o compat=3,refcount_bits=3 x 1M
create -f qcow2 -o cluster_size=3,refcount_bits=3 x 1M
create -f qcow2 -o cluster_size=3 x 1E
create -f vdi -o static=x,foo=1 x 1M
create -f vdi -b a -F raw -o foo=1 x 1M
create -f vdi nodir/x 1P
create -f vpc -o subformat=x nodir/x 64T
create -f vpc nodir/x 64T
create -f raw -o foo=1 nodir/x
create -u -F foo -f qcow2 -b x nodir/y 1M
create --object foo -f bar x 1M
create -f qcow2 foo:x abc
create -f foo foo:x 1M
create -f qcow2 -o encryption=on -b nofile -F raw x 1M
convert -f foo nofile x
convert -f foo -O bar nofile x
convert -O foo nofile x
convert -O qcow2 -o foo=1 nofile x
convert -O qcow2 -o foo=1 a nodir/x
convert -O foo -o bar=1 a x
convert -O qcow2 -o cluster_size=3 a nodir/x
convert -O qcow2 -c -o foo=1 a x
convert -O raw -c -o foo=1 a x
convert -O vdi -c a nodir/x
convert -O raw -c a nodir/x
convert -O qcow2 -B nofile -F foo a x
convert -O qcow2 -B nofile a b x
convert -O raw -B nofile -F raw nofile x
convert -n -O foo a nofile
convert -n -O qcow2 nofile nofile2
convert -n -c -O raw a nofile
convert -n -B a a nofile
convert -n -o foo=1 nofile x
convert -t foo -T bar a x
convert -t foo nofile x
convert -T foo -O bar nofile x
convert -S x -m 99 a x
convert -m 99 -r x a x
convert -l no nofile x
convert -l no -O foo a.q x
convert -l no -c -O raw a.q x
convert -l snapshot.foo=1 -O foo nofile x
convert --image-opts -f raw foo x
convert --image-opts foo nodir/x
convert --target-image-opts -n a foo
convert --bitmaps -O raw nofile x
convert --bitmaps -O raw -c a.q x
convert --bitmaps -O raw -o foo=1 a x
convert --salvage -C -c a x
convert --skip-broken-bitmaps -C -c a x
convert --target-is-zero -o foo a x
convert --target-is-zero -C -S 4k a x
convert -U -n -O qcow2 -t foo nofile x
resize nofile abc
resize -f foo nofile 1M
resize -f foo nofile abc
resize --preallocation=x nofile 1M
resize --preallocation=x a abc
resize --preallocation=full --shrink -f raw a 1k
resize --preallocation=full -f raw a 1k
resize a.vdi 1k
resize --preallocation=full a.vdi 1k
resize --image-opts -f raw foo abc
resize --image-opts foo abc
resize -f qcow2 a abc
resize nofile 1M extra
resize named.q 1k
rebase -b nofile -F foo o.q
rebase -b nofile -F foo nofile2
rebase -f foo -b nofile nofile2
rebase -t foo -T bar -b nofile o.q
rebase -T bar -b nofile nofile2
rebase -f foo -T bar -b a o.q
rebase -t foo -f bar -b a o.q
rebase -u -b nofile -F foo nofile2
rebase -b nofile -F raw a
rebase -u -b nofile -F foo a
rebase -b nofile a.vdi
rebase -c -b nofile a.vdi
rebase -c -b nofile -F foo a
rebase --image-opts -f raw -t foo -b a o.q
rebase -b nofile broken.q
rebase -F foo nofile
commit -b nofile nofile2
commit -t foo -f bar nofile
commit -f foo nofile
commit -t foo nofile
commit -r x -t foo nofile
commit -b nofile a
commit -b nofile a.vdi
commit -b nofile broken.q
commit --image-opts -f raw -t foo a
compare -f foo -F bar nofile nofile2
compare -T foo -f bar a b
compare -f foo nofile a
compare nofile nofile2
compare a nofile -F foo
compare -F foo nofile a
compare -s -f foo nofile a
compare --image-opts -T foo -f raw a b
compare --image-opts foo nofile
snapshot -c s -f foo nofile
snapshot -a no -f foo nofile
snapshot -d no nofile
snapshot -c x -l nofile
snapshot -l -f foo nofile
snapshot -U -c s nofile
snapshot -a no broken.q
snapshot -l a extra
snapshot --image-opts -f raw -c x foo
map -f foo nofile
map --start-offset=x nofile
map --start-offset=x --max-length=y a
map --output=x --start-offset=y a
map --output=x nofile
map --image-opts -f foo nofile
map a b -f foo
check -f foo nofile
check -r x nofile
check -T foo -r x a.q
check -T foo -f bar nofile
check --output=x -r y a.q
check --image-opts -f raw -T foo a.q
check -T foo nofile
check -r all -f raw nofile
info -f foo nofile
info --output=x nofile
info --output=x -f foo a b
info --image-opts -f foo nofile
info --image-opts driver=foo,file.filename=nofile
info --image-opts driver=qcow2,foo=1,file.filename=nofile
info --image-opts driver=raw,file.driver=foo,file.filename=nofile,bar=1
info --image-opts driver=qcow2,file.filename=a,foo=1
info --image-opts driver=qcow2,file.foo=1,file.filename=nofile
info --image-opts driver=raw,offset=8M,foo=1,file.filename=a
info --image-opts driver=qcow2,lazy-refcounts=x,foo=1,file.filename=a.q
info --object foo -f bar nofile
info --object secret,id=x -f foo nofile
info -b -f foo broken.q
info a b --output=x
""".strip().splitlines()

IMAGES = """
create -q -f qcow2 a.q 64k
create -q -f qcow2 named.q 64k
snapshot -c one named.q
create -q -f qcow2 -b a.q -F qcow2 o.q
create -q -f qcow2 -u -b nobase -F raw broken.q 64k
create -q -f vdi a.vdi 64k
create -q -f vpc a.vpc 64k
""".strip().splitlines()


@pytest.fixture(scope="module")
def pristine(real: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every line runs."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "a").write_bytes(bytes(65536))
    (folder / "b").write_bytes(b"b" * 65536)
    for line in IMAGES:
        done = real["qemu-img"].run(*line.split(), cwd=folder)
        assert done.code == 0, done
    return folder


@pytest.mark.parametrize("line", LINES)
def test_doubly_wrong_call(line: str, real, ours, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-img"], ours, tmp_path, pristine)
    before = {path.name: path.read_bytes() for path in pristine.iterdir()}
    assert pair.same(line).code != 0
    after = {path.name: path.read_bytes() for path in pair.folders[1].iterdir()}
    assert {name: after.get(name) for name in before} == before
