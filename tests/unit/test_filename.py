"""Names: what users write, what QEMU calls a node, and references relative to an image."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diskwright.block import filename, json_text
from diskwright.block.opener import Opener, open_image
from diskwright.errors import OptionError, UnsupportedError


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.raw", {"driver": "file", "filename": "a.raw"}),
        ("./a:b", {"driver": "file", "filename": "./a:b"}),
        ("dir/a:b", {"driver": "file", "filename": "dir/a:b"}),
        ("file:a.raw", {"driver": "file", "filename": "a.raw"}),
        ("file:///x/a", {"driver": "file", "filename": "///x/a"}),
        ("null-co://", {"driver": "null-co"}),
        (
            'json:{"driver":"raw","file.filename":"x"}',
            {"driver": "raw", "file": {"filename": "x"}},
        ),
        ("json:{'file':{'filename':'it is'}}", {"file": {"filename": "it is"}}),
        (
            'json:{"file.driver":"file","file":{"filename":"x"}}',
            {"file": {"driver": "file", "filename": "x"}},
        ),
    ],
)
def test_names_become_options(name, options):
    assert filename.parse(name) == options


@pytest.mark.parametrize(
    ("name", "qemu"),
    [
        ("bogus:a", "Unknown protocol 'bogus'"),
        (":a", "Unknown protocol ''"),
        ("null-co:", "The only allowed filename for this driver is 'null-co://'"),
        ("json:", "Could not parse the JSON options: Expecting a JSON value"),
        ("json:{", "Could not parse the JSON options: JSON parse error, premature EOI"),
        ("json:{a}", "Could not parse the JSON options: JSON parse error, invalid keyword 'a'"),
        ("json:{} x", "Could not parse the JSON options: Expecting at most one JSON value"),
        ("json:[1]", "Invalid JSON object given"),
        ('json:{"filename":"a"}', "Must specify either driver or file"),
        ('json:{"file":null}', "Must specify either driver or file"),
        ('json:{"file":{}}', "Must specify either driver or file"),
        ('json:{"file":5}', "Must specify either driver or file"),
    ],
)
def test_refusals_have_qemus_words(name, qemu):
    with pytest.raises(OptionError) as caught:
        filename.parse(name)
    assert caught.value.qemu_message == qemu


def test_image_options_are_nested():
    words = "driver=qcow2,file.driver=file,file.filename=a,,b,read-only"
    assert filename.parse_image_options(words) == {
        "driver": "qcow2",
        "file": {"driver": "file", "filename": "a,b"},
        "read-only": "on",
    }


@pytest.mark.parametrize(
    ("words", "qemu"),
    [
        ("", "Must specify either driver or file"),
        (
            "driver=qcow2,file=a,file.filename=b",
            "Cannot reference an existing block device with additional options or a new filename",
        ),
    ],
)
def test_image_options_are_refused_in_qemus_words(words, qemu):
    with pytest.raises(OptionError) as caught:
        filename.parse_image_options(words)
    assert caught.value.qemu_message == qemu


@pytest.mark.parametrize("words", ["a", "file=a", "driver=raw,file=a", "driver=qcow2,file=a"])
def test_written_names_of_nodes_are_no_files(tmp_path, monkeypatch, words):
    (tmp_path / "a").write_bytes(bytes(512))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError) as caught:
        open_image(Opener(), filename.parse_image_options(words))
    assert caught.value.qemu_message == "Cannot find device='a' nor node-name='a'"


@pytest.mark.parametrize(
    ("image", "reference", "full"),
    [
        ("top", "base", "base"),
        ("./top", "base", "./base"),
        ("d/top", "base", "d/base"),
        ("d/top", "../base", "d/../base"),
        ("d/top", "/base", "/base"),
        ("file:d/top", "base", "d/base"),
        ("nbd://h/x", "y", "nbd://h/y"),
        ("d/top", "nbd://h/x", "nbd://h/x"),
        ("d/top", "json:{}", "json:{}"),
        ("d/top", "", ""),
    ],
)
def test_references_are_relative_to_the_image(image, reference, full):
    assert filename.join(image, reference) == full


def test_a_json_name_has_no_folder():
    with pytest.raises(UnsupportedError):
        filename.join('json:{"driver":"raw"}', "base")
    assert filename.join('json:{"driver":"raw"}', "/base") == "/base"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "r.raw").write_bytes(bytes(4096))
    return tmp_path


FILE = '"file":{"driver":"file","locking":"off","filename":"d/r.raw"}'


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("d/r.raw", "d/r.raw"),
        ("file:d/r.raw", "d/r.raw"),
        (f'json:{{"driver":"raw",{FILE}}}', "d/r.raw"),
        (
            f'json:{{"driver":"raw","size":1024,"offset":"512",{FILE}}}',
            'json:{"offset": "512", "driver": "raw", "size": 1024, '
            '"file": {"driver": "file", "filename": "d/r.raw"}}',
        ),
        (
            f'json:{{"driver":"raw","file":{{"driver":"raw",{FILE}}}}}',
            'json:{"driver": "raw", "file": {"driver": "raw", '
            '"file": {"driver": "file", "filename": "d/r.raw"}}}',
        ),
        ('json:{"driver":"raw","file":{"driver":"null-co"}}', "null-co://"),
        (
            'json:{"driver":"null-co","size":512,"read-zeroes":true,"latency-ns":1}',
            'json:{"read-zeroes": true, "driver": "null-co", "size": 512}',
        ),
    ],
)
def test_a_node_has_the_name_qemu_gives_it(folder, spec, name):
    with open_image(Opener(), spec) as node:
        assert node.filename == name


def test_a_reference_is_relative_to_the_file_at_the_bottom(folder):
    with open_image(Opener(), f'json:{{"driver":"raw","offset":512,{FILE}}}') as node:
        assert filename.join_at(node, "base") == "d/base"
        assert filename.join_at(node, "/base") == "/base"


def test_a_node_without_a_folder_says_so():
    spec = 'json:{"driver":"null-co","size":512}'
    with open_image(Opener(), spec) as node, pytest.raises(UnsupportedError):
        filename.join_at(node, "base")


@given(st.text(alphabet="{}[]\",:'\\u0123eE+-.abtrufalsn \n\t\x01", max_size=40))
def test_whatever_follows_json_is_a_value_or_refused(text):
    try:
        json_text.parse(text)
    except ValueError:
        return


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.text(st.characters(codec="ascii", exclude_characters="\0")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abc.", min_size=1), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(JSON)
def test_what_the_standard_library_writes_is_read(value):
    import json

    assert json_text.parse(json.dumps(value)) == value


def test_depth_is_bounded():
    with pytest.raises(ValueError, match="nesting depth"):
        json_text.parse("[" * 100_000)
