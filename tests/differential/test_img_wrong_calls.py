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

STANDARD = """
--nonsense
-x
-T
--trace
foo
''
help
inf a
-- foo
-T foo=1 info a
-T nothing info nofile
-T enable=nothing,foo=2 info nofile
-T file=t,nothing2=1 info nofile
info -V
info --version
create --nonsense
"""

INFO = """
info
info a b
info --x a
info -f
info -T none a
info --output
info --output=x a
info --output=
info --output yaml nofile
info --o=json a
info --f raw a
info --force-share=yes a
info -b
info nofile
info ''
info .
info nodir/nofile
info a/b
info -f foo a
info -f qcow2 a
info -f vdi a
info -f vpc a
info -f vdi a.q
info -f vpc a.q
info -f qcow2 a.vdi
info --image-opts a
info --image-opts ''
info --image-opts driver=raw
info --image-opts driver=foo,file.filename=a
info --image-opts driver=qcow2,foo=1,file.filename=a.q
info --image-opts driver=raw,file.filename=a,offset=x
info --image-opts driver=raw,file.filename=a,offset=-1
info --image-opts driver=raw,file.filename=a,size=8M
info --image-opts driver=raw,file.filename=a,offset=8M
info --image-opts driver=raw,file.driver=file
info --image-opts driver=raw,file.driver=foo,file.filename=a
info --image-opts driver=raw,file=a
info --image-opts driver=raw,file.filename=nofile
info --image-opts driver=file,filename=nofile
info --image-opts driver=file
info --image-opts filename=a
info --image-opts -f raw driver=raw,file.filename=a
info json:
info json:{}
info json:foo
info 'json:{"driver":"raw"}'
info 'json:{"driver":"raw","file":"a"}'
info 'json:{"driver":"foo","file":{"driver":"file","filename":"a"}}'
info 'json:{"driver":"raw","file":{"driver":"file","filename":"nofile"}}'
info 'json:{"driver":"raw","file":{"driver":"file","filename":"a"},"offset":"1"'
info 'json:["a"]'
info foo:bar
info file:nofile
info -b broken.q
info --object foo a
info --object secret a
info --object secret,id=1 a
info --object secret,id=x a
info --object secret,id=x,data=1,file=2 a
info --object secret,id=x,file=nofile a
info --object secret,id=x,data=1,bar=3 a
info --object secret,id=x,data=1 --object secret,id=x,data=1 a
info --image-opts driver=qcow2,file.filename=a.q,foo
info --image-opts a,nobar,driver=qcow2
info --object '' a
info --object '{' a
info --object '{"qom-type":"secret"}' a
"""

CHECK = """
check
check a
check -q a
check --output=json a
check -f raw a.q
check --output=x a
check -r
check -r x a.q
check --repair=none a.q
check -T x a.q
check --cache= a.q
check -f foo a.q
check -f qcow2 a
check nofile
check a.q b
check -U -r all a.q
check -U -r leaks nofile
check -p a.q
check -c a.q
check --image-opts -f qcow2 driver=qcow2,file.filename=a.q
check --image-opts a.q
check broken.q
check -r all broken.q
check .
check -r all nofile
"""

MAP = """
map
map a b
map --output=x a
map --start-offset=x a
map --start-offset=-1 a
map --start-offset=9e a
map --start-offset=1.3 a
map --start-offset= a
map --max-length=x a
map --max-length=-1 a
map -s
map -q a
map nofile
map -f foo a
map -f vdi a
map --image-opts -f raw a
map broken.q
"""

SNAPSHOT = """
snapshot
snapshot -c s
snapshot a.q b
snapshot -l -c x a.q
snapshot -c x -c y a.q
snapshot -d s -a s a.q
snapshot -l -l a.q
snapshot -c
snapshot -c x nofile
snapshot -l nofile
snapshot -c s a
snapshot -f raw -c s a
snapshot -f raw -a s a
snapshot -f raw -d s a
snapshot -a no a.q
snapshot -d no a.q
snapshot -d 7 a.q
snapshot -d 1 named.q
snapshot -a '' named.q
snapshot -c x -f foo a.q
snapshot -c x -f raw a.q
snapshot -U -c x a.q
snapshot -U -a x a.q
snapshot -f foo a.q
snapshot --image-opts -f qcow2 a.q
snapshot --output=json a.q
snapshot -c x a.vdi
snapshot -a x a.vdi
snapshot -a x a
snapshot -d x a.vdi
snapshot -c x a.vpc
snapshot -l broken.q
"""

RESIZE = """
resize
resize a
resize a 1 2
resize a x
resize a +x
resize a ''
resize a +
resize a -
resize a -- -x
resize a 1.3
resize -f raw a -4k
resize -f raw a 0
resize -f raw a +0 5
resize -f raw --shrink a 0
resize -f raw --shrink a -8M
resize -f raw --shrink a -1M
resize -f raw a 9e
resize -f raw a +8e
resize -f raw a -1kk
resize -f raw -5k a
resize -f raw a --shrink -1k
resize -f raw a 4k
resize a.q 4k
resize a.q +1
resize a.q 1000
resize --shrink a.q 1000
resize --preallocation=x a 8M
resize --preallocation= a 8M
resize --preallocation=off --shrink -f raw a 0
resize -f raw --preallocation=metadata a 8M
resize -f raw --preallocation=full --shrink a 512
resize a.q --preallocation=falloc --shrink 512
resize nofile 1M
resize -f foo a 1M
resize -f qcow2 a 1M
resize --image-opts -f raw a 1M
resize -f raw . 1M
resize '' 1M
resize -U a 1M
resize -p a 1M
resize --size=1M a
resize a.vdi 8M
resize a.vpc 8M
resize broken.q 8M
resize a.q 1E
resize -f raw a 9223372036854775807
resize a.q 9223372036854775807
resize a.q 9223372035781033984
resize a.q 9223372036854775808
"""

CREATE = """
create
create x
create x abc
create x 1x
create x ''
create x -1
create x -- -1
create x 9e
create x 8e
create x 1 2
create -f foo x 1k
create -f
create -f qcow2 -b nofile x
create -f qcow2 -b nofile -F raw x
create -f qcow2 -b nofile -F foo x
create -f qcow2 -b nofile -F foo x 1M
create -f qcow2 -b a -F qcow2 x
create -f qcow2 -b 'json:{"driver":"raw","offset":512,"file.filename":"a.q"}' -F qcow2 x
create -f qcow2 -b 'json:{"driver":"raw","file.filename":"a"}' -F qcow2 x
create -f qcow2 -b a x
create -f qcow2 -b a x 1M
create -f qcow2 -b x -F raw x 1M
create -f qcow2 -b '' x
create -f qcow2 -b '' -F raw x 1M
create -f qcow2 -u -b nofile -F raw x
create -f qcow2 -u -b nofile x 1M
create -f raw -b a -F raw x
create -f raw -F raw x 1M
create -f vdi -b a -F raw x 1M
create -f vpc -b a -F raw x 1M
create -f qcow2 -F raw x 1M
create -o '' x 1M
create -o ,a x 1M
create -o a, x 1M
create -o encryption=on x 1M
create -o foo x 1M
create -o foo=1 x 1M
create -o size=x x
create -o size=-1 x
create -o preallocation=x x 1M
create -o nocow=x x 1M
create -o cluster_size=64k x 1M
create -f qcow2 -o foo=3 x 1M
create -f qcow2 -o cluster_size=3 x 1M
create -f qcow2 -o cluster_size=x x 1M
create -f qcow2 -o cluster_size=4M x 1M
create -f qcow2 -o cluster_size=256 x 1M
create -f qcow2 -o cluster_size=0 x 1M
create -f qcow2 -o compat=3 x 1M
create -f qcow2 -o compat= x 1M
create -f qcow2 -o preallocation=x x 1M
create -f qcow2 -o refcount_bits=3 x 1M
create -f qcow2 -o refcount_bits=128 x 1M
create -f qcow2 -o refcount_bits=0 x 1M
create -f qcow2 -o refcount_bits=x x 1M
create -f qcow2 -o refcount_bits=8,compat=0.10 x 1M
create -f qcow2 -o lazy_refcounts=x x 1M
create -f qcow2 -o lazy_refcounts=on,compat=0.10 x 1M
create -f qcow2 -o compression_type=x x 1M
create -f qcow2 -o compression_type=zstd,compat=0.10 x 1M
create -f qcow2 -o backing_fmt=foo,backing_file=a x
create -f qcow2 -o backing_file=nofile,backing_fmt=raw x 1M
create -f qcow2 -o backing_file=x,backing_fmt=raw x 1M
create -f qcow2 -o backing_fmt=raw x 1M
create -f qcow2 -o cluster_size=512 x 1P
create -f qcow2 x 7E
create x 64T
create x 7E
create -o preallocation=falloc x 7E
create -o preallocation=full x 7E
create -f vpc x 64T
convert -O qcow2 --image-opts driver=null-co,size=7E t
convert -O vpc --image-opts driver=null-co,size=64T t
create -f vdi -o foo=1 x 1M
create -f vdi -o static=x x 1M
create -f vdi -o preallocation=x x 1M
create -f vdi -o preallocation=metadata x 3M
create -f qcow2 -b a -F raw -o preallocation=metadata x
create --back a -F raw --opt cluster_size=1k x
create -f vdi x 1P
create -f vpc -o foo=1 x 1M
create -f vpc -o subformat=x x 1M
create -f vpc -o force_size=x x 1M
create -f vpc x 4T
create -f vpc -o force_size=on x 4T
create -f null-co x 1M
create -f blkdebug x 1M
create nodir/x 1M
create a/x 1M
create . 1M
create -f qcow2 nodir/x 1M
create -f vdi nodir/x 1M
create -f vpc nodir/x 1M
create foo:x 1M
create json:{} 1M
create 'json:{"driver":"file","filename":"x"}' 1M
create '' 1M
create -6 x 1M
create -e x 1M
create --b a x
create --o x 1M
create --backing
create --object foo x 1M
create --object secret x 1M
create -q x
create -q x abc
create -f foo -o help
create -f null-co -o help
"""

COMPARE = """
compare
compare a
compare a b c
compare nofile a
compare a nofile
compare -q a nofile
compare -f x a b
compare -F x a b
compare -F qcow2 a b
compare -f qcow2 a b
compare -T x a b
compare -x a b
compare -f
compare --image-opts a b
compare --image-opts -f raw driver=raw,file.filename=a driver=raw,file.filename=b
compare --image-opts -F raw driver=raw,file.filename=a driver=raw,file.filename=b
compare --object foo a b
compare . a
compare -U nofile b
compare -t none a a
compare -s broken.q a
"""

COMMIT = """
commit
commit a
commit -f raw a
commit a.q
commit a b
commit nofile
commit -b x o.q
commit -b a a
commit longvpc.q
commit longvdi.q
commit -b o.q o.q
commit -b
commit -t x o.q
commit -t x nofile
commit -f raw o.q
commit -f foo o.q
commit -r x o.q
commit -r -1 o.q
commit -x
commit -U o.q
commit --image-opts o.q
commit --image-opts -f qcow2 o.q
commit broken.q
commit -d a.q
"""

REBASE = """
rebase
rebase a
rebase o.q
rebase -F raw o.q
rebase -b a.q
rebase -b a.q o.q
rebase -b a.q -F x o.q
rebase -u -b a.q -F x o.q
rebase -b b a
rebase -f raw -b b a
rebase -u -b b a.vdi
rebase -b b -F raw a
rebase -b nofile -F qcow2 o.q
rebase -b nofile o.q
rebase -u -b nofile o.q
rebase -b a.q -F raw o.q p
rebase -b a.q -F qcow2 nofile
rebase -t x -b a.q o.q
rebase -T x -b a.q o.q
rebase -T x -u -b a.q o.q
rebase -f foo -b a.q o.q
rebase -f raw -b a.q -F qcow2 a
rebase -f raw -u -b a.q -F qcow2 a
rebase -b a -F raw b
rebase -x o.q
rebase -b o.q -F qcow2 o.q
rebase -b a -F qcow2 o.q
rebase -b 'json:{"driver":"raw","file.filename":"a"}' -F qcow2 o.q
rebase --image-opts -f qcow2 -b a.q o.q
rebase --image-opts -u o.q
rebase --b a.q o.q
rebase --c o.q
rebase -b a.q -F qcow2 broken.q
rebase -b a.q -F qcow2 a.vdi
rebase -u -b a.q -F qcow2 a.vdi
"""

CONVERT = """
convert
convert a
convert -f x a t
convert -O x a t
convert -O qcow2 -o x a t
convert -O x -o help
convert -o '' a t
convert -S x a t
convert -S 1000 a t
convert -S -1 a t
convert -S 1G a t
convert -m x a t
convert -m 0 a t
convert -m 17 a t
convert -t x a t
convert -T x a t
convert -c a t
convert -c -O vdi a t
convert -c -O vpc a t
convert -n a nofile
convert -n -O qcow2 big a.q
convert -n -O qcow2 a b
convert -n -O vdi a b
convert -B a a t
convert -B a -O qcow2 a t
convert -F raw -O qcow2 a t
convert -B nofile -F raw -O qcow2 a t
convert -B a -F foo -O qcow2 a t
convert -B '' -O qcow2 a t
convert -B '' -F raw -O qcow2 a b t
convert -B t -O qcow2 a t
convert -o backing_file= -O qcow2 a t
convert -B a -F raw -O vdi a t
convert -n -o x -O qcow2 a a.q
convert -l x a t
convert -l x a.q t
convert -l snapshot.id=7 a.q t
convert -l snapshot.foo=1 a.q t
convert -l snapshot.name=1 a.q t
convert -l snapshot.id named.q t
convert -l snapshot.name=one,nosnapshot.name named.q t
convert -l snapshot. named.q t
convert -l snapshot.name=one,more named.q t
convert -l x a b t
convert -l x a nofile t
convert -l one -f foo named.q b t
convert -l snapshot.id=7 named.q b t
convert -l snapshot.id=1 named.q nofile t
convert -C -S 4k a t
convert -C -c -O qcow2 a t
convert --target-is-zero a t
convert -C --salvage a t
convert --bitmaps a t
convert --bitmaps -O raw a.q t
convert --bitmaps -O vdi marked.q t
convert --bitmaps -n -O raw marked.q b
convert --bitmaps -O qcow2 -o compat=0.10 marked.q t
convert --bitmaps -O qcow2 old.q t
convert --bitmaps -O qcow2 a.q marked.q t
convert --bitmaps -O qcow2 a marked.q t
convert --bitmaps -O qcow2 -B a a t
convert --skip-broken-bitmaps a t
convert -r x a t
convert -r -1 a t
convert --target-image-opts a t
convert --target-image-opts -n a t
convert --target-image-opts -O raw -n a driver=raw,file.filename=b
convert --target-image-opts -n -o foo a driver=raw,file.filename=b
convert --target-image-opts -n a driver=foo,file.filename=b
convert --image-opts a t
convert --image-opts -f raw driver=raw,file.filename=a t
convert a nodir/t
convert nofile t
convert a nofile t
convert a a
convert -O qcow2 a a
convert a .
convert -x a t
convert -s x a t
convert --progress a t
convert --source- a t
convert --o x a t
convert -O qcow2 -o preallocation=x a t
convert -O qcow2 -o cluster_size=3 a t
convert -O qcow2 -o backing_file=a a t
convert -O qcow2 -c -o preallocation=metadata a t
convert -c -O qcow2 -o compression_type=x a t
convert -O null-co a t
convert -O blkdebug a t
convert -O vdi -o foo=1 a t
convert -O vpc -o subformat=x a t
convert broken.q t
"""

TABLE = {
    name.lower(): [line for line in globals()[name].splitlines() if line]
    for name in (
        "STANDARD",
        "INFO",
        "CHECK",
        "MAP",
        "SNAPSHOT",
        "RESIZE",
        "CREATE",
        "COMPARE",
        "COMMIT",
        "REBASE",
        "CONVERT",
    )
}
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
    assert len(set(LINES)) == len(LINES) >= 150


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
