"""What small commands load, in a fresh interpreter: the part of speed that needs no clock."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.rooms import ROOT

#: Nothing of these belongs on the way of a small command.
DEAR = {
    "argparse",
    "asyncio",
    "dataclasses",
    "importlib.metadata",
    "inspect",
    "json",
    "logging",
    "multiprocessing",
    "numpy",
    "pathlib",
    "random",
    "re",
    "shutil",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "typing",
    "zipfile",
}

_PROGRAM = """
import sys
before = set(sys.modules)
{code}
sys.stderr.write("\\n" + " ".join(sorted(set(sys.modules) - before)))
"""


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after `code`."""
    run = subprocess.run(
        [sys.executable, "-S", "-c", _PROGRAM.format(code=code)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    return set(run.stderr.rpartition("\n")[2].split())


def run_command(*words: str) -> str:
    return (
        "from diskwright.cli.img import main\n"
        "try:\n"
        f"    main({list(words)!r})\n"
        "except SystemExit:\n"
        "    pass"
    )


def run_io(*words: str) -> str:
    return f"from diskwright.cli.io import main\nmain({list(words)!r})"


def ours(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] == "diskwright"}


@pytest.fixture
def images(tmp_path):
    import diskwright

    for name, format in (("a.qcow2", "qcow2"), ("a.raw", "raw")):
        diskwright.create(tmp_path / name, 1 << 20, format=format)
    return tmp_path


def test_import_diskwright_loads_nothing_else():
    modules = loaded_by("import diskwright")
    assert ours(modules) == {"diskwright"}
    assert not modules & DEAR


def test_version_loads_no_engine():
    modules = loaded_by(run_command("--version"))
    assert not modules & DEAR
    assert not {name for name in ours(modules) if ".block" in name or ".drivers" in name}


def test_a_conversion_loads_nothing_dear(images):
    modules = loaded_by(run_command("convert", str(images / "a.qcow2"), str(images / "new")))
    assert not modules & (DEAR | {"importlib", "warnings"})
    assert "diskwright.drivers.formats.qcow2.driver" in modules


@pytest.mark.parametrize("output", ["human", "json"])
def test_info_loads_only_its_drivers(images, output):
    words = ("info", f"--output={output}", str(images / "a.qcow2"))
    modules = loaded_by(run_command(*words))
    assert not modules & (DEAR - ({"json", "re"} if output == "json" else set()))
    drivers = {name for name in modules if name.startswith("diskwright.drivers.")}
    assert not {name for name in drivers if name.split(".")[-1] in ("vdi", "vpc", "blkdebug")}
    operations = {name for name in modules if name.startswith("diskwright.operations.")}
    assert "diskwright.operations.convert" not in operations
    assert "diskwright.operations.copy" not in operations


def test_opening_raw_imports_two_drivers(images):
    code = f"import diskwright\ndiskwright.open({str(images / 'a.raw')!r}, format='raw').close()"
    modules = loaded_by(code)
    assert not modules & DEAR
    drivers = {
        name for name in modules if name.startswith("diskwright.drivers.") and name.count(".") > 2
    }
    file = "diskwright.drivers.protocols.file"
    assert drivers == {"diskwright.drivers.formats.raw", file, f"{file}.driver"}


def test_version_of_io_loads_no_engine():
    modules = loaded_by(run_io("--version"))
    assert not modules & DEAR
    assert not {name for name in ours(modules) if ".block" in name or ".drivers" in name}


def test_io_loads_only_the_families_of_its_commands(images):
    modules = loaded_by(run_io("-f", "raw", str(images / "a.raw"), "-c", "read 0 512"))
    assert not modules & (DEAR | {"readline", "signal"})
    families = {name for name in modules if name.startswith("diskwright.cli.io_commands.")}
    assert {name.rpartition(".")[2] for name in families} == {
        "declaration",
        "numbers",
        "opening",
        "session",
        "transfer",
    }
    assert "diskwright.drivers.formats.qcow2.driver" not in modules
