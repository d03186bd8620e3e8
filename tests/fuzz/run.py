"""`make fuzz`: hostile images until interrupted; --seed, --count and --format narrow it down."""

from __future__ import annotations

import argparse
import collections
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "src"), str(ROOT)]

from tests.fuzz import hostile


def main() -> int:
    """Run; 1 where something was raised that should not be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()) << 20)
    parser.add_argument("--count", type=int, default=0, help="images; 0: until interrupted")
    parser.add_argument("--format", help="only this driver")
    parser.add_argument("--keep", default="hostile-found", help="where an image that broke us goes")
    given = parser.parse_args()
    variants = [item for item in hostile.VARIANTS if given.format in (None, item[0])]
    reached: collections.Counter[str] = collections.Counter()
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        images = []
        for number, variant in enumerate(variants):
            path = Path(folder, f"valid{number}")
            hostile.make(str(path), *variant, number)
            images.append(path.read_bytes())
        seed = given.seed
        try:
            while not given.count or seed < given.seed + given.count:
                number = seed % len(variants)
                try:
                    reached[hostile.one(folder, variants[number], images[number], seed)] += 1
                except Exception:
                    failures += 1
                    kept = Path(given.keep)
                    kept.mkdir(exist_ok=True)
                    shutil.copy(Path(folder, "hostile"), kept / f"{variants[number][0]}-{seed}")
                    traceback.print_exc()
                    print(f"repeat: tests/fuzz/run.py --seed {seed} --count 1", flush=True)
                seed += 1
        except KeyboardInterrupt:
            pass
    total = sum(reached.values()) + failures
    print(f"{total} images from seed {given.seed}: {dict(reached)}, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
