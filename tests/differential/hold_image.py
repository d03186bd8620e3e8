"""Open an image with the library, say so, and hold it until standard input ends.

usage: hold_image.py ro|rw|u FORMAT NAME

Says `ready`; or, where the image is in use, `locked`, QEMU's words, and a line with the
holders' process ids, and exits with 1.
"""

from __future__ import annotations

import sys

import diskwright
from diskwright.errors import DiskwrightError, LockError


def main() -> int:
    mode, image_format, name = sys.argv[1:]
    try:
        node = diskwright.open(
            name, format=image_format, read_only=mode != "rw", force_share=mode == "u"
        )
    except LockError as error:
        print(f"locked\n{error.qemu_message}")
        print("holders", *(pid for pid, _ in error.holders))
        return 1
    except DiskwrightError as error:
        print(f"{type(error).__name__}\n{error.qemu_message}")
        return 1
    with node:
        print("ready", flush=True)
        sys.stdin.read()
    return 0


if __name__ == "__main__":
    sys.exit(main())
