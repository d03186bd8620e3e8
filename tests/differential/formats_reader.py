"""Run several command lines of ours in one process, and hash what images read as.

usage: formats_reader.py < LINES

LINES is a JSON list of command lines, each a list of words for diskwright-img; besides its
commands there is `sha256 FORMAT NAME`. Prints a JSON list of [code, stdout, stderr].
"""

from __future__ import annotations

import hashlib
import io
import json
import sys

from diskwright.block.opener import Opener, open_image
from diskwright.cli import img
from diskwright.errors import DiskwrightError

PIECE = 1 << 20


def main() -> int:
    answers = [answer(words) for words in json.load(sys.stdin)]
    json.dump(answers, sys.stdout)
    return 0


def answer(words: list[str]) -> tuple[int, str, str]:
    """(code, stdout, stderr) of one command line."""
    if words[0] == "sha256":
        return sha256(*words[1:])
    kept = sys.stdout, sys.stderr
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8") for _ in kept]
    sys.stdout, sys.stderr = streams
    try:
        code = img.main(words)
    finally:
        sys.stdout, sys.stderr = kept
    texts = []
    for stream in streams:
        stream.flush()
        texts.append(stream.buffer.getvalue().decode("utf-8", "backslashreplace"))
    return code, texts[0], texts[1]


def sha256(format: str, name: str) -> tuple[int, str, str]:
    """What all bytes of an image hash to."""
    found = hashlib.sha256()
    try:
        with open_image(Opener(), name, format=format) as node:
            for offset in range(0, node.size, PIECE):
                found.update(node.read(offset, min(PIECE, node.size - offset)))
    except DiskwrightError as error:
        return 1, "", f"{error}\n"
    return 0, found.hexdigest(), ""


if __name__ == "__main__":
    sys.exit(main())
