"""The reference pages of the commands, made of their declarations: one page a command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from diskwright.cli import tools
from diskwright.cli.grammar import Command, Flag
from diskwright.cli.run import STANDARD_FLAGS

TOOL = tools.FRIENDLY
#: Commands that only the friendly program has.
OWN = ("inspect", "nbdinfo")
#: What is meant to be other than in QEMU's tools.
DIFFERENCES = (
    "An image that could not be finished is removed, with its data file, also where files of these "
    "names or behind these links were there before; qemu-img leaves an empty or partial file.",
    "`convert -c` to an image with a data file is refused before anything is changed; qemu-img "
    "empties the data file, and fails with the first data.",
    "Where a lock is refused, a line follows QEMU's two that names who holds it.",
    "`snapshot --create NAME`, `--apply`, `--delete` work; of qemu-img only the short forms do.",
    "A bitmap is marked as in use with the first write to the image, and one that notes nothing is "
    "not; QEMU marks all as it opens the image.",
    "`--object` knows `secret`, `throttle-group` and `tls-creds-x509`, from Python 3.13 on "
    "`tls-creds-psk` too, and lists no others; they are refused by name, as are secrets that are "
    "encrypted themselves (`keyid`).",
    "Of GnuTLS's words, `priority=` of TLS credentials takes those that choose versions of TLS.",
    "A client of NBD heeds the `ca-crl.pem` of its credentials; qemu-img's looks at none.",
    "NBD servers are reached through `inet` and `unix`, not `vsock` or `fd`; the shown name of one "
    "at an address of IPv6 has brackets, as a URI has, and `file.filename=` takes one, too.",
    "`-T` finds no trace events, and says so for each name without a wildcard.",
    "`dd` refuses an input that is its output too; qemu-img empties it.",
    "`bench --native` and `--aio` choose nothing: each of the requests under way has a thread.",
    "`convert -n` to a qcow2 image of compat 0.10 leaves unallocated what reads as zero through "
    "its backing file; qemu-img stores zeroes.",
    "An image of which metadata could not be written takes no more writes, by `io` and servers "
    "too, until it is opened anew; qemu-io goes on, and may leak clusters.",
    "`convert -n -c` onto clusters that are there already works; qemu-img fails with an I/O error.",
    "`check -r all` mends entries of a refcount table that are not aligned or have reserved "
    "bits; qemu-img leaves them.",
    "`measure -l` tells what an image of the size needs that the disk had when the snapshot was "
    "taken, as `convert -l` makes it; qemu-img takes the present size.",
    "The percentages that `-p` passes through on its way to 100 may differ in `amend` and "
    "`compare`.",
    "`commit` into a qcow2 image of compat 0.10 writes zeroes where it has to; qemu-img says "
    "that the operation is not supported.",
    "Runs that read as zero may be holes or zero clusters where QEMU has written zeroes, and "
    "the other way round; what is read is the same.",
    "Of two refusals of one command the other one may come first, always with exit code 1.",
    "Where in its file an image keeps a cluster may differ, and with it host offsets in `map`.",
    "What `--help` and `-o help` say of an option is our own; names, types and order are QEMU's.",
    "`null-co` and `null-aio` read as zero without `read-zeroes=on` too, and `map` says as "
    "little of it as qemu-img; QEMU leaves in the buffer what was there.",
    "A chain of backing files that leads back to itself is refused; qemu-img goes round in it.",
    "A FIFO is refused as an image; qemu-img waits until somebody writes to it.",
    "`map` refuses a VDI image whose block map points outside of every file; qemu-img prints it.",
    "`commit` repairs a qcow2 backing file that was not closed, in the words of `check -r all`; "
    "qemu-img writes to it with refcounts that are behind.",
    "`snapshot` and `bitmap --remove` need some free space, since new refcounts and tables are "
    "written beside the old ones: a crash leaves one state or the other. qemu-img changes them in "
    "place.",
    "Bitmaps that nothing was noted in stay valid where there is no room to save others; qemu-img "
    "loses all of an image.",
    "Growth after `rebase -b ''` reads as zero; qemu-img shows what a longer backing file had "
    "there.",
    "The flag of a zero cluster means nothing in a qcow2 image of version 2, whose specification "
    "has none; qemu-img takes the image for corrupt.",
    "`convert -l` makes an image of the size that the disk had when the snapshot was taken; "
    "qemu-img gives it the present size.",
    "A VDI image may have blocks of another size than 1 MiB, by `-o block_size` too; qemu-img "
    "refuses them.",
    "A `create` that is refused leaves a file of that name as it was; qemu-img removes it.",
    "`create` and `convert` whose data file is to be the image itself are refused by the lock "
    "alone; qemu-img says before that there is no regular file.",
    "A data file that is longer than its image keeps what it has there when the image grows; "
    "qemu-img cuts it, unless it is to be readable as a raw image.",
    "A command whose output cannot be written does its work and exits with 1; qemu-img with 0.",
    "`compare -s` takes ranges of one kind together; qemu-img looks at as much as one table of the "
    "image tells of, and calls images different whose tables reach differently far.",
    "`rebase -c` and growth over a longer backing file work where qemu-img fails by a cluster that "
    "is there already, or for want of zero clusters in compat 0.10.",
    "Nothing that grows is made on `/dev/null` or `/dev/full`; qemu-img makes a VDI or VHD on the "
    "former, which is lost, and has other words for the rest.",
    "What is wrong with an option is told under the program's name; qemu-img says the path that it "
    "was called by.",
    "Where a disk has no room for a data file nor for the tables that name its clusters, the file "
    "is told; qemu-img begins with the tables.",
    "Where the refcounts of what is to be reserved have no room, nothing is left behind; qemu-img "
    "leaks clusters, and says so in a second line.",
    "Zeroes that are written where a VDI or VHD image reads as zero take no room; QEMU allocates.",
    "`compare` reads what lies below an overlay under `raw`; qemu-img takes it for zeroes.",
    "`check` refuses an image whose L1 table lies over its header; qemu-img frees all clusters of "
    "the disk.",
    "`check -r all` drops what is too much where an image says it has more than 65536 snapshots; "
    "qemu-img marks such an image as corrupt.",
    "`check -r all` forgets a refcount block that lies outside of the file; qemu-img makes the "
    "file longer to have it.",
    "Where tables lie over each other, or a refcount block has no place in the file, `check -r` "
    "of qemu-img may stop in the middle of a repair, or free what is in use; here it goes on or "
    "stops, and nothing is worse than before.",
    "`check -r` keeps the snapshots of an image with bitmaps or unknown autoclear features; "
    "qemu-img writes a header without them.",
    "`check -r all` forgets the place of a snapshot table without snapshots if nothing can be "
    "there; qemu-img refuses such an image.",
    "`check -r` keeps the room of a snapshot table that an entry makes end behind the file; "
    "qemu-img gives it away.",
    "`check -r` leaves bitmaps as they are, but that `-r all` stores those anew of which a part "
    "lies outside of the file; qemu-img stores all anew, wherever they lay.",
    "`amend -o compat=0.10` refuses an image with persistent bitmaps, and says to remove them "
    "before; qemu-img forgets them and leaks their clusters.",
    "`create -o size=` and `resize +N` refuse numbers near 2^64; qemu-img goes on at 0, and makes "
    "an image that is empty or shorter.",
    "`check -r` never takes the header's cluster for a table; qemu-img does where the header says "
    "that there are snapshots and no place for them, and the image is none any more.",
)


def pages(folder: Path, made_by: str) -> dict[Path, str]:
    """Path -> text of the index and of each command's page."""
    commands = [TOOL.load(name) for name in TOOL.commands]
    made = {folder / f"{one.name}.md": page(one, made_by) for one in commands}
    made[folder / "README.md"] = index(commands, made_by)
    return made


def index(commands: list[Command], made_by: str) -> str:
    """The page that lists the commands and says what is true of all."""
    lines = ["# Commands", "", made_by, ""]
    lines += ["`diskwright-img` has the words, output, error lines and exit codes of `qemu-img`"]
    lines += [
        "10.0.2. `diskwright` has the same commands and is careful with what images refer to:"
    ]
    lines += ["it follows references in or below an image's own folder, refuses others without"]
    lines += ["`--allow-references`, and says what can be done about an error.", ""]
    lines += [f"- [{one.name}]({one.name}.md): {lowered(one.summary)}" for one in commands]
    lines += [
        "",
        "[`diskwright-io`](diskwright-io.md) and [`diskwright-nbd`](diskwright-nbd.md) are",
    ]
    lines += ["programs of their own, like `qemu-io` and `qemu-nbd`."]
    lines += ["", "Before the command stand, with either program:", ""]
    lines += [*table(STANDARD_FLAGS), ""]
    lines += [
        "SIGINT (Ctrl-C) or SIGTERM ends a command where it can stop: images are left valid, a new"
    ]
    lines += [
        "one is removed, and the exit code is 130 or 143. A `convert` onto what was there (`-n`, a"
    ]
    lines += ["device) names the target that it leaves incomplete. A second one ends it at once;"]
    lines += ["what a new raw image or fixed VHD has then looks like a whole one. SIGUSR1,"]
    lines += [
        "or SIGINFO where there is such, asks for a line on standard error with how far a command",
        "is that takes `-p`; others pass over SIGUSR1.",
        "",
        "## Where they differ from qemu-img",
        "",
    ]
    lines += [f"- {difference}" for difference in DIFFERENCES]
    return "\n".join(lines) + "\n"


def page(command: Command, made_by: str) -> str:
    """One command's page."""
    program = "diskwright" if command.name in OWN else "diskwright-img"
    lines = [f"# {command.name}", "", made_by, "", f"{command.summary}.", ""]
    lines += ["```sh", f"{program} {command.name} [options] {command.operands}", "```", ""]
    lines += [*table(command.flags)]
    if command.notes:
        lines += ["", *command.notes.splitlines()]
    if command.name not in OWN:
        lines += ["", f"`diskwright {command.name}` takes `--allow-references` too."]
    return "\n".join(lines) + "\n"


def table(flags: tuple[Flag, ...]) -> Iterator[str]:
    """Options with what they do."""
    yield "| option | what it does |"
    yield "| --- | --- |"
    for flag in flags:
        if flag.hidden:
            continue
        value = flag.value_text
        written = ", ".join(f"`{word}{value}`" for word in flag.words).replace("|", "\\|")
        yield f"| {written} | {flag.help.replace('|', chr(92) + '|')} |"


def lowered(summary: str) -> str:
    """A sentence's beginning inside of a line."""
    return summary[:1].lower() + summary[1:]
