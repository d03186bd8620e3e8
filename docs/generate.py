"""Write the generated pages of docs/ anew: `make docs`; with --check, only compare.

Options come from the drivers' declarations, the picture of the rooms from the imports, the kinds
of errors from their classes. What an option does is tried: one that creating refuses is listed
with the refusal. An option counts as compared with QEMU only beside the tests that name it.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

import diskwright
from diskwright import errors
from diskwright.block import registry
from diskwright.block.node import Node
from diskwright.block.opener import Opener
from diskwright.block.options import Option
from docs import command_pages, img_pages, io_pages, nbd_pages
from docs.test_modules import TestModule
from tests import rooms

MADE_BY = "<!-- Written by docs/generate.py (`make docs`); do not edit. -->"
#: Public for drivers, operations and the engine, not for those who opened a node.
DRIVERS_ONLY = {
    "acquire",
    "aligned_buffer",
    "before_write",
    "create",
    "describe",
    "event_hook",
    "failure",
    "flush_inside",
    "locate",
    "parse_filename",
    "probe",
    "refresh_size",
    "release_user",
    "require",
    "settle",
    "size_changed",
    "written",
}
KINDS = (("Formats", "FORMATS"), ("Protocols", "PROTOCOLS"), ("Filters", "FILTERS"))


def drivers() -> Iterator[tuple[str, str, type]]:
    """(heading, name, class) of the built-in drivers."""
    for heading, table in KINDS:
        for name in getattr(registry, table):
            try:
                yield heading, name, registry.driver_class(name)
            except ModuleNotFoundError as error:
                if not str(error.name).startswith("diskwright"):
                    raise


def cell(text: object) -> str:
    """A text for a table."""
    return " ".join(str(text).split()).replace("|", "\\|")


def default_of(option: Option) -> str:
    """The default as a user would write it."""
    if option.default is None:
        return ""
    return f"`{option.announced(option.default)}`"


def meaning_of(option: Option) -> str:
    """Help, choices and unit in one cell."""
    parts = [option.help]
    if option.choices:
        parts.append(" or ".join(f"`{choice}`" for choice in option.choices))
    if option.unit:
        parts.append(f"in {option.unit}")
    if option.deprecated:
        parts.append(f"deprecated: {option.deprecated}")
    return cell("; ".join(part for part in parts if part))


def samples(option: Option) -> list[object]:
    """Values to try an option with."""
    if option.choices:
        return list(option.choices)
    return {"bool": [True], "size": [65536], "int": [1]}.get(option.type, ["x"])


def refusal(cls: type, option: Option) -> str:
    """Why creating with this option is refused as unsupported, or "" where it is not."""
    said = set()
    for value in samples(option):
        name = option.name + "x" if option.prefix else option.name
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            given = {name: value}
            try:
                values = cls.create_options.validate(given)
                values["filename"] = os.path.join(folder, "x")
                cls.create(Opener(read_only=False), 1 << 20, values)
            except errors.UnsupportedError as error:
                said.add(error.message.replace(folder + os.sep, ""))
            except errors.DiskwrightError:
                pass  # a bad sample; that the option is known is all we ask
    return "; ".join(sorted(said))


def comparisons() -> dict[str, set[str]]:
    """Every word that a differential test says, itself or by a table it uses -> those tests."""
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "tests" / "differential").glob("test_*.py")):
        module = TestModule(path)
        tables = {name: _words(value) for name, value in module.tables.items()}
        for name, node in module.tests():
            words = _words(node)
            for inner in ast.walk(node):
                if isinstance(inner, ast.Name):
                    words |= tables.get(inner.id, set())
            for word in words:
                found.setdefault(word, set()).add(name)
    return found


def _words(node: ast.AST) -> set[str]:
    """The words of all strings below `node`."""
    words: set[str] = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            text = inner.value
            for mark in ",=[]{}'\" \n":
                text = text.replace(mark, " ")
            words.update(text.split())
    return words


def compatibility() -> str:
    """The page that says which create options there are, and what compares them."""
    compared = comparisons()
    lines = [
        "# Compatibility",
        "",
        MADE_BY,
        "",
        "Every option of `create -o`, by driver. *Compared by* names the differential tests that",
        "run QEMU's tools and ours with the option; where it is empty, nobody has compared it",
        "yet. An option that is not built is refused by name, with the sentence given here.",
    ]
    for heading, name, cls in drivers():
        if not len(cls.create_options):
            continue
        lines += ["", f"## {name} ({heading.lower().removesuffix('s')})", ""]
        lines += ["| option | type | default | what it does | compared by |"]
        lines += ["| --- | --- | --- | --- | --- |"]
        for option in cls.create_options:
            why = refusal(cls, option)
            meaning = meaning_of(option) + (f" **Refused**: {cell(why)}" if why else "")
            tests = sorted(compared.get(option.name, ()))
            proof = "" if why and not tests else ", ".join(f"`{test}`" for test in tests)
            lines.append(
                f"| `{option.name}` | {option.type} | {default_of(option)} | {meaning} | {proof} |"
            )
    lines += img_pages.compatibility()
    lines += io_pages.compatibility()
    lines += nbd_pages.compatibility()
    return "\n".join(lines) + "\n"


def reference() -> str:
    """The page of what can be said when a node is opened."""
    lines = ["# Drivers and their options", "", MADE_BY, ""]
    lines += ["What `open(options=…)`, `--image-opts` and `json:{…}` take, beside the words that"]
    lines += ["every node has: `driver`, `node-name`, `read-only`, `force-share`, `discard`,"]
    lines += ["`detect-zeroes`, `cache.direct`, `cache.no-flush`. For what `create` takes see"]
    lines += ["[compatibility](../compatibility.md). How differencing VDI and VHD images find"]
    lines += ["their parents stands in [formats](../explanation/formats.md)."]
    last = ""
    for heading, name, cls in drivers():
        if heading != last:
            lines += ["", f"## {heading}"]
            last = heading
        module = sys.modules[cls.__module__]
        text = (cls.__doc__ or module.__doc__ or "").strip().split("\n\n")[0]
        lines += ["", f"### {name}", "", " ".join(text.split())]
        options = list(cls.options)
        if options:
            lines += ["", "| option | type | default | meaning |", "| --- | --- | --- | --- |"]
        for option in options:
            label = option.name + ("…" if option.prefix else "")
            lines.append(
                f"| `{label}` | {option.type} | {default_of(option)} | {meaning_of(option)} |"
            )
    return "\n".join(lines) + "\n"


def error_page() -> str:
    """The page of error kinds."""
    lines = ["# Errors", "", MADE_BY, ""]
    lines += ["`diskwright.errors` is one tree. `kind` is what code matches on; `message` is a"]
    lines += ["sentence for a person, `hint` what can be done about it."]
    waiting: list[type[errors.DiskwrightError]] = [errors.DiskwrightError]
    while waiting:
        cls = waiting.pop(0)
        waiting += cls.__subclasses__()
        if cls.__module__ != errors.__name__:
            continue
        own = cls.__bases__[0].__name__
        under = "" if cls is errors.DiskwrightError else f" (a {own})"
        text = (cls.__doc__ or "").split("Args:")[0].strip().split("\n\n")[0]
        lines += ["", f"## {cls.kind}", "", f"`{cls.__name__}`{under}. {' '.join(text.split())}"]
    lines += ["", "## Kinds without a class", ""]
    lines += [f"- `{kind}`: {meaning}" for kind, meaning in sorted(errors.FINER_KINDS.items())]
    return "\n".join(lines) + "\n"


def signature_of(name: str, what: object) -> str:
    """A call as a reader would write it, one parameter a line where it is long."""
    text = str(inspect.signature(what))  # type: ignore[arg-type]
    text = text.replace("'", "").replace("self, ", "").replace("(self)", "()")
    line = f"{name}{text}"
    if len(line) <= 100:
        return line
    inside, _, result = text[1:].rpartition(")")
    parts = re.split(r", (?![^\[]*\])", inside)
    return "\n".join([f"{name}(", *(f"    {part}," for part in parts), f"){result}"])


def described(text: str | None) -> list[str]:
    """A docstring as Markdown: its sections as lists, its examples in a fence."""
    lines: list[str] = []
    section = ""
    for line in inspect.cleandoc(text or "").splitlines():
        if re.fullmatch(r"(Args|Attributes|Raises|Returns|Example|Examples):", line):
            section = line.removesuffix(":")
            lines += ["" if lines and lines[-1] else None, f"*{section}*", ""]  # type: ignore[list-item]
            if section.startswith("Example"):
                lines.append("```pycon")
        elif section.startswith("Example"):
            lines.append(line.removeprefix("    "))
        elif section and re.match(r"    \S", line):
            lines.append(f"- {line.strip()}")
        else:
            lines.append(f"  {line.strip()}" if section and line else line)
    if section.startswith("Example"):
        lines.append("```")
    return [line for line in lines if line is not None]


def library() -> str:
    """The page of what `import diskwright` gives, and of what a node does."""
    lines = ["# The library", "", MADE_BY, ""]
    lines += [
        "What `import diskwright` gives; `open` gives a [node](#node). Sizes are bytes, or words"
    ]
    lines += ["such as `10G`. All of it may be called from several threads."]
    for name in diskwright.__all__:
        what = getattr(diskwright, name)
        lines += ["", f"## {name}", ""]
        if inspect.isfunction(what):
            lines += ["```text", signature_of(name, what), "```", ""]
        lines += described(what.__doc__)
    lines += ["", "## Node", "", *described(Node.__doc__)]
    for name in sorted(dir(Node)):
        what = inspect.getattr_static(Node, name)
        if name.startswith("_") or name in DRIVERS_ONLY or not getattr(what, "__doc__", None):
            continue
        if inspect.isfunction(what):
            lines += ["", f"### {name}", "", "```text", signature_of(name, what), "```", ""]
            lines += described(what.__doc__)
        elif isinstance(what, property):
            lines += ["", f"### {name} (capability)", "", *described(what.__doc__)]
    return "\n".join(lines) + "\n"


def with_picture(path: Path) -> str:
    """The architecture page with the rooms drawn between its marks."""
    text = path.read_text()
    before, start, rest = text.partition("<!-- generated: rooms -->\n")
    _, end, after = rest.partition("<!-- end -->")
    return f"{before}{start}\n```text\n{rooms.picture()}\n```\n\n{end}{after}"


def pages() -> dict[Path, str]:
    """Every generated page, as it should be."""
    docs = ROOT / "docs"
    architecture = docs / "explanation" / "architecture.md"
    return {
        docs / "compatibility.md": compatibility(),
        docs / "reference" / "drivers.md": reference(),
        docs / "reference" / "errors.md": error_page(),
        docs / "reference" / "library.md": library(),
        architecture: with_picture(architecture),
        **command_pages.pages(docs / "reference" / "commands", MADE_BY),
        docs / "reference" / "commands" / "diskwright-io.md": io_pages.page(MADE_BY),
        docs / "reference" / "commands" / "diskwright-nbd.md": nbd_pages.page(MADE_BY),
    }


def main(words: list[str]) -> int:
    """Write the pages; with --check, name those that are out of date."""
    stale = 0
    for path, text in pages().items():
        if path.exists() and path.read_text() == text:
            continue
        if "--check" in words:
            print(f"{path.relative_to(ROOT)} is out of date: make docs")
            stale = 1
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
