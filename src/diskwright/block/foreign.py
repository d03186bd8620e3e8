"""Formats that are known by their bytes and not read yet, so that none is taken for raw.

A row goes when its driver comes (`registry.FORMATS`); a driver of somebody else's under that
name is used at once. Sources of the numbers: the formats' published specifications; how
strongly each claims an image, and what of it counts, is as QEMU's tools were seen to decide.
"""

from __future__ import annotations

from diskwright.block.record import Record
from diskwright.errors import UnsupportedError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

#: How strongly a magic number claims an image, and how strongly a mere habit does.
SURE, HABIT = 100, 2


class Foreign(Record):
    """One format.

    Attributes:
        name: the driver's, as users and images write it.
        title: for a sentence.
        magics: any of these makes it one: tuples of (offset, bytes), all of which must be there.
        test: looks at the first bytes where numbers do not say it.
        suffix: of the name, for a format that has nothing in its first bytes.
        score: how strongly it claims an image.
    """

    __slots__ = ("magics", "name", "score", "suffix", "test", "title")

    def __init__(
        self,
        name: str,
        title: str,
        *magics: tuple[tuple[int, bytes], ...],
        test: Callable[[bytes], bool] | None = None,
        suffix: str = "",
        score: int = SURE,
    ) -> None:
        self.name = name
        self.title = title
        self.magics = magics
        self.test = test
        self.suffix = suffix
        self.score = score

    def claims(self, head: bytes, filename: str) -> bool:
        """Whether an image that begins so, under that name, is one of these."""
        if any(all(_there(head, part) for part in parts) for parts in self.magics):
            return True
        if self.test is not None and self.test(head):
            return True
        return bool(self.suffix) and filename.endswith(self.suffix) and filename != self.suffix


def _there(head: bytes, part: tuple[int, bytes]) -> bool:
    offset, value = part
    return head[offset : offset + len(value)] == value


def _is_vmdk_descriptor(head: bytes) -> bool:
    """A text whose first line is its version, after comments and lines of spaces."""
    for line in head.split(b"\n")[:-1]:
        text = line.removesuffix(b"\r")
        if line[:1] == b"#" or (line[:1] == b" " and not text.strip(b" ")):
            continue
        return text in (b"version=1", b"version=2", b"version=3")
    return False


_BOCHS = ((0, b"Bochs Virtual HD Image\0"), (32, b"Redolog\0"), (48, b"Growing\0"))
_CLOOP = b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop file=$0 && mount -r -t iso9660 /dev/cloop $1\n"

FOREIGN = (
    Foreign("qcow", "qcow (version 1)", ((0, b"QFI\xfb\0\0\0\1"),)),
    Foreign("qed", "QED", ((0, b"QED\0"),)),
    Foreign("vmdk", "VMDK", ((0, b"KDMV"),), ((0, b"COWD"),), test=_is_vmdk_descriptor),
    Foreign("vhdx", "VHDX", ((0, b"vhdxfile"),)),
    Foreign(
        "parallels",
        "Parallels",
        ((0, b"WithoutFreeSpace\2\0\0\0"),),
        ((0, b"WithouFreSpacExt\2\0\0\0"),),
    ),
    Foreign("luks", "LUKS", ((0, b"LUKS\xba\xbe\0\1"),)),
    Foreign("bochs", "Bochs", (*_BOCHS, (64, b"\0\0\1\0")), (*_BOCHS, (64, b"\0\0\2\0"))),
    Foreign("dmg", "DMG", suffix=".dmg", score=HABIT),
    Foreign("cloop", "cloop", ((0, _CLOOP),), score=HABIT),
)


def strongest(head: bytes, filename: str) -> Foreign | None:
    """The format that claims these bytes most strongly, if one does."""
    found = None
    for one in FOREIGN:
        if one.claims(head, filename) and (found is None or one.score > found.score):
            found = one
    return found


def refusal(name: str) -> UnsupportedError | None:
    """The error for an image that was found to be of format `name`; None if it is none of these."""
    for one in FOREIGN:
        if one.name == name:
            return UnsupportedError(
                f"It is a {one.title} image ('{name}'), which this release does not read; "
                "say that it is raw (-f raw) if its bytes are wanted",
                field="format",
                hint="qemu-img convert makes a qcow2 image of it",
            )
    return None
