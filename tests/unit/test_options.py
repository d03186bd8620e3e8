"""Options: what users write becomes values, or QEMU's sentence."""

from __future__ import annotations

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.block.options import (
    Option,
    Options,
    SizeRangeError,
    parse_size,
    parse_words,
    split_words,
    wants_help,
)
from diskwright.errors import OptionError

SIZE_HELP = (
    "\nOptional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n"
    "and exabytes, respectively."
)

DECLARED = Options(
    Option("cluster_size", "size", 65536, "qcow2 cluster size"),
    Option("compat", "enum", None, "level", choices=("0.10", "1.1"), refusal="no '{value}' here"),
    Option("size", "size", None, "Virtual disk size"),
    Option("lazy_refcounts", "bool", False, "Postpone refcount updates"),
    Option("refcount_bits", "int", 16, "Width of a reference count entry in bits"),
    Option("ratio", "number"),
    Option("backing_file", "str", None, "File name of a base image"),
    Option("encrypt.", prefix=True),
)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1024),
        ("1K", 1024),
        ("1.5G", 3 << 29),
        (".5G", 1 << 29),
        ("1.", 1),
        ("1.0", 1),
        ("10b", 10),
        ("0x10000", 65536),
        ("010", 10),
        ("+5K", 5120),
        (" 1K", 1024),
        ("1e", 1 << 60),
        ("1.1K", 1126),
        ("1.0005K", 1025),
        ("18446744073709551615", (1 << 64) - 1),
    ],
)
def test_a_size_is_what_qemu_takes_it_for(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "abc", "1.5", "1kB", "1e3", "0x", "0x1K", "1 ", ".", "inf"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError) as caught:
        parse_size(text)
    assert not isinstance(caught.value, SizeRangeError)


@pytest.mark.parametrize("text", ["-1", "-0", "16E", "18446744073709551616", -1, 1 << 64])
def test_a_size_out_of_range_is_told_apart(text):
    with pytest.raises(SizeRangeError):
        parse_size(text)


@given(st.text(max_size=30))
def test_whatever_is_written_is_a_size_or_refused(text):
    try:
        size = parse_size(text)
    except ValueError:
        return
    assert 0 <= size < 1 << 64


@pytest.mark.parametrize(
    ("words", "qemu"),
    [
        ("bogus=1", "Invalid parameter 'bogus'"),
        ("nobogus", "Invalid parameter 'bogus'"),
        (
            "cluster_size=abc",
            "Parameter 'cluster_size' expects a non-negative number below 2^64" + SIZE_HELP,
        ),
        ("cluster_size=-1", "Value '-1' is out of range for parameter 'cluster_size'"),
        ("lazy_refcounts=maybe", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
        ("lazy_refcounts=ON", "Parameter 'lazy_refcounts' expects 'on' or 'off'"),
        ("refcount_bits=abc", "Parameter 'refcount_bits' expects a number"),
        (
            "refcount_bits=99999999999999999999999",
            "Value '99999999999999999999999' is too large for parameter 'refcount_bits'",
        ),
        ("compat=2", "no '2' here"),
        ("ratio=x", "Parameter 'ratio' expects a number"),
        ("", "Invalid option list: "),
        ("cluster_size=4k,", "Invalid option list: cluster_size=4k,"),
    ],
)
def test_refusals_have_qemus_words(words, qemu):
    with pytest.raises(OptionError) as caught:
        DECLARED.validate(parse_words(words))
    assert caught.value.qemu_message == qemu


def test_values_have_their_types_and_defaults():
    words = parse_words("cluster_size=2M,lazy_refcounts,refcount_bits=0x20,backing_file=a,,b")
    values = DECLARED.validate(words)
    assert values == {
        "cluster_size": 2 << 20,
        "compat": None,
        "size": None,
        "lazy_refcounts": True,
        "refcount_bits": 32,
        "ratio": None,
        "backing_file": "a,b",
    }


def test_a_later_word_wins_and_no_negates():
    assert parse_words("a=1,a=2,nob") == {"a": "2", "b": "off"}


def test_only_what_was_said_is_parsed():
    assert DECLARED.parse_words("cluster_size=4k") == {"cluster_size": 4096}
    with pytest.raises(OptionError):
        DECLARED.parse_words("x=1")


def test_only_values_hold_doubled_commas():
    assert split_words("a,,b=1,,2,c") == [("a", None), ("b", "1,2"), ("c", None)]


def test_a_declared_prefix_covers_its_names():
    assert DECLARED.validate({"encrypt.format": "luks"})["encrypt.format"] == "luks"


def test_children_pass_where_they_may():
    file = {"driver": "file"}
    assert Options().validate({"file": file}, children=("file",)) == {"file": file}
    with pytest.raises(OptionError):
        Options().validate({"file": file})


def test_an_option_of_the_wrong_kind_is_refused():
    with pytest.raises(OptionError):
        DECLARED.validate({"backing_file": 5})
    with pytest.raises(OptionError):
        DECLARED.validate({"cluster_size": True})
    with pytest.raises(OptionError):
        DECLARED.validate({"refcount_bits": True})


def test_help_has_a_line_an_option_in_order_of_names():
    assert DECLARED.help_text("Supported x options:").splitlines()[:3] == [
        "Supported x options:",
        "  backing_file=<str>     - File name of a base image",
        "  cluster_size=<size>    - qcow2 cluster size",
    ]
    assert "  lazy_refcounts=<bool (on/off)> - Postpone refcount updates" in DECLARED.help_lines()


def test_help_is_asked_for_by_a_bare_word():
    assert wants_help("help")
    assert wants_help("a=1,?")
    assert not wants_help("help=1")


def test_the_announcement_has_defaults_and_what_was_said_in_declared_order():
    given = {"lazy_refcounts": "yes", "size": "1M", "refcount_bits": "0x10"}
    assert DECLARED.announcement(given) == (
        " cluster_size=65536 size=1048576 lazy_refcounts=yes refcount_bits=16"
    )


@pytest.mark.peer
@pytest.mark.parametrize(
    "word", ["1.0005K", "15.99E", "1.9999999999999999K", "0.0001K", "\t5", "1e"]
)
def test_qemu_img_agrees_about_sizes(word, tmp_path):
    run = subprocess.run(
        ["qemu-img", "create", "-f", "qcow2", "-o", f"cluster_size={word}", "x", "1M"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    option = next(iter(DECLARED))
    assert f" cluster_size={option.announced(word)} " in run.stdout, run.stderr
