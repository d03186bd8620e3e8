"""Events of tables that blkdebug hears: errors injected at them, breakpoints at them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.differential.io_pairs import IoPair, timeless

pytestmark = pytest.mark.peer

RULE = '[inject-error]\nevent = "{event}"\nerrno = "5"\nonce = "{once}"\n'

#: event -> how the image is made, and what comes to it; told within the request, as by QEMU
IN_THE_REQUEST = {
    "cluster_alloc": ("create -q -f qcow2 i 4M", "write -P 1 0 512"),
    "cluster_alloc_bytes": ("create -q -f qcow2 i 4M", "write -c -P 1 0 64k"),
    "cluster_alloc_space": ("create -q -f qcow2 i 4M", "write -P 1 0 512"),
    "l2_alloc_write": ("create -q -f qcow2 i 4M", "write -P 1 0 512"),
    "l2_update_compressed": ("create -q -f qcow2 i 4M", "write -c -P 1 0 64k"),
    "refblock_alloc": ("create -q -f qcow2 i 4M", "write -P 1 0 512"),
    "refblock_alloc_write": ("create -q -f qcow2 -o cluster_size=512 i 1M", "write -P 1 0 300k"),
    "refblock_alloc_hookup": ("create -q -f qcow2 -o cluster_size=512 i 1M", "write -P 1 0 300k"),
    "cow_write": ("create -q -f qcow2 -b base -F raw i", "write -P 1 100 512"),
    "read_backing_aio": ("create -q -f qcow2 -b base -F raw i", "write -P 1 100 512"),
}
#: told at the flush, where QEMU writes a new table within the request
AT_THE_FLUSH = ("l1_update", "l2_update", "refblock_update_part", "flush_to_os")


def pair_of(real, io, tmp_path: Path, make: str, rule: str) -> IoPair:
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        (folder / "i").unlink()
        pair.img(folder, make)
        (folder / "rules").write_text(rule)
    pair.opened = ["-f", "qcow2", "blkdebug:rules:i"]
    return pair


@pytest.mark.parametrize("event", IN_THE_REQUEST)
def test_an_error_within_the_request(event: str, real, io, tmp_path: Path) -> None:
    make, request = IN_THE_REQUEST[event]
    pair = pair_of(real, io, tmp_path, make, RULE.format(event=event, once="on"))
    done = pair.same(["-c", request, *pair.opened], form=timeless, expect=1)
    assert "write failed: Input/output error" in done.out
    pair.img(pair.folders[1], "check -q i")


@pytest.mark.parametrize("event", AT_THE_FLUSH)
def test_an_error_as_a_table_is_written(event: str, real, io, tmp_path: Path) -> None:
    """Both tell of it, and nothing that is on disk becomes wrong; at worst there is a leak."""
    make, request = IN_THE_REQUEST["cluster_alloc"]
    pair = pair_of(real, io, tmp_path, make, RULE.format(event=event, once="off"))
    words = ["-c", request, "-c", "flush", *pair.opened]
    for program, folder in zip((real["qemu-io"], io), pair.folders, strict=True):
        done = program.run(*words, cwd=folder)
        assert done.code == 1
        assert "Input/output error" in done.out + done.err
        checked = real["qemu-img"].run("check", "-q", "i", cwd=folder)
        assert checked.code in (0, 3)


def test_a_flush_to_disk_has_written_all_before(real, io, tmp_path: Path) -> None:
    make, request = IN_THE_REQUEST["cluster_alloc"]
    pair = pair_of(real, io, tmp_path, make, RULE.format(event="flush_to_disk", once="off"))
    pair.agree(request, "flush", expect=0)
    words = ["-c", "write -q 0 512", "-c", "flush", "-f", "raw", "blkdebug:rules:base"]
    assert [done.code for done in pair.run(*words)] == [1, 1]


@pytest.mark.parametrize("event", ["l1_grow_alloc_table", "l1_grow_write_table"])
def test_an_error_as_the_l1_table_grows(event: str, real, io, tmp_path: Path) -> None:
    make = "create -q -f qcow2 -o cluster_size=512 i 1M"
    pair = pair_of(real, io, tmp_path, make, RULE.format(event=event, once="on"))
    done = pair.same(["-c", "truncate 20M", *pair.opened], form=timeless, expect=1)
    assert "Input/output error" in done.err
    pair.img(pair.folders[1], "check -q i")


BROKEN_OFF = {
    "cluster_alloc": "",
    "l2_alloc_write": "",
    "refblock_alloc": "",
    "l2_alloc_cow_read": "snapshot -c one i",
    "cow_write": "snapshot -c one i",
    "cluster_alloc_space": "",
}


@pytest.mark.parametrize("event", BROKEN_OFF)
def test_breakpoints(event: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path, "blkdebug")
    for folder in pair.folders:
        if BROKEN_OFF[event]:
            assert real["qemu-io"].run("-c", "write -q -P 3 0 64k", "i", cwd=folder).code == 0
            pair.img(folder, BROKEN_OFF[event])
    pair.agree(
        f"break {event} A",
        "aio_write -P 1 0 512",
        "wait_break A",
        "length",
        "resume A",
        "aio_flush",
        "read -P 1 0 512",
    )


def test_freed_space_is_told(real, io, tmp_path: Path) -> None:
    pair = pair_of(real, io, tmp_path, "create -q -f qcow2 i 4M", "")
    for program, folder in zip((real["qemu-io"], io), pair.folders, strict=True):
        state = '[set-state]\nevent = "cluster_free"\nstate = "1"\nnew_state = "2"\n'
        fail = '[inject-error]\nevent = "read_aio"\nstate = "2"\n'
        (folder / "rules").write_text(state + fail)
        words = shlex.split("-c 'write -q 0 128k' -c 'discard 0 64k' -c flush -c 'read 64k 512'")
        done = program.run(*words, *pair.opened, cwd=folder)
        assert "read failed: Input/output error" in done.out, done


#: name -> (how the image is made, what is done before, the write that goes to one stretch)
ONE_STRETCH = {
    "data, room, data": ("", ["write -P 1 0 192k", "write -z 64k 64k"], "write -P 2 0 192k"),
    "room, data": ("", ["write -P 1 0 192k", "write -z 0 64k"], "write -P 2 1k 100k"),
    "data, room": ("", ["write -P 1 0 192k", "write -z 64k 64k"], "write -P 2 5k 100k"),
    "room with edges": ("", ["write -P 1 0 256k", "write -z 64k 64k"], "write -P 2 65k 150k"),
    "alternating": (
        "",
        ["write -P 1 0 512k", "write -z 64k 64k", "write -z 192k 128k", "write -z 448k 64k"],
        "write -P 2 1k 510k",
    ),
    "subclusters": (
        "-o extended_l2=on",
        ["write -P 1 0 8k", "write -P 1 64k 64k"],
        "write -P 2 0 90k",
    ),
    "zeroed subclusters": (
        "-o extended_l2=on",
        ["write -P 1 0 128k", "write -z 10k 20k", "write -z 60k 8k"],
        "write -P 2 1k 100k",
    ),
}


@pytest.mark.parametrize("name", ONE_STRETCH)
def test_a_stretch_of_the_file_is_one_request(name: str, real, io, tmp_path: Path) -> None:
    """The second request fails, so there is one; and the bytes and their places are the same."""
    options, before, request = ONE_STRETCH[name]
    second = (
        '[set-state]\nevent = "write_aio"\nnew_state = "2"\n'
        '[inject-error]\nevent = "write_aio"\nstate = "2"\nerrno = "5"\n'
    )
    pair = pair_of(real, io, tmp_path, f"create -q -f qcow2 {options} i 4M", second)
    for folder in pair.folders:
        words = [word for one in before for word in ("-c", one)]
        assert real["qemu-io"].run(*words, "-f", "qcow2", "i", cwd=folder).code == 0
    done = pair.agree(request, expect=0)
    assert "wrote" in done.out
    pair.same_places()


@pytest.mark.parametrize(
    "lines",
    [
        ('state="1"', 'new_state="2"'),
        ('foo="3"', 'new_state="2"', 'bar="2"', 'state="1"'),
        ('foo = "2"', 'bar = "2"'),
        ('new_state = "2"', 'state = "4"', "bar"),
        ('foo = "2"', "event"),
        ("event",),
        ("state",),
        ("event = read_aio",),
        ('foo = "2"', "[nogroup]"),
        ('foo = "2"', "[set-state]", 'bar = "2"', 'baz = "3"'),
    ],
)
def test_which_unknown_name_is_told_of(lines: tuple[str, ...], real, io, tmp_path: Path) -> None:
    rule = "\n".join(("[inject-error]", 'event = "read_aio"', *lines, ""))
    pair = pair_of(real, io, tmp_path, "create -q -f qcow2 i 4M", rule)
    pair.same(["-c", "read 0 512", *pair.opened], form=timeless, expect=1)
