"""What a command of `diskwright-io` declares; the parser, the help and the pages come from it."""

from __future__ import annotations

from diskwright.cli.grammar import Arguments, Flag, Parser

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from diskwright.cli.io_commands.session import Session


class Refused(Exception):
    """A command cannot be done; its line, unless it is empty, goes to standard output."""


class Done(Exception):
    """A command has done all it was to do, before its other words were looked at."""


class WrongUsage(Exception):
    """The words make no sense together: the command's line of usage is shown."""


class IoCommand:
    """One command.

    Attributes:
        name: the word.
        synopsis: how its options and operands are written.
        summary: what it does, in a phrase.
        run: does it; refuses by `Refused`, `WrongUsage` or a DiskwrightError.
        least, most: how many words follow the name; None: any number.
        flags: its options; without any, every word is an operand.
        needs_image: there must be an open image.
        writes: the image must be writable.
        notes: sentences for `help NAME`.
    """

    __slots__ = (
        "flags",
        "least",
        "most",
        "name",
        "needs_image",
        "notes",
        "run",
        "summary",
        "synopsis",
        "writes",
    )

    def __init__(
        self,
        name: str,
        summary: str,
        run: Callable[[Session, Arguments], None],
        *,
        synopsis: str = "",
        words: tuple[int, int | None] = (0, 0),
        flags: Sequence[Flag] = (),
        needs_image: bool = True,
        writes: bool = False,
        notes: str = "",
    ) -> None:
        self.name = name
        self.synopsis = synopsis
        self.summary = summary
        self.run = run
        self.least, self.most = words
        self.flags = tuple(flags)
        self.needs_image = needs_image
        self.writes = writes
        self.notes = notes

    @property
    def usage(self) -> str:
        """The line that `help` shows, and a wrong call."""
        return f"{self.name} {self.synopsis} -- {self.summary}".replace("  ", " ")

    def count_refusal(self, name: str, count: int) -> str | None:
        """What is wrong with `count` words after the command's name, or None."""
        if count >= self.least and (self.most is None or count <= self.most):
            return None
        if self.most is None:
            wanted = f"at least {self.least} arguments"
        elif self.least == self.most:
            wanted = f"{self.least} arguments"
        else:
            wanted = f"between {self.least} and {self.most} arguments"
        return f"bad argument count {count} to {name}, expected {wanted}"

    def parse(self, name: str, words: Sequence[str], into: Arguments) -> None:
        """Read the words after the name, which was written as `name`.

        Raises:
            Misused: as getopt refuses them.
        """
        if self.flags:
            Parser(self.flags, name, long_words=False).parse(words, into)
        else:
            into.operands += words
