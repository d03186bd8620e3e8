"""`diskwright-io` and qemu-io, command by command, on images of every format."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.differential.io_pairs import IMAGES, IoPair

pytestmark = pytest.mark.peer

SCRIPTS = {
    "read": (
        "read 0 512",
        "read -C 0 64k",
        "read -q 0 1M",
        "read -v 0 32",
        "read -v 100 20",
        "read -vq 0 16",
        "read -r 0 4k",
        "read -p 0 4k",
        "read 0 0",
        "read 4M 0",
        "read 4M 1",
        "read 4194303 2",
        "read 1 3",
        "read 0 4M",
        "r 0 1k",
        "read 0 16 -v",
        "read -- 0 16",
    ),
    "verify": (
        "write -P 7 64k 64k",
        "read -P 7 64k 64k",
        "read -P 0x7 64k 64k",
        "read -P 007 64k 1",
        "read -P 8 64k 64k",
        "read -v -P 8 64k 16",
        "read -vq -P 8 64k 16",
        "read -P 8 -s 3 64k 64k",
        "read -P 8 -l 3 64k 64k",
        "read -P 8 -s 3 -l 5 64k 64k",
        "read -P 7 -s 0 -l 64k 64k 128k",
        "read -P 7 -l 0 64k 1k",
        "read -P 7 -s 1 0 1",
        "read -vP7 64k 16",
        "read -P 7 60k 8k",
        "readv -P 7 64k 1k 2k 3k",
        "readv -P 7 63k 1k 2k 3k",
        "readv -v 64k 16 16",
        "readv -C 64k 16 16",
        "readv -q 64k 16 16",
        "readv -r 64k 16",
    ),
    "write": (
        "write 0 64k",
        "write -P 1 1 3",
        "write -P 2 65535 2",
        "write -f 128k 4k",
        "write -C 256k 512",
        "write -q 257k 512",
        "write -s pattern 300k 25",
        "read -v 300k 32",
        "write -s pattern 301k 3",
        "write -r 0 512",
        "write -p 0 512",
        "w 1M 1k",
        "write 0 0",
        "write 4M 0",
        "write 4M 1",
        "write 4194303 2",
        "write -P 255 2M 1M",
        "writev 3M 1k 2k 3k",
        "writev -P 9 3M 3 5 7",
        "writev -f 3M 512",
        "writev -C 3M 512",
        "writev -q 3M 512",
        "writev 3M 0 0",
        "writev 4M 1",
        "read -P 9 3M 15",
        "map",
    ),
    "zero": (
        "write -P 3 0 4M",
        "write -z 64k 64k",
        "write -z 1 512",
        "write -z 192k 100k",
        "write -zu 1M 1M",
        "write -zf 2M 64k",
        "write -zq 2M 64k",
        "write -zC 2M 64k",
        "write -z 0 0",
        "write -z 4M 1",
        "read -P 0 1M 1M",
        "aio_write -z 3M 64k",
        "aio_flush",
        "aio_write -zu 3M 128k",
        "aio_flush",
        "aio_write -zuf 3M 128k",
        "aio_flush",
        "aio_write -z 4M 1",
        "aio_flush",
        "map",
    ),
    "discard": (
        "write -P 3 0 4M",
        "discard 0 64k",
        "discard -q 1M 1M",
        "discard -C 2M 1M",
        "discard 1 2",
        "discard 3M 1000k",
        "discard 0 0",
        "discard 4M 0",
        "discard 4M 1",
        "discard 4194303 2",
        "d 64k 64k",
        "read -P 3 192k 64k",
        "flush",
    ),
    "aio": (
        "aio_write -P 1 0 64k",
        "aio_flush",
        "aio_read -P 1 0 64k",
        "aio_flush",
        "aio_read -P 2 0 64k",
        "aio_flush",
        "aio_read -v 0 16 16",
        "aio_flush",
        "aio_read -C 0 16k",
        "aio_flush",
        "aio_read -q 0 16k",
        "aio_flush",
        "aio_read 4M 1",
        "aio_flush",
        "aio_write 4M 1",
        "aio_flush",
        "aio_write -C 0 512",
        "aio_flush",
        "aio_write -q 0 512",
        "aio_write -f 0 512",
        "aio_flush",
        "aio_write -i 0 512",
        "aio_read -i 0 512",
        "aio_write -iz 0 1 1",
        "aio_read -i x 1",
        "aio_write -P 5 1M 3 5 7",
        "length",
        "aio_flush",
        "aio_flush",
        "aio_read -P 5 1M 15",
        "close",
    ),
    "aio_at_the_end": ("aio_write -P 1 0 64k",),
    "aio_before_sleep": ("aio_read 0 4k", "sleep 300", "length"),
    "aio_before_flush": ("aio_read 0 4k", "flush", "length"),
    "aio_before_quit": ("aio_read 0 4k", "quit", "length"),
    "places": (
        "map",
        "write 64k 64k",
        "map",
        "write 256k 1k",
        "alloc 0",
        "alloc 0 1M",
        "alloc 64k 64k",
        "alloc 64k",
        "alloc 64k 1",
        "alloc 1 1",
        "alloc 0 0",
        "alloc 3M 2M",
        "alloc 4M",
        "alloc 4M 5",
        "alloc 1T",
        "alloc 0x100 1.5k",
        "a 0 4M",
        "map",
        "length",
        "l",
        "info",
        "i",
    ),
    "truncate": (
        "truncate 6M",
        "length",
        "map",
        "write 5M 64k",
        "truncate 5M",
        "length",
        "t 7M",
        "read -P 0 5M 1M",
        "truncate -m off 8M 9M",
        "length",
        "truncate 0",
        "length",
        "map",
        "read 0 0",
        "read 0 1",
    ),
    "compressed": (
        "write -c 0 64k",
        "write -c 0 64k",
        "write -c -P 5 128k 128k",
        "write -cC 256k 64k",
        "write -cq 320k 64k",
        "write -c 384k 1k",
        "write -c 385k 64k",
        "write -c 3M 1M",
        "write -c 3M 2M",
        "write -c 4M 64k",
        "write -c 0 0",
        "write 512k 1k",
        "write -c 512k 64k",
        "write -z 640k 64k",
        "write -c 640k 64k",
        "write -c -s pattern 704k 64k",
        "read -P 5 128k 128k",
        "map",
    ),
    "compressed_beside_a_failure": (
        "write -P 3 327680 10k",
        "write -P 3 0 10k",
        "write -c -P 5 0 320k",
        "read -P 5 64k 64k",
        "map",
        "write -c -P 5 64k 320k",
        "map",
        "write -P 3 1M 1k",
        "write -c -P 5 1M 512k",
        "map",
    ),
    "vm_state": (
        "write -b 0 512",
        "read -b -P 0xcd 0 512",
        "read -b -P 0 1M 512",
        "write -b -P 3 1M 1M",
        "read -b -P 3 1M 1M",
        "read -b -v 1M 512",
        "read -bC 0 512",
        "write -bq 0 512",
        "write -b 1000M 64k",
        "read -b 100G 512",
        "length",
        "map",
        "info",
    ),
    "quit": ("length", "quit at once", "length"),
    "flush": ("flush", "f", "write 0 1k", "flush", "sleep 0", "sleep 1", "sigraise 0"),
    "zones": (
        "zone_report 0 1",
        "zone_report 5M 1",
        "zone_open 0 1",
        "zone_open 4M 1",
        "zone_close 0 1",
        "zone_finish 0 1",
        "zone_reset 0 1",
        "zone_append 0 512 1k",
        "zone_append -p 0 512",
        "zrp 0 1",
        "zo x 1",
        "zap x y z",
    ),
    "open": (
        "open i",
        "close",
        "length",
        "open nofile",
        "open -o driver=raw base",
        "length",
        "close",
        "open -r -o driver=raw base",
        "write 0 1",
        "close",
        "open -o driver=raw,file.filename=base",
        "info",
        "close",
        "open -rU -o driver=raw base",
        "close",
        "open -n -o driver=raw base",
        "read 1 2",
        "close",
        "open -t writethrough -o driver=raw base",
        "write 1 2",
        "close",
        "open -d ignore -o driver=raw base",
        "discard 0 64k",
        "close",
        "open base",
    ),
    "reopen": (
        "reopen",
        "reopen -r",
        "write 0 512",
        "discard 0 512",
        "truncate 4M",
        "aio_write 0 512",
        "reopen -w",
        "write 0 512",
        "reopen -c none",
        "write 1 511",
        "reopen -c writethrough -r",
        "reopen -w -o cache.direct=on",
        "write 4096 512",
        "reopen -o read-only=on",
        "write 0 512",
        "reopen -o read-only=off",
        "reopen -o cache.direct=off",
        "reopen -o discard=ignore",
        "discard 0 64k",
        "reopen -o discard=unmap",
        "reopen -c unsafe",
        "write 64k 512",
        "reopen -c writeback",
        "read -P 0xcd 4096 512",
    ),
}


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("image", IMAGES)
def test_commands(image: str, script: str, real, io, tmp_path: Path) -> None:
    if (image, script) == ("fixed", "discard"):
        pytest.skip("qemu-io keeps what a fixed VHD discards; ours gives the space back")
    IoPair(real, io, tmp_path, image).agree(*SCRIPTS[script])


@pytest.mark.parametrize("image", ["raw", "qcow2", "overlay"])
@pytest.mark.parametrize(
    "options",
    [
        "-r",
        "-s",
        "-r -s",
        "-n",
        "-C",
        "-C -r",
        "-s -C",
        "-k",
        "-k -n",
        "-i threads",
        "-i native -t none",
        "-i io_uring",
        "-m",
        "-m -n",
        "-t writethrough",
        "-t directsync",
        "-t unsafe",
        "-t none",
        "-d ignore",
        "-d off",
        "-d unmap",
        "-d on",
        "-U",
        "-U -r",
        "--object secret,id=x,data=y",
        "-T nothing",
        "--read-only",
        "--force-share --read-only",
        "--snapshot",
        "--nocache --misalign",
        "--copy-on-read",
        "--cache=none --native-aio",
        "--aio=threads",
        "--discard=ignore",
        "--cmd length",
    ],
)
def test_options(image: str, options: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path, image)
    pair.agree(
        "length",
        "read -v 0 16",
        "write -P 1 64k 64k",
        "write -P 2 1 5",
        "read 1M 128k",
        "write -zu 2M 64k",
        "discard 64k 64k",
        "map",
        "info",
        options=options,
    )


LETTERS = {
    "read": ["-b", "-C", "-p", "-P 5", "-q", "-r", "-s 1", "-l 9", "-v"],
    "readv": ["-C", "-P 5", "-q", "-r", "-v"],
    "write": "-b|-c|-C|-f|-n|-p|-P 5|-q|-r|-s pattern|-u|-z".split("|"),
    "writev": ["-C", "-f", "-P 5", "-q", "-r"],
    "aio_read": ["-C", "-P 5", "-q", "-v"],  # -r ends qemu-io by an assertion
    "aio_write": ["-C", "-f", "-P 5", "-q", "-u", "-z"],
    "discard": ["-C", "-q"],
}


@pytest.mark.parametrize("image", ["raw", "qcow2", "vdi", "vpc"])
@pytest.mark.parametrize("command", LETTERS)
def test_letters_together(command: str, image: str, real, io, tmp_path: Path) -> None:
    """Every pair and every three of a command's options, aligned and not."""
    letters = LETTERS[command]
    lines = ["write -q -P 5 0 1M"]
    for count in range(4 if image == "raw" else 3):
        for chosen in itertools.combinations(letters, count):
            if image in ("vdi", "vpc") and "-n" in chosen:
                continue  # ours has nothing to do where the range reads as zero, QEMU's refuses
            for place in ("64k 64k" if "-v" not in chosen else "64k 64", "100 32"):
                lines.append(f"{command} {' '.join(chosen)} {place}")
                lines += ["aio_flush"] * command.startswith("aio")
    pair = IoPair(real, io, tmp_path, image)
    for start in range(0, len(lines), 100):
        pair.agree(*lines[start : start + 100])


NUMBERS = (
    "1k 1K 1kb 1.5k 1e3 0x10 0x 010 08 1.0 1.5 9E 8E 16E 1b 1B 1kk k 1,0 +5 0x1k 1.0001k - --1 "
    "1T 0x1p 5x 1. .5k . 18446744073709551615 9223372036854775807 9223372036854775808 1m 1g 0 00 "
    "0X10 0b1 1_0 ١ 1k1 -0 0x-1 1.99999999k 7.999999E"
).split()


@pytest.mark.parametrize(
    "line", ["alloc {}", "read -P {} 0 0", "read 0 {}", "truncate {}", "sigraise {}"]
)
def test_numbers(line: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    numbers = NUMBERS
    if line.startswith("sigraise"):
        numbers = ["0", "00", "0x0", "x", "-1", "1.5", "99", "65", "1k", "8E"]
    if line.startswith("truncate"):
        numbers = ["x", "1kb", "1.5", "9E", "08", "1.5k", "0x1000", "4M", "-", "1,0"]
    pair.agree(*(line.format(number) for number in numbers))


def test_the_last_sector_of_an_odd_size(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    for folder in pair.folders:
        (folder / "i").write_bytes(b"x" * 1000)
    pair.agree("length", "map", "alloc 0 1k", "read -v 990 34", "read 1024 1", "read 1000 25")
    pair.agree("write -P 5 999 2", "write -P 6 1010 5", "length", "discard 0 1k")
    pair.agree("write -z 1011 9", "aio_write 1020 2", "aio_flush", "write 1024 1", "length")


def test_an_empty_image(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    for folder in pair.folders:
        (folder / "i").write_bytes(b"")
    pair.agree(
        "map", "length", "alloc 0", "read 0 0", "read 0 1", "info", "write 0 1", "discard 0 1"
    )


def test_large_requests(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    pair.agree(
        "truncate 5T",
        "read -v 4T 1",
        "write -P 1 4T 64k",
        "length",
        "alloc 0 5T",
        "map",
        "read -P 1 4T 64k",
        "write -z -n 0 4G",
        "write -z 0 4G",
        "aio_write -z 0 3G",
        "aio_flush",
        "truncate 4M",
    )


@pytest.mark.parametrize(
    "stdin",
    [
        "",
        "length\n",
        "length",
        "length\n\nfoo\nread 0 512\nquit\nlength\n",
        "length\nfoo",
        "write\nq\n",
        "write -x\n  read   0   16   \n",
        "aio_read 0 512\nsleep 300\nlength\naio_flush\n",
        "aio_read 0 512\n",
        "open i\nclose\nlength\nopen -o driver=raw base\nlength\n",
        "sigraise 15\nlength\n",
        "length\nabort\n",
        "read -v 0 16\n" * 50,
    ],
)
def test_lines_of_standard_input(stdin: str, real, io, tmp_path: Path) -> None:
    IoPair(real, io, tmp_path).agree(stdin=stdin)


def test_a_long_line_is_one_command(real, io, tmp_path: Path) -> None:
    """Where we differ: qemu-io would write 51 bytes, and then look for a command "2"."""
    pair = IoPair(real, io, tmp_path)
    line = "write -P 1 0 ".ljust(1021) + "512\n"
    theirs, found = pair.run("-f", "raw", "i", stdin=line)
    assert "wrote 51/51 bytes" in theirs.out
    assert "wrote 512/512 bytes" in found.out
    assert (found.code, found.err) == (0, "")


@pytest.mark.parametrize("last", ["abort", "sigraise 15", "sigraise 9", "sigraise 2", "sigraise 6"])
def test_ends_by_a_signal(last: str, real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    assert pair.agree("length", "read 0 1k", last, "length").code < 0


def test_without_a_file(real, io, tmp_path: Path) -> None:
    pair = IoPair(real, io, tmp_path)
    pair.opened = []
    pair.agree("length", "open", "open -o driver=raw i", "length", "close", "length")
    pair.agree("help nothing", "sleep 1", "sigraise 0", "quit")
    pair.agree("open -s -o driver=raw i", "write 0 4M", "info", "map", "close")
    pair.agree("open -C -o driver=raw i", "open i", "close", "close")
    pair.agree("open -o driver=qcow2 i", "open -o driver=foo i", "open -o foo=1,driver=raw i")
    pair.agree("open -r -o driver=blkdebug,image.filename=i", "info", "map", "read 0 512")
    for opened in (
        "blkdebug i",
        "blkdebug blkdebug::i",
        "raw blkdebug::i",
        "file i",
        "null-co i",
        "copy-on-read i",
    ):
        pair.agree(f"open -o driver={opened}", "info", "length", "map", "read 0 512")
    pair.agree(stdin="length\nopen -r i\nlength\n")


@pytest.mark.parametrize(
    "words",
    [
        "--image-opts driver=raw,file.filename=i",
        "--image-opts driver=qcow2,file.filename=i",
        "--image-opts i",
        "--image-opts file.filename=i",
        "--image-opts driver=raw,file.filename=nofile",
        "--image-opts driver=raw,read-only=on,file.filename=i",
        "-U --image-opts driver=raw,force-share=off,file.filename=i",
        "-rU --image-opts driver=raw,force-share=on,file.filename=i",
        "-U --image-opts driver=raw,file.filename=i",
        "-r i",
        "i",
        "nofile",
        "''",
        "-r .",
        "-f qcow2 i",
        "-f foo i",
        "-f file i",
        "-f raw nofile",
        'json:{"driver":"raw","file":{"driver":"file","filename":"i"}}',
        "json:{}",
    ],
)
def test_names(words: str, real, io, tmp_path: Path) -> None:
    import shlex

    pair = IoPair(real, io, tmp_path)
    pair.opened = shlex.split(words)
    pair.agree("length", "info", "write 512 512", "map")


def test_a_signal_that_qemu_uses_itself_is_passed_over(real, tmp_path: Path) -> None:
    """As programs of their own: a test's process forks, and has handlers of its own."""
    (tmp_path / "i").write_bytes(bytes(512))
    words = ["-f", "raw", "-c", f"sigraise {int(signal.SIGUSR1)}", "-c", "length", "i"]
    for program in (real["qemu-io"].argv(), [sys.executable, "-m", "diskwright.cli.io"]):
        done = subprocess.run([*program, *words], cwd=tmp_path, capture_output=True, check=False)
        assert (done.returncode, done.stdout) == (0, b"512 bytes\n"), done
