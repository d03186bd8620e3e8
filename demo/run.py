"""One real disk through the whole tool set, each step timed: `make demo`.

An ext4 file system built from real files (Python's own library and this checkout) becomes a raw
disk, a compressed qcow2 with a snapshot, an overlay that is written to and committed, and at the
end a file system again, which e2fsck checks. Everything is made in demo/out/.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
TOOL = Path(sys.executable).parent / "diskwright-img"

#: Where ext4 keeps its label: in the superblock, which begins at 1024.
LABEL_OFFSET = 1024 + 0x78
LABEL_BYTES = 16
DISK_MIB = 512


class Demo:
    """Runs steps, prints what they print, and remembers how long they took."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def step(self, title: str, *words: str, lines: int = 12) -> str:
        """Run a command in the output folder, show it, and stop the demo where it fails."""
        shown = shlex.join(["diskwright-img" if word == str(TOOL) else word for word in words])
        print(f"\n# {title}\n$ {shown}", flush=True)
        started = time.perf_counter()
        run = subprocess.run(
            words, cwd=OUT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        self.times.append((title, time.perf_counter() - started))
        output = run.stdout.rstrip().splitlines()
        for line in output[:lines]:
            print(line)
        if len(output) > lines:
            print(f"… {len(output) - lines} more lines")
        if run.returncode != 0:
            sys.exit(f"demo: exit code {run.returncode}, which is wrong here")
        return run.stdout

    def img(self, title: str, *words: str, lines: int = 12) -> str:
        """A step with diskwright-img."""
        return self.step(title, str(TOOL), *words, lines=lines)

    def summary(self) -> None:
        """Print all times."""
        print("\n# Times")
        width = max(len(title) for title, _ in self.times)
        for title, seconds in self.times:
            print(f"{title:<{width}}  {seconds:8.3f} s")
        print(f"{'all':<{width}}  {sum(seconds for _, seconds in self.times):8.3f} s")


def collect(folder: Path) -> int:
    """Copy real files into `folder`; returns their number."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    skip = shutil.ignore_patterns("site-packages", "dist-packages", "__pycache__", "test", "*.a")
    shutil.copytree(stdlib, folder / "python", ignore=skip, symlinks=True)
    skip = shutil.ignore_patterns(".git", ".venv", "out", "__pycache__", ".*_cache")
    shutil.copytree(HERE.parent, folder / "diskwright", ignore=skip, symlinks=True)
    return sum(len(files) for _, _, files in os.walk(folder))


def label_of(image: str, **how: object) -> str:
    """The label of the file system in an image, read through the library."""
    import diskwright

    with diskwright.open(OUT / image, **how) as node:
        return node.read(LABEL_OFFSET, LABEL_BYTES).rstrip(b"\0").decode()


def write_label(image: str, label: str) -> None:
    """Give the file system in an image another label."""
    import diskwright

    with diskwright.open(OUT / image, read_only=False) as node:
        node.write(LABEL_OFFSET, label.encode().ljust(LABEL_BYTES, b"\0"))


def main() -> int:
    """The demo."""
    os.environ["PATH"] += os.pathsep + "/usr/sbin" + os.pathsep + "/sbin"
    if not shutil.which("mke2fs"):
        sys.exit("demo: needs mke2fs (Debian: e2fsprogs)")
    shutil.rmtree(OUT, ignore_errors=True)
    (OUT / "files").mkdir(parents=True)
    demo = Demo()

    count = collect(OUT / "files")
    options = ("-q", "-t", "ext4", "-O", "^metadata_csum", "-L", "first", "-d", "files")
    demo.step(
        f"an ext4 file system from {count} real files",
        "mke2fs",
        *options,
        "disk.raw",
        f"{DISK_MIB}M",
    )
    demo.img("what it is", "info", "disk.raw")
    demo.img("compress it into a qcow2", "convert", "-c", "-O", "qcow2", "disk.raw", "disk.qcow2")
    demo.img("what that is", "info", "disk.qcow2")
    demo.img("the same contents?", "compare", "disk.raw", "disk.qcow2")
    demo.img("remember this state", "snapshot", "-c", "fresh", "disk.qcow2")

    overlay = ("create", "-f", "qcow2", "-b", "disk.qcow2", "-F", "qcow2", "work.qcow2")
    demo.img("a layer to work in", *overlay)
    print("\n# write through the layer, from Python: another label")
    started = time.perf_counter()
    write_label("work.qcow2", "second")
    demo.times.append(("write through the layer", time.perf_counter() - started))
    print(f"labels: work.qcow2 {label_of('work.qcow2')!r}, disk.qcow2 {label_of('disk.qcow2')!r}")
    assert (label_of("work.qcow2"), label_of("disk.qcow2")) == ("second", "first")
    demo.img("where the bytes lie now", "map", "--output=json", "work.qcow2", lines=6)

    demo.img("bring it down into the image", "commit", "work.qcow2")
    assert label_of("disk.qcow2") == "second"
    demo.img("check the image", "check", "disk.qcow2")
    demo.img("its snapshots", "snapshot", "-l", "disk.qcow2")
    demo.img("a disk again", "convert", "-O", "raw", "disk.qcow2", "after.raw")
    demo.step("is it a sound file system?", "e2fsck", "-fn", "after.raw")
    demo.img("back to the remembered state", "snapshot", "-a", "fresh", "disk.qcow2")
    demo.img("the same as in the beginning?", "compare", "disk.raw", "disk.qcow2")
    demo.summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
