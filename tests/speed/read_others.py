"""Run by the environment of tests/peers/python_readers.sh: seconds a read with dissect.hypervisor.

Usage: read_others.py IMAGE COUNT SEED
"""

from __future__ import annotations

import random
import sys
import time

from dissect.hypervisor.disk.qcow2 import QCow2

path, count, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
with open(path, "rb") as file:
    image = QCow2(file)
    disk = image.open() if hasattr(image, "open") else image
    rng = random.Random(seed)
    places = [rng.randrange(image.size // 4096) * 4096 for _ in range(count)]
    for place in places:
        disk.seek(place)
        disk.read(4096)
    started = time.perf_counter()
    for place in places:
        disk.seek(place)
        disk.read(4096)
    print((time.perf_counter() - started) / count)
