"""Hostile images by seed: a few hundred of each variant always, many more in `make test-all`."""

from __future__ import annotations

import collections

import pytest

from tests.fuzz import hostile

IDS = [f"{driver}-{'-'.join(map(str, options.values()))}" for driver, options in hostile.VARIANTS]


def run(variant: int, first: int, count: int, folder) -> collections.Counter[str]:
    path = folder / "valid"
    driver, options = hostile.VARIANTS[variant]
    hostile.make(str(path), driver, options, variant)
    image = path.read_bytes()
    reached: collections.Counter[str] = collections.Counter()
    for seed in range(first, first + count):
        try:
            reached[hostile.one(str(folder), (driver, options), image, seed)] += 1
        except Exception as error:
            raise AssertionError(
                f"{driver} {options} seed {seed}: {type(error).__name__}: {error}"
            ) from error
    return reached


@pytest.mark.parametrize("variant", range(len(hostile.VARIANTS)), ids=IDS)
def test_a_hostile_image_ends_in_a_result_or_an_error_of_ours(variant, tmp_path):
    reached = run(variant, 1000 * variant, 150, tmp_path)
    print(dict(reached))
    assert reached["nothing"] < 150, "every image was refused at once: the lies are too plain"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", range(len(hostile.VARIANTS)), ids=IDS)
def test_many_hostile_images(variant, tmp_path):
    print(dict(run(variant, 1_000_000 * (variant + 1), 5000, tmp_path)))
