"""Wrong calls of `diskwright-io`: refused in QEMU's words, with its exit code, files as before.

A line is what follows the program's name, or, in COMMANDS, a command for -c. Nothing of what is
expected stands here: qemu-io says it when the test runs.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.differential.img_pairs import Pair
from tests.differential.io_pairs import timeless

pytestmark = pytest.mark.peer

PROGRAM = """
-x
--nonsense
--read-only=1 a
-f
--format
-c
-t
-i
-d
-T
--object
--cache
a b
-f raw a b
--c length
--n a
--im=1 a
-f raw --image-opts a
--image-opts -f raw driver=raw,file.filename=a
-t x a
-t '' a
--cache=x nofile
-d x a
--discard=x a
-i x a
--aio=x a
-T foo=1 a
-T nothing -f raw nofile
-T nothing --nonsense
--object foo
--object secret
--object secret,id=x
--object secret,data=x
--object nothing,id=x
nofile
-r nofile
nodir/nofile
a/b
-r .
'' -c length
-f foo a
-f qcow2 a
-f vdi a
-f vpc a
-f qcow2 v
-f raw nofile
-U a
-U -f raw a
-C -r -f raw a
-C -r -f qcow2 q
-k -f raw a
-k a
-i native -t writeback -f raw a
-n -t writeback -k -f raw a
-s nofile
-s -f qcow2 a
-s -r -f qcow2 q -c 'write 0 512'
-s -C -r -f qcow2 q
-s -U -f qcow2 q -c 'write 0 512' -c foo
--image-opts a
--image-opts ''
--image-opts driver=raw
--image-opts driver=foo,file.filename=a
--image-opts driver=qcow2,file.filename=a
--image-opts driver=qcow2,foo=1,file.filename=q
--image-opts driver=raw,file.filename=nofile
--image-opts driver=raw,offset=x,file.filename=a
--image-opts driver=raw,size=8M,file.filename=a
--image-opts driver=raw,read-only=on,file.filename=a
--image-opts driver=raw,discard=x,file.filename=a
--image-opts driver=raw,detect-zeroes=x,file.filename=a
--image-opts driver=raw,cache.direct=x,file.filename=a
--image-opts driver=blkdebug,image.filename=nofile
--image-opts filename=a
--image-opts filename=a,foo=1
--image-opts filename=
--image-opts file=a
--image-opts file=
--image-opts driver=raw,file=
--image-opts driver=qcow2,file=q
--image-opts driver=blkdebug,image=a
--image-opts file=a,file.driver=file
--image-opts driver=raw,file.filename=a,file.read-only=on
--image-opts driver=qcow2,file.filename=q,file.read-only=on
--image-opts driver=vdi,file.filename=v,file.read-only=on
--image-opts driver=blkdebug,image.driver=file,image.filename=a,image.read-only=on
-U --image-opts driver=raw,force-share=off,file.filename=a
json:
json:{}
'json:{"driver":"raw"}'
'json:{"driver":"qcow2","file":{"driver":"file","filename":"a"}}'
blkdebug::nofile
blkdebug:nofile:a
-f qcow2 broken
-f raw a -c foo -c quit -c length
-f raw a -c quit -c foo
-c length
-c quit
"""

COMMANDS = """
foo
"read" 0 1
READ 0 1
re 0 1
length 1
close x
quit x
abort x
flush -x
info 1
map 1
aio_flush x
help a b
help nothing
help -x
sleep
sleep x
sleep 1 2
sleep -1
sleep 1k
sigraise
sigraise x
sigraise 1 2
sigraise -1
sigraise 99
sigraise 1k
read
read 0
read x 1
read 0 x
read 0 1 2
read -x 0 1
read --foo 0 1
read -P
read -P 1
read -P 1 0
read -P x 0 1
read -P 256 0 1
read -P -1 0 1
read -P 1 -P 300 0 1
read -s 1 0 1
read -l 1 0 1
read -l 1 0 x
read -s x -P 1 0 1
read -P 1 -s 2 0 1
read -P 1 -l 2 0 1
read -P 1 -l 2 0 3G
read -b 1 512
read -b 0 1
read -b 0 512
read -br 0 512
read 0 2G
read 1M 1
read 1048575 2
read -1 1
read 0 9E
read -s
readv
readv 0
readv x 1
readv 0 x
readv 0 1 x
readv 0 2G
readv 0 1G 1G
readv -x 0 1
readv -b 0 1
readv -P 300 0 1
readv 1M 1
write
write 0
write x 1
write 0 x
write 0 1 2
write -x 0 1
write -P 300 0 1
write -z -P 1 0 1
write -P 1 -s pattern 0 1
write -z -s pattern 0 1
write -s nofile 0 1
write -s empty 0 1
write -s . 0 1
write -s
write -b -z 0 1
write -b -f 0 1
write -c -f 0 1
write -c 1 512
write -c 0 1
write -c 1M 512
write -b 0 1
write -n 0 1
write -u 0 1
write -nu 0 1
write -rz 0 1
write 0 2G
write -z 0 2G
write 1M 1
write -z 1M 1
write -zu 1048575 2
writev
writev 0
writev 0 x
writev 0 2G
writev -z 0 1
writev 1M 1
aio_read
aio_read 0
aio_read x 1
aio_read 0 x
aio_read -x 0 1
aio_read -P 300 0 1
aio_read 0 2G
aio_write
aio_write 0
aio_write x 1
aio_write 0 x
aio_write -x 0 1
aio_write -P 300 0 1
aio_write -u 0 1
aio_write -z 0 1 1
aio_write -z x 1
aio_write -z 0 x
aio_write -rz 0 1
aio_write 0 2G
discard
discard 0
discard x 1
discard 0 x
discard 0 1 2
discard -x 0 1
discard 0 2G
discard 1M 1
truncate
truncate x
truncate -1
truncate 1 2 3 4
truncate -m
truncate -m foo 1M
truncate -m metadata 2M
truncate -m metadata 512k
truncate -m full 512k
truncate 8E
truncate 9223372036854775807
truncate -m full 9223372036854774784
truncate 9223372035781033984
alloc
alloc x
alloc 0 x
alloc 0 1 2
alloc 8E
break
break write_aio
break write_aio A B
break write_aio A
break nothing A
resume
resume A
resume A B
remove_break
remove_break A
wait_break
wait_break A B
open
open a
open -x
open -t x a
open -o driver=raw a
reopen x
reopen -x
reopen -rw
reopen -r -r
reopen -c
reopen -c x
reopen -o
reopen -o foo=1
reopen -o foo
reopen -o driver=qcow2
reopen -o read-only=x
reopen -o read-only=on
reopen -o read-only=true
reopen -o read-only=n
reopen -r -o read-only=on
reopen -c none -o cache.direct=on
reopen -c none -o cache.no-flush=on
reopen -o cache.direct=x
reopen -o cache.direct=yes
reopen -o cache.foo=1
reopen -o cache.writeback=off
reopen -o discard=x
reopen -o detect-zeroes=x
reopen -o force-share=on
reopen -o node-name=x
reopen -o file.locking=off
reopen -o file.filename=x
reopen -o cluster_size=64k
reopen -o read_only=on
reopen -o share_writes=on
reopen -o detect_zeroes=on
reopen -o cache=none
zone_report
zone_report 0
zone_report x 1
zone_report 0 1
zone_open 0
zone_open x 1
zone_open 0 1
zone_open 2M 1
zone_close 0 x
zone_close 0 1
zone_finish 0 1
zone_finish 0 1 2
zone_reset 0 1
zone_append 0 512
zone_append 0 512 x
zone_append 0 512 1k
"""

QCOW2 = """
write -c 0 1k
write -c 64k 100k
write -c 1000k 64k
write -c -P 1 0 100G
reopen -o lazy-refcounts=x
reopen -o cluster-size=1
reopen -o cluster_size=1
reopen -o lazy_refcounts=on
reopen -o l2_cache_size=1M
reopen -o file.x_y=on
reopen -o backing.driver=raw
truncate 1
truncate 7E
truncate -m foo 2M
truncate -m full 512k
open -r q
"""

READ_ONLY = """
write
write 0
write x y
write -x 0 1
write 0 512
writev 0 512
aio_write 0 512
discard x
discard 0 512
truncate
truncate x
truncate 2M
reopen -r -w
write -b 0 512
write -z 0 512
zone_append 0 512 1k
"""

#: Lines without a file.
NO_FILE = """
read
read 0 1
length 1
close
reopen
map
info x
aio_flush
break a
flush
open
open -x
open -f raw a
open a b
open nofile
open -t x a
open -d x a
open -i x a
open -r -t
open -o
open -o driver=qcow2 a
open -o driver=foo a
open -o driver=raw,foo=1 a
open -o driver=raw
open -o driver=raw,file.filename=nofile
open -o filename=a
open -o filename=
open -o node-name=x,filename=a
open -o file=a
open -o file=
open -o file=a,file.driver=file
open -o file=a a
open -o driver=foo,file=a
open -o driver=qcow2,file=a
open -o driver=qcow2,file=a q
open -o file.filename=q q
open -o driver=qcow2,file.filename=q q
open -o driver=blkdebug,image=a
open -o driver=blkdebug,image=a a
open -o backing=a,driver=qcow2 q
open -o backing=a,file.filename=q
open -o data-file=a q
open -o file.read-only=on q
open -o driver=raw,file.read-only=on a
open -o read-only=on,driver=raw a
open -U -o driver=raw a
open -U -o driver=raw,force-share=off a
open -rC -o driver=raw a
open -k -o driver=raw a
open -s -o driver=qcow2 a
open -s nofile
"""


def lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line]


CALLS = [
    *(shlex.split(line) for line in lines(PROGRAM)),
    *(["-f", "raw", "a", "-c", line] for line in lines(COMMANDS)),
    *(["-f", "qcow2", "q", "-c", line] for line in lines(QCOW2)),
    *(["-r", "-f", "raw", "a", "-c", line] for line in lines(READ_ONLY)),
    *(["-c", line] for line in lines(NO_FILE)),
]


@pytest.fixture(scope="module")
def pristine(real, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every line runs."""
    folder = tmp_path_factory.mktemp("pristine")
    (folder / "a").write_bytes(bytes(1 << 20))
    (folder / "empty").write_bytes(b"")
    (folder / "pattern").write_bytes(b"0123456789")
    for line in (
        "create -q -f qcow2 q 1M",
        "create -q -f vdi v 1M",
        "create -q -f qcow2 -u -b nobase -F raw broken 1M",
    ):
        done = real["qemu-img"].run(*line.split(), cwd=folder)
        assert done.code == 0, done
    return folder


def test_there_are_enough_of_them() -> None:
    assert len({shlex.join(call) for call in CALLS}) == len(CALLS) >= 250


@pytest.mark.parametrize("call", CALLS, ids=shlex.join)
def test_wrong_call(call: list[str], real, io, pristine: Path, tmp_path: Path) -> None:
    pair = Pair(real["qemu-io"], io, tmp_path, pristine)
    before = {path.name: path.read_bytes() for path in pristine.iterdir()}
    pair.same(call, form=timeless)
    pair.same_tree(set(before))
    for folder in pair.folders:
        after = {path.name: path.read_bytes() for path in folder.iterdir()}
        left = {name: after[name] for name in before if after.get(name) != before[name]}
        assert not left, f"{folder.name}: changed {sorted(left)}"
