"""`diskwright-io` and qemu-io on images that are opened in uncommon ways, or cannot be."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.differential.io_pairs import IoPair, commands, timeless

pytestmark = pytest.mark.peer


@pytest.mark.parametrize(
    "opened",
    [
        "-C -f qcow2 i",
        "-C -f qcow2 blkdebug::i",
        "-C --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=i",
        "--image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=i",
        "-r --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=i",
        "--image-opts driver=copy-on-read,bottom=x,file.driver=qcow2,file.file.filename=i",
        "--image-opts driver=copy-on-read,foo=x,file.driver=qcow2,file.file.filename=i",
        "--image-opts driver=copy-on-read",
        "-c 'open -o driver=copy-on-read,file.driver=qcow2 i'",
        "-c 'open -o driver=blkdebug,image.driver=qcow2 i'",
        "-c 'open -C -o driver=blkdebug,image.driver=qcow2 blkdebug::i'",
    ],
)
@pytest.mark.parametrize("image", ["overlay", "qcow2"])
def test_copy_on_read(image: str, opened: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path, image)
    pair.opened = shlex.split(opened)
    pair.agree("info", "read 0 1k", "map", "read 250k 20k", "aio_read 1M 1k", "aio_flush", "map")
    pair.agree("write 512k 1k", "read 500k 100k", "map")


def test_copy_on_read_of_subclusters(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    for folder in pair.folders:
        pair.img(folder, "create -q -f qcow2 -o extended_l2=on -b base -F raw i")
    pair.image, pair.opened = "overlay", ["-C", "-f", "qcow2", "i"]
    pair.agree("write 28k 2k", "write 34k 2k", "map", "read 30k 4k", "map", "read 1M 512", "map")


REOPENED = (
    "reopen -o node-name=foo",
    "reopen -o file.node-name=foo",
    "reopen -o backing.node-name=foo",
    "reopen -o backing=nosuch",
    "reopen -o backing=",
    "reopen -o file=nosuch",
    "reopen -o driver=raw",
    "reopen -o driver=qcow2",
    "reopen -o file.driver=qcow2",
    "reopen -o file.driver=file",
    "reopen -o backing.driver=file",
    "reopen -o backing.driver=raw",
    "reopen -o lazy-refcounts=on",
    "reopen -o lazy-refcounts=off",
    "reopen -o auto-read-only=x",
    "reopen -o auto-read-only=on",
    "reopen -o detect-zeroes=on",
    "write -P 0 128k 64k",
    "map",
)


@pytest.mark.parametrize("discard", [[], ["-d", "ignore"], ["-d", "unmap"]])
@pytest.mark.parametrize(
    "options",
    [
        "detect-zeroes=unmap",
        "detect-zeroes=unmap,discard=ignore",
        "detect-zeroes=unmap,discard=unmap",
        "file.driver=file,file.detect-zeroes=unmap",
        "file.driver=file,file.detect-zeroes=unmap,discard=ignore",
        "file.driver=file,file.detect-zeroes=unmap,file.discard=ignore",
    ],
)
def test_zeroes_give_space_back(options: str, discard, real, io, tmp_path: Path) -> None:
    """It needs discards that are passed on, which they are here where nothing else is said."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    words = [*discard, "--image-opts", f"driver=qcow2,file.filename=i,{options}"]
    lines = ["write -P 1 0 128k", "write -P 0 0 64k", "map"]
    pair.same([*words, *commands(lines)], form=timeless)
    if not options.startswith("file."):
        lines.insert(0, f"reopen -o {options}")
        pair.same([*discard, "-f", "qcow2", "i", *commands(lines)], form=timeless)


def test_options_that_stay(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path, "overlay")
    pair.agree(*REOPENED)
    for first in ("", "reopen -r", "reopen -w"):
        for flag in ("", "-r ", "-w "):
            for value in ("on", "off", "x"):
                pair.agree(first or "info", f"reopen {flag}-o file.read-only={value}", "write 0 1k")
    pair.opened = []
    for child in ("", "file.", "backing."):
        pair.agree(
            f"open -o driver=qcow2,{child}node-name=foo i",
            f"reopen -o {child}node-name=foo",
            f"reopen -o {child}node-name=bar",
            "reopen",
        )


@pytest.mark.parametrize(
    "fields",
    [
        "64:1234567890abcdef 60:00000000",
        "64:ffffffffffff0000 60:0000ffff",
        "64:0000000000070000 60:00000000",
        "40:7fffffffffff0000 36:0000ffff",
        "40:1234567890abcdef 36:00000001",
        "48:7fffffffffff0000 56:00000001",
        "8:0000000000000074 112:12345678 116:7fffffff",
        "8:0000000000000078 112:12345678 116:00000000",
        "8:0000000000000000 112:12345678 116:7fffffff",
    ],
)
def test_a_header_that_cannot_be(fields: str, real, io, tmp_path: Path) -> None:
    """Places and lengths of tables and extensions: offset in the header, its bytes."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        with open(folder / "i", "r+b") as file:
            for field in fields.split():
                place, _, value = field.partition(":")
                file.seek(int(place))
                file.write(bytes.fromhex(value))
    pair.same(["-r", "-f", "qcow2", "i", "-c", "read 0 512"], form=timeless)


def test_a_table_at_the_beginning_of_the_file(real, io, tmp_path: Path) -> None:
    """The refcounts say that the header's cluster is free."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        with open(folder / "i", "r+b") as file:
            file.seek(0x20000)
            file.write(bytes(8))
    pair.same([*pair.opened, "-c", "write 64k 64k"], form=timeless, expect=1)
    pair.same(["-f", "qcow2", "i", "-c", "length"], form=timeless, expect=1)


RUN_TIME = (
    "reopen -o lazy-refcounts=on,pass-discard-request=on",
    "reopen -o lazy-refcounts=off,pass-discard-request=off",
    "reopen -o pass-discard-snapshot=on,pass-discard-other=on",
    "reopen -o overlap-check=all",
    "reopen -o overlap-check=none",
    "reopen -o overlap-check.template=cached",
    "reopen -o overlap-check.inactive-l2=on",
    "reopen -o cache-size=1M",
    "reopen -o l2-cache-size=512k",
    "reopen -o l2-cache-entry-size=512",
    "write -P 55 0 4M",
    "reopen -o l2-cache-entry-size=4k",
    "reopen -o refcount-cache-size=128k",
    "reopen -o cache-clean-interval=5",
    "reopen -o discard-no-unref=on",
    "read -P 55 0 4M",
    "discard 0 1M",
    "write -z 1M 1M",
    "read -P 0 0 2M",
    "reopen -r -o overlap-check=all",
    "read -P 55 2M 2M",
    "reopen -w",
    "write 0 4M",
    "reopen -o lazy-refcounts=42",
    "reopen -o cache-size=1M,l2-cache-size=64k,refcount-cache-size=64k",
    "reopen -o cache-size=1M,l2-cache-size=2M",
    "reopen -o l2-cache-entry-size=33k",
    "reopen -o refcount-cache-size=256T",
    "reopen -o overlap-check=constant,overlap-check.template=all",
    "reopen -o overlap-check=blubb",
    "reopen -o cache-clean-interval=-1",
    "reopen -o cluster-size=64k",
)


@pytest.mark.parametrize("image", ["qcow2", "overlay"])
def test_options_of_qcow2_change(image: str, real, io, tmp_path: Path) -> None:
    IoPair(real, io, tmp_path, image).agree(*RUN_TIME)


def test_the_last_unit_of_a_file_is_written_directly(real, io, tmp_path: Path) -> None:
    """Past the page cache whole units are written, also where the file ends inside of one."""
    pair = IoPair(real, io, tmp_path)
    for folder in pair.folders:
        (folder / "i").write_bytes(bytes((1 << 20) - 1))
    pair.agree("write -P 1 983040 65535", "read -P 1 983040 65535", "length", options="-n")


@pytest.mark.parametrize("event", ["l2_load", "read_aio", "none"])
def test_closing_says_nothing_where_nothing_was_written(event: str, real, io, tmp_path) -> None:
    """All requests fail after the event, a flush too; but there is nothing to flush."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        (folder / "conf").write_text(f'[inject-error]\nevent = "{event}"\n')
    pair.agree("write 0 64k")
    pair.same(["-f", "qcow2", "-c", "read 0 512", "blkdebug:conf:i"], form=timeless)


@pytest.mark.parametrize(
    "options",
    [
        "driver=raw,offset=1536,size=1024",
        "offset=1k",
        "size=512",
        "size=4096",
        "offset=5000",
        "offset=3584,size=1024",
        "offset=10,size=100",
        "offset=0,size=4M",
        "offset=x",
    ],
)
def test_another_window(options: str, real, io, tmp_path) -> None:
    pair = IoPair(real, io, tmp_path, "raw")
    pair.opened = ["--image-opts", "driver=raw,offset=512,size=512,file.filename=i"]
    tries = ["write -P 3 0 512", "write -P 4 511 2", "write -P 5 1k 1", "length", "read -v 0 16"]
    pair.agree(*tries, f"reopen -o {options}", *tries, "reopen -o size=2k", *tries)


@pytest.mark.parametrize(
    "opened",
    [
        "open -o file.driver=blkdebug,file.inject-error.event=l2_load i",
        "open -o driver=qcow2,file.driver=blkdebug,file.inject-error.event=none,"
        "file.inject-error.iotype=flush,file.image.filename=i",
        "open -o driver=qcow2,file.driver=blkdebug,file.inject-error.0.event=l2_load,"
        "file.inject-error.1.event=x,file.image.filename=i",
        "open -o data-file.filename=none i",
        "open -o data-file.filename=base i",
    ],
)
def test_rules_in_dotted_words_and_data_files(opened: str, real, io, tmp_path) -> None:
    pair = IoPair(real, io, tmp_path, "qcow2")
    pair.agree("write 0 64k")
    pair.opened = ["-t", "writeback"]
    pair.agree(opened, "read 0 512", "length")


@pytest.mark.parametrize("cache", ["", "-t writeback ", "-t writethrough ", "-n "])
def test_a_flush_that_fails_is_told_by_the_exit_code(cache: str, real, io, tmp_path) -> None:
    """One of the data file; what is the image's own has a sentence in qemu-io."""
    pair = IoPair(real, io, tmp_path, "qcow2")
    for folder in pair.folders:
        pair.img(folder, "create -q -f qcow2 -o data_file=d i 1M")
    pair.same(["i", *commands(["write 64k 64k"])], form=timeless)
    opened = f"open {cache}-o driver=qcow2,file.filename=i,data-file.driver=blkdebug,"
    opened += "data-file.inject-error.0.event=none,data-file.inject-error.0.iotype=flush,"
    opened += "data-file.image.filename=d"
    for place in ("0", "64k"):  # with a table to write, and without one
        lines = [opened, f"write {place} 512", "flush"]
        pair.same(commands(lines), form=timeless, expect=1)
