"""What an image is taken for: by its first bytes, as QEMU takes it.

Formats that are not read yet are refused by their names: copied as raw, their headers would end
up in the copy, and nobody would be told.
"""

from __future__ import annotations

import re

import pytest

from diskwright.block.foreign import FOREIGN
from tests.differential import programs
from tests.differential.img_pairs import Pair

pytestmark = pytest.mark.peer

_CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"


def _bochs(magic: bytes = b"Bochs Virtual HD Image", kind: bytes = b"Growing", version=2) -> bytes:
    head = magic.ljust(32, b"\0") + b"Redolog".ljust(16, b"\0") + kind.ljust(16, b"\0")
    return head + (version << 16).to_bytes(4, "little")


#: file name -> its bytes
HEADS = {
    "qcow-0": b"QFI\xfb\0\0\0\0",
    "qcow-1": b"QFI\xfb\0\0\0\1",
    "qed": b"QED\0",
    "kdmv": b"KDMV",
    "cowd": b"COWD",
    "vhdx": b"vhdxfile",
    "parallels": b"WithoutFreeSpace\2\0\0\0",
    "parallels-ext": b"WithouFreSpacExt\2\0\0\0",
    "parallels-1": b"WithouFreSpacExt\1\0\0\0",
    "luks": b"LUKS\xba\xbe\0\1".ljust(4096, b"\0"),
    "luks-2": b"LUKS\xba\xbe\0\2".ljust(4096, b"\0"),
    "bochs-1": _bochs(version=1),
    "bochs-2": _bochs(),
    "bochs-3": _bochs(version=3),
    "bochs-undoable": _bochs(kind=b"Undoable"),
    "bochs-longer": _bochs(magic=b"Bochs Virtual HD Imagine"),
    "cloop": _CLOOP,
    "cloop-cut": _CLOOP[:50],
    "cloop.dmg": _CLOOP,
    "any.dmg": b"abc",
    "any.DMG": b"abc",
    "empty.dmg": b"",
    ".dmg": b"abc",
    "text-1": b"version=1\n",
    "text-2": b"# Disk DescriptorFile\nversion=2\n",
    "text-3": b"# x\r\nversion=3\r\n",
    "text-4": b"version=4\n",
    "text-spaces": b"# x\n  \n \r\nversion=1\n",
    "text-empty-line": b"# x\n\nversion=1\n",
    "text-tab": b"# x\n\t\nversion=1\n",
    "text-indented": b" version=1\n",
    "text-no-end": b"# x\nversion=1",
    "text-other-first": b'# x\nencoding="x"\nversion=1\n',
    "text-to-the-last-byte": b"#" + b"x" * 500 + b"\nversion=1\n",
    "text-one-byte-more": b"#" + b"x" * 501 + b"\nversion=1\n",
}

#: what qemu-img makes -> more words for `create`
MADE = {
    "qcow": [],
    "qed": [],
    "vmdk": [],
    "vhdx": [],
    "parallels": [],
    "luks": ["--object", "secret,id=s,data=x", "-o", "key-secret=s"],
}


def taken_for(result: programs.Result) -> str:
    """The format, or "refused"."""
    found = re.search(r"^file format: (\S+)$", result.out, re.MULTILINE)
    return found[1] if found else "refused"


@pytest.mark.parametrize("name", HEADS)
def test_bytes_are_taken_for_what_qemu_takes_them_for(name, real, ours, tmp_path):
    (tmp_path / name).write_bytes(HEADS[name])
    wanted = taken_for(real["qemu-img"].run("info", name, cwd=tmp_path))
    found = ours.run("info", name, cwd=tmp_path)
    assert taken_for(found) == wanted, found


@pytest.mark.usefixtures("beyond_qemu")
@pytest.mark.parametrize("format", MADE)
def test_an_image_of_a_format_that_is_not_read_is_refused_by_name(format, real, ours, tmp_path):
    image = f"disk.{format}"
    made = real["qemu-img"].run("create", "-f", format, *MADE[format], image, "1M", cwd=tmp_path)
    assert made.code == 0, made
    found = ours.run("convert", "-O", "raw", image, "copy", cwd=tmp_path)
    assert found.code == 1
    assert len(found.err.splitlines()) == 1
    assert f"('{format}')" in found.err
    assert "-f raw" in found.err
    assert not (tmp_path / "copy").exists()
    said = ours.run("info", "-f", format, image, cwd=tmp_path)
    assert (said.code, said.err) == (
        1,
        f"diskwright-img: Could not open '{image}': "
        f"The driver '{format}' is not part of this release\n",
    )
    as_raw = ours.run("convert", "-f", "raw", "-O", "raw", image, "copy", cwd=tmp_path)
    assert as_raw.code == 0, as_raw
    assert (tmp_path / "copy").read_bytes()[:512] == (tmp_path / image).read_bytes()[:512]


@pytest.mark.usefixtures("beyond_qemu")
def test_a_backing_file_of_such_a_format_is_refused_too(real, ours, tmp_path):
    real["qemu-img"].run("create", "-f", "vhdx", "base", "1M", cwd=tmp_path)
    line = ["create", "-f", "qcow2", "-b", "base", "-F", "vhdx", "over.qcow2"]
    assert real["qemu-img"].run(*line, cwd=tmp_path).code == 0
    found = ours.run("map", "over.qcow2", cwd=tmp_path)
    assert (found.code, found.err) == (
        1,
        "diskwright-img: Could not open 'over.qcow2': Could not open backing file: "
        "The driver 'vhdx' is not part of this release\n",
    )


def test_a_driver_of_somebody_elses_takes_the_place(tmp_path, monkeypatch):
    import diskwright
    from diskwright.block import registry
    from diskwright.drivers.formats.raw import Raw

    class Theirs(Raw):
        driver = "vhdx"

    monkeypatch.setattr(registry, "FORMATS", dict(registry.FORMATS))
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    registry.register("vhdx", Theirs)
    (tmp_path / "disk").write_bytes(b"vhdxfile".ljust(1024, b"\0"))
    with diskwright.open(tmp_path / "disk") as node:
        assert node.driver == "vhdx"


def test_what_a_guest_writes_does_not_make_such_a_format_either(real, ours, tmp_path):
    """A raw image that was guessed: QEMU refuses a header of any format that it knows."""
    import diskwright
    from diskwright.errors import IOFailure

    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    with diskwright.open(str(tmp_path / "disk"), read_only=False) as node:
        for name, head in HEADS.items():
            if name.startswith("."):
                continue
            (tmp_path / "probe").write_bytes(head.ljust(1024, b"\0"))
            wanted = taken_for(real["qemu-img"].run("info", "probe", cwd=tmp_path)) != "raw"
            try:
                node.write(0, head.ljust(512, b"\0")[:512])
                refused = False
            except IOFailure:
                refused = True
            assert refused == wanted, name


def test_every_row_is_reached():
    found = {
        one.name
        for one in FOREIGN
        for name, head in HEADS.items()
        if head and one.claims(head.ljust(512, b"\0")[:512], name)
    }
    assert found == {one.name for one in FOREIGN}


@pytest.mark.parametrize(
    "line",
    ["info IMAGE", "convert -O raw IMAGE b", "create -f qcow2 -b IMAGE b", "compare a IMAGE"],
)
def test_a_head_that_cannot_be_read(line, real, ours, tmp_path):
    pair = Pair(real["qemu-img"], ours, tmp_path)
    pair.prepare("create -q -f qcow2 a 1M")
    for folder in pair.folders:
        (folder / "rules").write_text('[inject-error]\nevent = "none"\n')
    pair.same(line.replace("IMAGE", "blkdebug:rules:a"))
