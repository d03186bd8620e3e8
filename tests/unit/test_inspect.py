"""`inspect` of images that cannot be opened here, and of those whose names want to deceive."""

from __future__ import annotations

import json
import os
import random
import struct

import pytest

import diskwright
from diskwright.block.info import NodeInfo, SnapshotInfo
from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image
from diskwright.cli import img, main
from diskwright.errors import UnsupportedError, without_controls

HOSTILE = "a\nverdict: safe\x1b[2K\r\u202e\udcff\\"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def qemu_img(real, folder):
    def call(*words: str) -> None:
        done = real["qemu-img"].run(*words, cwd=folder)
        assert done.code == 0, done

    return call


def patch(name: str, *places: tuple[int, bytes]) -> None:
    with open(name, "r+b") as file:
        for offset, value in places:
            file.seek(offset)
            file.write(value)


def rules(found) -> dict[str, bool | None]:
    return {rule.name: rule.passed for rule in found.rules}


# -------------------------------------------------------------------------- what cannot be opened


def test_an_external_data_file_is_named_and_not_opened(folder, qemu_img):
    qemu_img("create", "-f", "qcow2", "-o", "data_file=../data,extended_l2=on", "x.qcow2", "1M")
    (folder / "../data").unlink()
    found = diskwright.inspect("x.qcow2")
    assert (found.format, found.size) == ("qcow2", 1 << 20)
    assert found.features == ["external data file", "extended L2 entries"]
    (one,) = found.references
    assert (one.role, one.name, one.resolved, one.format) == (
        "data file",
        "../data",
        "../data",
        "raw",
    )
    assert rules(found)["opens"] is True
    assert rules(found)["names nothing outside of its folder"] is False
    assert found.safe is False


def test_an_encrypted_image_is_described(qemu_img, said):
    secret = ["--object", "secret,id=s,data=x"]
    options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"
    qemu_img("create", "-f", "qcow2", *secret, "-o", options, "x.qcow2", "1M")
    code, out, _ = said(main, "inspect", "x.qcow2")
    assert code == 3
    assert "format: qcow2\nvirtual size: 1 MiB (1048576 bytes)\n" in out
    assert "features: LUKS encryption\nencrypted: yes\n" in out
    assert "outside references: none\n" in out
    assert "verdict: cannot be told, 1 of the rules" in out


def test_unknown_features_are_named_with_what_else_the_header_says(qemu_img, said):
    qemu_img("create", "-f", "qcow2", "base", "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "-o", "lazy_refcounts=on", "x")
    patch("x", (72, struct.pack(">Q", 1 << 40)), (88, struct.pack(">Q", 1 << 3)))
    with open("x", "rb") as file:  # the table of names: the last one becomes that of bit 40
        place = file.read(4096).index(b"\2\1raw external data")
    patch("x", (place, bytes([0, 40]) + b"shiny\x1b[31m".ljust(46, b"\0")))
    found = diskwright.inspect("x")
    assert found.features == [
        "unknown incompatible feature, bit 40 ('shiny\x1b[31m')",
        "lazy refcounts",
        "unknown autoclear feature, bit 3",
    ]
    assert [(one.name, one.format) for one in found.references] == [("base", "qcow2")]
    assert found.safe is None
    code, out, _ = said(main, "inspect", "x")
    assert code == 3
    assert "\x1b" not in out
    assert "bit 40 ('shiny\\x1b[31m')" in out


def test_an_unknown_version_is_described_too(qemu_img):
    qemu_img("create", "-f", "qcow2", "base", "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "x")
    patch("x", (4, struct.pack(">I", 7)))
    found = diskwright.inspect("x")
    assert (found.format, found.size) == ("qcow2", 1 << 20)
    assert [one.name for one in found.references] == ["base"]
    assert "version 7" in str(found.error)


def test_bitmaps_are_counted(real, folder, qemu_img, said):
    qemu_img("create", "-f", "qcow2", "x", "1M")
    qemu_img("bitmap", "--add", "x", "b0")
    qemu_img("bitmap", "--add", "x", "b1")
    code, out, _ = said(main, "inspect", "x")
    assert code == 0
    assert "features: bitmaps\n" in out
    assert "bitmaps: 2\n" in out


def test_a_format_without_a_driver_is_named(folder, said):
    (folder / "x").write_bytes(b"vhdxfile".ljust(4096, b"\0"))
    code, out, _ = said(main, "inspect", "x")
    assert code == 3
    assert "format: vhdx\n" in out
    assert "outside references: cannot be told\n" in out
    found = json.loads(said(main, "inspect", "--output=json", "x")[1])
    assert (found["format"], found["references"], found["safe"]) == ("vhdx", None, None)


@pytest.mark.parametrize("format", ["vdi", "vpc"])
def test_parents_are_named(folder, format):
    diskwright.create("base", "4M", format=format)
    diskwright.create("top", format=format, options={"backing": "base"})
    found = diskwright.inspect("top")
    assert found.features == ["differencing"]
    assert {one.format for one in found.references} == {format}
    assert found.safe


def test_only_the_image_is_opened_whatever_its_header_says(folder, qemu_img, monkeypatch):
    qemu_img("create", "-f", "qcow2", "base", "1M")
    qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", "x")
    patch("x", (72, struct.pack(">Q", 1 << 40)))
    opened = []
    plain = os.open
    monkeypatch.setattr(os, "open", lambda path, *rest: opened.append(path) or plain(path, *rest))
    diskwright.inspect("x")
    assert set(opened) == {"x"}


@pytest.mark.parametrize("length", [0, 4, 8, 71, 72, 100, 104, 4096])
def test_any_header_is_described_or_not_but_ends(folder, seed, length):
    rng = random.Random(seed)
    for _ in range(50):
        tail = rng.choice([rng.randbytes(length), b"\xff" * length, bytes(length)])
        (folder / "x").write_bytes(b"QFI\xfb\0\0\0\3" + tail)
        found = diskwright.inspect("x")
        assert found.format == "qcow2"
        assert found.safe is not True


# ------------------------------------------------------------------------------------ exit codes


def test_exit_codes_say_the_verdict(folder, qemu_img, said):
    qemu_img("create", "-f", "qcow2", "good", "1M")
    qemu_img("create", "-f", "qcow2", "broken", "1M")
    patch("broken", (72, struct.pack(">Q", 2)))
    (folder / "plain").write_bytes(bytes(1024))
    assert said(main, "inspect", "good")[0] == 0
    assert said(main, "inspect", "none")[0] == 1
    assert said(main, "inspect", "broken")[0] == 2
    assert said(main, "inspect", "plain")[0] == 2
    assert said(main, "inspect", "-f", "raw", "plain")[0] == 0


# -------------------------------------------------------------------------------- hostile names


def hostile(name: str) -> None:
    """An image whose backing file, its format and a snapshot are called as no file should be."""
    diskwright.create(name, "1M", format="qcow2")
    with diskwright.open(name, read_only=False) as node:
        node.change_backing(HOSTILE, "raw\nformat: raw")
    with open_image(Opener(read_only=False, follow_backing=False), name) as node:
        node.snapshot_create(SnapshotInfo("", "snap\nverdict: safe"))


@pytest.mark.parametrize("command", ["inspect", "info", "snapshot"])
def test_names_forge_no_lines(folder, said, command):
    hostile("x")
    words = [command, *(["-l"] if command == "snapshot" else []), "x"]
    _, out, _ = said(main, *words)
    assert "\nverdict: safe" not in out
    assert "\nformat: raw" not in out
    assert all(char.isprintable() or char == "\n" for char in out)
    if command != "snapshot":
        assert without_controls(HOSTILE) in out


def test_the_compatible_program_prints_names_as_qemu_does(folder, capfdbinary, real):
    hostile("x")
    wanted = real["qemu-img"].run("info", "x", cwd=folder)
    assert "backing file: a\nverdict: safe\x1b" in wanted.out
    code = img.main(["info", "x"])
    assert code == wanted.code
    assert b"backing file: a\nverdict: safe\x1b" in capfdbinary.readouterr().out


def test_escapes_cannot_be_written_by_a_name():
    assert without_controls("C:\\x0a") == "C:\\x0a"
    assert without_controls("C:\\x0a\n") == "C:\\\\x0a\\x0a"
    assert without_controls("\u2028\U000e0001\udcff é") == "\\u2028\\U000e0001\\xff é"


def test_a_driver_without_a_glimpse_says_so():
    with pytest.raises(UnsupportedError):
        Node.glimpse(None)
    assert NodeInfo("any", 0).snapshot_count == 0


def test_a_fixed_vhd_is_told_by_its_footer(tmp_path):
    path = tmp_path / "fixed.vhd"
    diskwright.create(path, "1M", format="vpc", options="subformat=fixed")
    found = diskwright.inspect(path)
    assert (found.format, found.ends_as, found.safe) == ("raw", "vpc", False)
    assert any("'vpc'" in rule.why for rule in found.rules)
    assert diskwright.inspect(path, format="vpc").safe
    with path.open("r+b") as file:
        file.seek(-20, os.SEEK_END)
        file.write(b"another")
    assert diskwright.inspect(path).ends_as is None


def test_an_image_over_itself_is_not_safe(tmp_path):
    path = tmp_path / "disk.qcow2"
    diskwright.create(path, "1M", format="qcow2")
    diskwright.rebase(path, "disk.qcow2", backing_format="qcow2", unsafe=True)
    found = diskwright.inspect(path)
    assert found.safe is False
    assert any("the image itself" in rule.why for rule in found.rules)
