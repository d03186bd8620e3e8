"""qcow2's header and extensions: bytes there and back, lies in them, features nobody knows."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.drivers.formats.qcow2.extensions import Extensions, refuse_unknown
from diskwright.drivers.formats.qcow2.header import Header, Incompatible
from diskwright.errors import DiskwrightError, FormatError, UnsupportedError
from tests.unit.qcow2_images import MIB, Fields, Qemu, create, memory_folder, opened, words

tmp_path = memory_folder


@pytest.fixture
def qemu(real, tmp_path) -> Qemu:
    return Qemu(real, tmp_path)


@st.composite
def headers(draw: st.DrawFn) -> Header:
    bits = draw(st.integers(9, 21))
    header = Header(version=draw(st.sampled_from((2, 3))), cluster_bits=bits)
    l1_entries = draw(st.integers(0, 1000))
    header.l1_size = l1_entries + draw(st.integers(0, 50))
    header.size = draw(st.integers(0, l1_entries << (2 * bits - 4)))  # with extended L2 entries
    places = st.integers(1, (1 << 54) // (1 << bits) - 1)
    header.l1_table_offset = draw(places) << bits
    header.refcount_table_offset = draw(places) << bits
    header.refcount_table_clusters = draw(st.integers(1, (8 << 20) >> bits))
    header.nb_snapshots = draw(st.integers(0, 65536))
    header.snapshots_offset = draw(places) << bits
    if header.version == 3:
        header.incompatible_features = draw(st.integers(0, (1 << 64) - 1))
        if bits < 14:  # no room for subclusters
            header.incompatible_features &= ~Incompatible.EXTENDED_L2
        header.compatible_features = draw(st.integers(0, (1 << 64) - 1))
        header.autoclear_features = draw(st.integers(0, (1 << 64) - 1))
        header.refcount_order = draw(st.integers(0, 6))
        header.header_length = draw(st.sampled_from((104, 112, 160)))
        if header.header_length > 104:
            header.compression_type = draw(st.integers(0, 255))
    return header


@given(headers())
def test_a_header_comes_back_from_its_bytes(header):
    assert Header.parse(header.pack().ljust(header.header_length, b"\0")) == header


@given(
    headers(),
    st.text(st.characters(blacklist_characters="\0", blacklist_categories=["Cs"]), max_size=40),
    st.sampled_from([None, "raw", "qcow2", "a-format"]),
    st.lists(st.tuples(st.integers(5, 1 << 20), st.binary(max_size=30)), max_size=3),
)
def test_extensions_come_back_from_their_bytes(header, name, form, unknown):
    header.header_length = 72 if header.version == 2 else 112
    header.cluster_bits = max(header.cluster_bits, 12)
    extensions = Extensions()
    extensions.backing_file = name or None
    extensions.backing_format = form if name else None
    extensions.unknown = unknown
    packed = extensions.pack(header).ljust(header.cluster_size, b"\0")
    assert Extensions.parse(header, packed) == extensions


def test_every_flipped_byte_of_a_header_is_taken_or_refused_in_one_line(tmp_path, rng):
    path = tmp_path / "flipped.qcow2"
    create(path, 10 * MIB, backing_file="base", backing_fmt="raw")
    cluster = path.read_bytes()[:65536]
    for at in range(540):
        for value in {cluster[at] ^ 1 << rng.randrange(8), 0, 255}:
            lie = bytearray(cluster)
            lie[at] = value
            said = _refusal(bytes(lie))
            assert said is None or (said and "\n" not in said)


def _refusal(cluster: bytes) -> str | None:
    try:
        header = Header.parse(cluster[:4096])
        refuse_unknown(header, Extensions.parse(header, cluster))
    except (FormatError, UnsupportedError) as error:
        return str(error)
    return None


def test_random_bytes_raise_nothing_else(rng):
    for _ in range(300):
        data = b"QFI\xfb\0\0\0\3" + rng.randbytes(600)
        try:
            header = Header.parse(data)
            Extensions.parse(header, data)
        except (FormatError, UnsupportedError):
            continue


#: (field's offset, form, value) that QEMU refuses, each in its own words
LIES = [
    (4, ">I", 4),
    (20, ">I", 8),
    (20, ">I", 22),
    (8, ">QI", (65537, 3)),
    (8, ">QI", (65530, 9)),
    (8, ">QI", (600, 1024)),
    (24, ">Q", 1 << 63),
    (24, ">Q", 1 << 50),
    (32, ">I", 3),
    (36, ">I", 0),
    (36, ">I", 5 << 20),
    (40, ">Q", 1),
    (48, ">Q", 1),
    (56, ">I", 0),
    (56, ">I", 129),
    (60, ">IQ", (1, 1)),
    (60, ">IQ", (65537, 0x50000)),
    (72, ">Q", 1 << 5),
    (72, ">Q", 1 << 5 | 1 << 40),
    (72, ">Q", 8),
    (96, ">I", 7),
    (100, ">I", 103),
    (100, ">I", 70000),
    (104, ">B", 1),
    (116, ">I", 70000),
]


@pytest.mark.parametrize(("offset", "form", "value"), LIES)
def test_lies_are_refused_in_qemus_words(qemu, tmp_path, offset, form, value):
    import struct

    path = tmp_path / "lie.qcow2"
    create(path, 10 * MIB)
    data = bytearray(path.read_bytes())
    struct.pack_into(form, data, offset, *(value if isinstance(value, tuple) else (value,)))
    path.write_bytes(data)
    said = qemu.img("info", "-f", "qcow2", path, fails=True)
    assert said.code == 1
    with pytest.raises(DiskwrightError) as caught:
        opened(path, read_only=True)
    assert said.err == f"qemu-img: Could not open '{path}': {caught.value.qemu_message}\n"


def test_an_unknown_feature_is_named_from_the_images_own_table(qemu, tmp_path):
    path = tmp_path / "future.qcow2"
    create(path, MIB)
    with path.open("r+b") as file:
        file.seek(112 + 8)
        file.write(b"\0\x05time travel".ljust(48, b"\0"))
    Fields(path).put(72, 1 << 5)
    with pytest.raises(UnsupportedError, match="Unsupported qcow2 feature.s.: time travel"):
        opened(path, read_only=True)
    assert "time travel" in qemu.img("info", path, fails=True).err


def test_encryption_is_refused_by_its_name(tmp_path):
    path = tmp_path / "later.qcow2"
    create(path, MIB)
    Fields(path).put(32, 1, ">I")
    with pytest.raises(UnsupportedError, match="Encrypted"):
        opened(path, read_only=True)


def test_compatible_features_stay_and_autoclear_ones_go_with_the_first_write(tmp_path):
    path = tmp_path / "features.qcow2"
    create(path, MIB)
    fields = Fields(path)
    fields.put(80, 1 << 40)
    fields.put(88, 1 << 41)
    with opened(path) as node:
        node.read(0, 512)
        assert fields.get(88) == 1 << 41
        node.write(0, b"x")
        assert fields.get(88) == 0
    assert fields.get(80) == 1 << 40


def test_unknown_extensions_survive_a_new_backing_name(qemu, tmp_path):
    path = tmp_path / "kept.qcow2"
    create(path, MIB)
    with path.open("r+b") as file:
        file.seek(504)
        file.write(bytes.fromhex("12345678 00000005") + b"hello\0\0\0" + bytes(8))
    names = [("a.raw", "raw"), ("b" * 400, "qcow2"), ("c" * 390, "raw"), (None, None)]
    for name, form in names:
        # Only the names are of interest, so nothing that they name is opened.
        with opened(path, backing=None) as node:
            node.change_backing(name, form)
            assert node.info().backing_filename == name
        assert b"\x12\x34\x56\x78\0\0\0\5hello\0\0\0" in path.read_bytes()[:65536]
        said = qemu.json("info", "--output=json", path)
        assert said.get("backing-filename") == name
        assert said.get("backing-filename-format") == form


def test_a_name_that_does_not_fit_changes_nothing(tmp_path):
    path = tmp_path / "small.qcow2"
    create(path, MIB, cluster_size=512)
    before = path.read_bytes()
    with opened(path, backing=None) as node:
        for length, words_of_qemu in ((1024, "Invalid argument"), (600, "No space left on device")):
            with pytest.raises(DiskwrightError) as caught:
                node.change_backing("n" * length, "raw")
            assert caught.value.qemu_message == words_of_qemu
    assert path.read_bytes() == before


def test_small_sizes_and_long_names_are_made_as_qemu_makes_them(qemu, tmp_path):
    chance = random.Random(1)
    for _ in range(12):
        options: dict[str, object] = {
            "cluster_size": chance.choice([512, 4096, 65536]),
            "compat": chance.choice(["0.10", "1.1"]),
        }
        if chance.random() < 0.6:
            options["backing_file"] = "n" * chance.choice([1, 100, 350, 1023])
            options["backing_fmt"] = "raw"
        size = chance.choice([0, 1, 512, 100000])
        ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
        made = qemu.img(
            "create", "-q", "-u", "-f", "qcow2", *words(options), theirs, size, fails=True
        )
        if made.code:
            with pytest.raises(DiskwrightError) as caught:
                create(ours, size, **options)
            assert made.err == f"qemu-img: {theirs}: {caught.value.qemu_message}\n"
        else:
            create(ours, size, **options)
            assert ours.read_bytes() == theirs.read_bytes(), options
