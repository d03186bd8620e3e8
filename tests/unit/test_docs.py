"""The docs are part of the product: their examples run, generated pages are current, links lead on.

In a page, ```python blocks run in order in one namespace, ```console blocks run line by line
(`$ command`), output that is shown must be what came, with `...` for anything. Both run in one
fresh folder. A comment `<!-- before: commands -->` prepares it. What shall not run is ```sh.
"""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.rooms import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$|<!-- before: (.*?) -->", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path) -> list[tuple[str, str]]:
    """(language, text) of each fenced block, and ("before", commands)."""
    return [
        ("before", before) if before else (language, text)
        for language, text, before in FENCE.findall(path.read_text())
    ]


def has_examples(path: Path) -> bool:
    return any(language in ("python", "console") for language, _ in blocks(path))


def run_shell(command: str, folder: Path) -> str:
    """Run a line as a reader would, with the commands of this environment first on the path."""
    places = [str(Path(sys.executable).parent), "/usr/sbin", "/sbin", os.environ["PATH"]]
    run = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(places)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert run.returncode == 0, f"$ {command}\n{run.stdout}"
    return run.stdout


def check_console(text: str, folder: Path) -> None:
    """Run each `$` line; compare the lines shown below it."""
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        output = run_shell(command.split("  #")[0], folder)
        if shown.strip():
            pattern = re.sub(r"([\[\]?*])", r"[\1]", shown.strip()).replace("...", "*")
            assert fnmatch.fnmatchcase(output.strip(), pattern), f"$ {command}\n{output}"


def join_methods(parts: list[str], text: str) -> None:
    """A block that begins indented goes on with the class of the block before it."""
    if text.startswith(" ") and parts:
        parts[-1] = f"{parts[-1]}\n{text}"
    else:
        parts.append(text)


@pytest.mark.parametrize("path", [page for page in PAGES if has_examples(page)], ids=name)
def test_examples_run(path, tmp_path, monkeypatch):
    if "mke2fs" in path.read_text() and not shutil.which("mke2fs", path="/usr/sbin:/sbin"):
        pytest.skip("not here: mke2fs")
    from diskwright.block import registry

    monkeypatch.setattr(registry, "FORMATS", dict(registry.FORMATS))
    namespace: dict[str, object] = {"__name__": f"example_of_{path.stem}".replace("-", "_")}
    waiting: list[tuple[str, list[str]]] = []
    for language, text in blocks(path):
        if language == "python" and waiting and waiting[-1][0] == "python":
            join_methods(waiting[-1][1], text)
        elif language in ("python", "console", "before"):
            waiting.append((language, [text]))
    module = type(sys)(str(namespace["__name__"]))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    folder = tmp_path
    monkeypatch.chdir(folder)
    for language, texts in waiting:
        if language == "before":
            folder = prepare(texts[0], folder)
            monkeypatch.chdir(folder)
        for text in texts:
            if language == "console":
                check_console(text, folder)
            elif language == "python":
                exec(compile(textwrap.dedent(text), str(path), "exec"), module.__dict__)


def prepare(commands: str, folder: Path) -> Path:
    """Run the page's preparation; the folder it ends in is the reader's."""
    output = run_shell(f"{{ {commands}; }} >/dev/null && pwd", folder)
    return Path(output.strip())


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path):
    missing = [
        target
        for target in LINK.findall(re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.M | re.S))
        if not (path.parent / target).exists()
    ]
    assert not missing


def test_generated_pages_are_current():
    run = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "generate.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_kind_of_error_is_on_the_page():
    page = (ROOT / "docs" / "reference" / "errors.md").read_text()
    for path in (ROOT / "src").rglob("*.py"):
        for kind in re.findall(r'kind="([a-z-]+)"', path.read_text()):
            assert f"## {kind}\n" in page or f"`{kind}`:" in page, f"{path}: {kind}"
