"""The commands' frame: words, help, output, exit codes, interruption. No peer is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import diskwright
from diskwright.cli import img, json_output, main, output, text, tools
from diskwright.cli.grammar import Arguments, Flag, HelpWanted, Misused, Parser
from diskwright.cli.progress import Progress
from tests.rooms import ROOT

IMG = [sys.executable, "-m", "diskwright.cli.img"]
FRIENDLY = [sys.executable, "-m", "diskwright.cli.main"]


def run(*words: str, cwd: Path, friendly: bool = False) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(FRIENDLY if friendly else IMG), *words],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


# ------------------------------------------------------------------------------- grammar

FLAGS = (
    Flag("h", "help"),
    Flag("q", "quiet"),
    Flag("f", "format", "FMT"),
    Flag("", "force-share"),
    Flag("n", "number", "N", parse=int),
    Flag("o", "options", "O", repeats=True),
)


def parsed(*words: str, **how: bool) -> Arguments:
    arguments = Arguments("p")
    Parser(FLAGS, "p c", **how).parse(words, arguments)
    return arguments


def test_bundled_letters_and_values():
    found = parsed("-qfraw", "a", "-n7", "b", "-o", "x", "--options=y", "-ox=y")
    assert found.flag("quiet")
    assert found.text("format") == "raw"
    assert found.number("number") == 7
    assert found.texts("options") == ["x", "y", "x=y"]
    assert found.operands == ["a", "b"]


def test_long_words_may_be_cut_short():
    found = parsed("--form=raw", "--opt", "x")
    assert (found.text("format"), found.texts("options")) == ("raw", ["x"])
    with pytest.raises(Misused, match="is ambiguous; possibilities: '--format' '--force-share'"):
        parsed("--fo=raw")


def test_two_dashes_end_the_options():
    assert parsed("-q", "--", "-f", "--quiet").operands == ["-f", "--quiet"]
    assert parsed("a", "-", "-q").operands == ["a", "-"]


def test_options_after_operands_only_where_mixed():
    assert parsed("a", "-q").flag("quiet")
    assert parsed("a", "-q", mixed=False).operands == ["a", "-q"]


def test_a_negative_size_is_an_operand_where_said():
    assert parsed("a", "-4k", negative_operand=True).operands == ["a", "-4k"]
    with pytest.raises(Misused, match="invalid option -- '4'"):
        parsed("-4k", "a", negative_operand=True)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-x"], "invalid option -- 'x'"),
        (["--nope"], "unrecognized option '--nope'"),
        (["-f"], "option requires an argument -- 'f'"),
        (["--format"], "option '--format' requires an argument"),
        (["--quiet=1"], "option '--quiet' doesn't allow an argument"),
    ],
)
def test_what_is_wrong_is_said(words, sentence):
    with pytest.raises(Misused) as caught:
        parsed(*words)
    assert caught.value.message == f"p c: {sentence}"


def test_help_stops_everything_behind_it():
    with pytest.raises(HelpWanted):
        parsed("-q", "--help", "--nonsense")
    with pytest.raises(Misused):
        parsed("--nonsense", "--help")


@given(st.lists(st.text(max_size=6), max_size=6))
def test_any_words_are_taken_or_refused(words):
    try:
        parsed(*words)
    except (Misused, HelpWanted, ValueError):  # ValueError: -n is parsed by int here
        pass


# ------------------------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (1023488, "1e+03 KiB"),
        (1024000, "0.977 MiB"),
        (33554432, "32 MiB"),
        (1234567680, "1.15 GiB"),
        (1 << 60, "1 EiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_have_three_digits(size, words):
    assert text.size_text(size) == words


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_our_json_reads_as_json(value):
    made = json_output.dumps(value)
    assert made.isascii()
    assert json.loads(made) == value


def test_bytes_that_are_no_text_are_replaced():
    assert json.loads(json_output.quoted(os.fsdecode(b"a\xff\xfeb"))) == "a��b"


def test_the_bar_begins_and_ends(capfdbinary):
    progress = Progress(True)
    progress.begin()
    for done in range(101):
        progress(done, 100)
    progress.all_done()
    progress.end()
    output.flush()
    steps = capfdbinary.readouterr().out.decode().split("\r")
    assert steps[0] == "    (0.00/100%)"
    assert steps[-3:] == ["    (100.00/100%)", "    (100.00/100%)", "\n"]
    assert len(steps) == 103


def test_no_bar_where_none_is_wanted(capfdbinary):
    progress = Progress(False)
    progress.begin()
    progress(1, 2)
    progress.all_done()
    progress.end()
    output.flush()
    assert capfdbinary.readouterr().out == b""


def test_a_signal_asks_for_one_line(capfdbinary):
    before = signal.getsignal(signal.SIGUSR1)
    try:
        progress = Progress(False)
        progress.begin()
        assert progress.idle
        for done in (25, 75):
            signal.raise_signal(signal.SIGUSR1)
            assert not progress.idle
            progress(done, 100)
            progress(done + 1, 100)
            assert progress.idle
        progress.all_done()
        progress.end()
    finally:
        signal.signal(signal.SIGUSR1, before)
    output.flush()
    written = capfdbinary.readouterr()
    assert written.err == b"    (25.00/100%)\n    (75.00/100%)\n"
    assert written.out == b""


# ------------------------------------------------------------------------------- the tools


def test_version_is_the_packages(said):
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert diskwright.__version__ == packaged
    code, out, err = said(img, "--version")
    assert (code, err) == (0, "")
    assert out.startswith(f"diskwright-img version {packaged}\n")


def test_help_has_every_command_and_option(said):
    for program, tool in ((img, tools.IMG), (main, tools.FRIENDLY)):
        code, out, _ = said(program, "--help")
        assert code == 0
        for name in tool.commands:
            assert f"  {name} - " in out
            command = tool.load(name)
            assert command.name == name
            code, shown, _ = said(program, name, "--help")
            assert code == 0
            for flag in command.flags:
                if not flag.hidden:
                    assert f"-{flag.short}" in shown and f"--{flag.long}" in shown
            assert ("--allow-references" in shown) is tool.friendly


def test_no_two_options_of_a_command_share_a_word():
    for name in tools.FRIENDLY.commands:
        flags = tools.FRIENDLY.load(name).flags
        for words in ([f.short for f in flags if f.short], [f.long for f in flags if f.long]):
            assert len(set(words)) == len(words), name


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    diskwright.create(tmp_path / "a.qcow2", "1M", format="qcow2")
    with diskwright.open(tmp_path / "a.qcow2", read_only=False) as node:
        for offset in range(0, 1 << 20, 1 << 17):
            node.write(offset, b"x" * 65536)
    command = " ".join([*IMG, "map", "--output=json", "a.qcow2"])
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{command} | true; exit ${{PIPESTATUS[0]}}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not here: /dev/full")
def test_output_that_cannot_be_written_is_told(tmp_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*IMG, "create", "-f", "raw", "-o", "help"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    said = b"diskwright-img: Could not write to standard output: No space left on device\n"
    assert done.stderr == said


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="not here: /dev/full")
def test_an_image_stays_if_nobody_can_be_told_of_it(tmp_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*IMG, "create", "-f", "qcow2", "new", "1M"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            stdout=full,
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert diskwright.info(tmp_path / "new").format == "qcow2"


@pytest.mark.parametrize(
    ("line", "code", "complaint"),
    [
        ("--version", 0, b""),
        ("info a", 0, b""),
        ("map --output=json a", 0, b""),
        ("convert -p -O qcow2 a b", 0, b""),
        ("info gone", 1, b"Could not open 'gone'"),
        ("nothing", 1, b"Command not found"),
    ],
)
def test_without_a_standard_output_nothing_is_said(tmp_path, line, code, complaint):
    diskwright.create(tmp_path / "a", "1M", format="qcow2")
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f"exec {' '.join(IMG)} {line} {closed}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
            capture_output=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == code
        assert (complaint in done.stderr) if closed == ">&-" else not done.stderr
        assert b"Traceback" not in done.stderr
        assert not done.stdout or closed == "2>&-"


@pytest.mark.parametrize("program", ["img", "main"])
@pytest.mark.parametrize("module", ["run", "tools", "grammar"])
def test_an_interrupt_while_the_program_loads_is_quiet(program, module):
    code = (
        "import os, signal, sys\n"
        "class Interrupts:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == 'diskwright.cli.{module}':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupts())\n"
        f"from diskwright.cli.{program} import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--version"],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        check=False,
        timeout=60,
    )
    name = {"img": b"diskwright-img", "main": b"diskwright"}[program]
    assert (done.returncode, done.stderr) == (130, name + b": interrupted\n")
    assert done.stdout == b""


def test_an_interrupt_leaves_nothing_of_a_new_target(tmp_path):
    with open(tmp_path / "source", "wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    words = ["convert", "-r", "4M", "-O", "qcow2", "-f", "raw", "source", "target"]
    process = subprocess.Popen(
        [*IMG, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while not (tmp_path / "target").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b"diskwright-img: convert was interrupted\n"
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("format", ["raw", "vpc", "qcow2"])
def test_a_target_that_stays_incomplete_is_named(tmp_path, format):
    (tmp_path / "source").write_bytes(os.urandom(64 << 20))
    diskwright.create(tmp_path / "target", "80M", format=format)
    before = (tmp_path / "target").stat().st_mtime_ns
    words = ["convert", "-n", "-r", "4M", "-O", format, "-f", "raw", "source", "target"]
    process = subprocess.Popen(
        [*IMG, *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 30
    while (tmp_path / "target").stat().st_mtime_ns == before and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == b"diskwright-img: convert was interrupted; 'target' is incomplete\n"


def test_a_program_that_uses_main_keeps_its_signals(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGINT)
    assert said(img, "create", "-q", "a", "1M")[0] == 0
    assert signal.getsignal(signal.SIGINT) is before


# ------------------------------------------------------------------------------- the friendly one


@pytest.fixture
def stranger(tmp_path):
    """An image whose backing file lies outside of its folder."""
    diskwright.create(tmp_path / "secret.qcow2", "1M", format="qcow2")
    (tmp_path / "in").mkdir()
    diskwright.create(
        tmp_path / "in" / "stranger.qcow2",
        format="qcow2",
        backing="../secret.qcow2",
        backing_format="qcow2",
    )
    return tmp_path / "in"


def test_references_out_of_the_folder_are_refused(said, stranger, monkeypatch):
    monkeypatch.chdir(stranger)
    code, out, err = said(main, "map", "stranger.qcow2")
    assert (code, out) == (1, "")
    assert "it lies outside of the image's folder" in err
    assert "hint: " in err and "--allow-references" in err
    assert said(main, "map", "--allow-references", "stranger.qcow2")[0] == 0
    assert said(img, "map", "stranger.qcow2")[0] == 0


def test_hints_are_for_people_only(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("create", "-f", "qcow2", "-o", "compat=7", "x", "1M")
    assert "hint: " in said(main, *words)[2]
    assert "hint: " not in said(img, *words)[2]


def test_hints_about_what_qemu_has_not_are_for_all(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for format in ("vdi", "vpc"):
        diskwright.create("base", "1M", format=format)
        diskwright.create("top", format=format, options={"backing": "base"})
        (tmp_path / "base").unlink()
        code, _, err = said(img, "convert", "-f", format, "-O", "raw", "top", "copy")
        assert code == 1
        assert "backing.file.filename" in err.splitlines()[1]


def test_inspect_judges_references(said, stranger, monkeypatch):
    monkeypatch.chdir(stranger)
    code, out, _ = said(main, "inspect", "stranger.qcow2")
    assert code == 2
    assert "backing file: ../secret.qcow2" in out
    assert "FAIL names nothing outside of its folder" in out
    assert "verdict: not safe" in out
    found = json.loads(said(main, "inspect", "--output=json", "stranger.qcow2")[1])
    assert found["safe"] is False
    assert [one["name"] for one in found["references"]] == ["../secret.qcow2"]
    found = json.loads(said(main, "inspect", "--output=json", "../secret.qcow2")[1])
    assert (found["format"], found["safe"], found["references"]) == ("qcow2", True, [])


def test_inspect_opens_nothing_but_the_image(stranger):
    (stranger.parent / "secret.qcow2").unlink()
    done = run("inspect", "stranger.qcow2", cwd=stranger, friendly=True)
    assert done.returncode == 2, done


def test_check_goes_beyond_qemu_where_it_can(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    diskwright.create("a.vpc", "4M", format="vpc")
    assert said(img, "check", "a.vpc")[0] == 63
    code, out, _ = said(main, "check", "a.vpc")
    assert code == 0
    assert "No errors were found" in out


# ------------------------------------------------------------------------------- --object, -T


def test_a_group_of_throttles_holds_a_node_back(said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").write_bytes(os.urandom(8 << 20))
    started = time.monotonic()
    code, _, err = said(
        img,
        "convert",
        "--object",
        "throttle-group,id=unit-test,x-bps-read=16777216",
        "--image-opts",
        "driver=raw,file.driver=throttle,file.throttle-group=unit-test,file.file.filename=a",
        "b",
    )
    assert (code, err) == (0, "")
    assert time.monotonic() - started > 0.1
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_events_of_a_file_are_looked_at(said, tmp_path):
    (tmp_path / "events").write_text("# a comment\n\nnothing*\nno_such_event\n")
    code, _, err = said(img, "-T", f"events={tmp_path / 'events'}", "info")
    assert code == 1
    assert "trace event 'no_such_event' does not exist" in err
    assert "nothing*" not in err
    assert said(img, "-T", "help") == (0, "", "")


def test_events_are_looked_at_before_the_program_ends(said):
    code, out, err = said(img, "-T", "no_such_event", "-V")
    assert (code, out.splitlines()[0]) == (0, f"diskwright-img version {diskwright.__version__}")
    assert err == "diskwright-img: warning: trace event 'no_such_event' does not exist\n"


def test_a_parent_that_will_not_be_found_is_warned_of(tmp_path: Path) -> None:
    """A VDI image names no file: one whose parent lies elsewhere must be told of it."""
    (tmp_path / "elsewhere").mkdir()
    assert run(*"create -q -f vdi elsewhere/base.vdi 1M".split(), cwd=tmp_path).returncode == 0
    near = run(
        *"create -q -f vdi -b base.vdi elsewhere/near.vdi".split(), cwd=tmp_path, friendly=True
    )
    assert (near.returncode, near.stderr) == (0, "")
    far = run(
        *"create -q -f vdi -b elsewhere/base.vdi far.vdi".split(), cwd=tmp_path, friendly=True
    )
    assert far.returncode == 0
    assert far.stderr.count("\n") == 1
    assert "warning: The parent of 'far.vdi'" in far.stderr
    assert "is not beside it" in far.stderr
