"""Write to an image with the library, told in the words of qemu-io.

usage: formats_writer.py [-d unmap] -f FORMAT [-c COMMAND]... NAME

Commands, with offsets and lengths in bytes:
    write [-P BYTE | -s FILE] OFFSET LENGTH
    write -c [-P BYTE | -s FILE] OFFSET LENGTH    compressed
    write -z [-u] OFFSET LENGTH                   zeroes; -u: space may be given back
    discard OFFSET LENGTH
    flush
"""

from __future__ import annotations

import getopt
import sys
from pathlib import Path

from diskwright.block.node import Node
from diskwright.block.opener import Opener, open_image


def main() -> int:
    flags, names = getopt.getopt(sys.argv[1:], "f:c:d:")
    given = dict(flags)
    opener = Opener(read_only=False, can_unmap=given.get("-d") == "unmap")
    with open_image(opener, names[0], format=given["-f"]) as node:
        for flag, words in flags:
            if flag == "-c":
                obey(node, words.split())
    return 0


def obey(node: Node, words: list[str]) -> None:
    """Do what one command says."""
    flags, rest = getopt.getopt(words[1:], "czuP:s:")
    given = dict(flags)
    if words[0] == "flush":
        node.flush()
        return
    offset, length = map(int, rest)
    if words[0] == "discard":
        node.discard(offset, length)
    elif words[0] != "write":
        raise ValueError(words[0])
    elif "-z" in given:
        node.write_zeroes(offset, length, unmap="-u" in given)
    elif "-c" in given:
        write_encoded(node, offset, content(given, length))
    else:
        node.write(offset, content(given, length))


def content(given: dict[str, str], length: int) -> bytes:
    """What is to be written: one byte many times, or what a file has, again and again."""
    if "-s" in given:
        source = Path(given["-s"]).read_bytes()
        return (source * (length // len(source) + 1))[:length]
    return bytes([int(given.get("-P", "0xcd"), 0)]) * length


def write_encoded(node: Node, offset: int, content: bytes) -> None:
    """Store unit after unit; what does not become shorter is written as it is."""
    encoder = node.encoder()
    assert encoder is not None, f"{node.driver} does not compress"
    assert offset % encoder.unit == 0, f"{offset} is amid a cluster"
    for at in range(0, len(content), encoder.unit):
        piece = content[at : at + encoder.unit]
        payload = encoder.encode(memoryview(piece.ljust(encoder.unit, b"\0")))
        if payload is None:
            node.write(offset + at, piece)
        else:
            node.write_encoded(offset + at, payload, len(piece))


if __name__ == "__main__":
    sys.exit(main())
