"""The suites' tests of reading, writing, zeroing and many threads, with a real NBD server below."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature

import pytest

from tests.contract import test_concurrent, test_extents, test_read_write, test_zero_discard
from tests.contract.served import SERVED, ServedRow, end_all

pytestmark = pytest.mark.peer

TESTS = (
    test_read_write.test_a_new_image_reads_as_zero,
    test_read_write.test_writes_of_every_alignment,
    test_read_write.test_reads_of_every_alignment,
    test_read_write.test_all_at_once,
    test_read_write.test_buffers_of_all_kinds,
    test_read_write.test_a_caller_keeps_its_buffer,
    test_read_write.test_beyond_the_end_is_refused,
    test_read_write.test_nothing_is_a_request_too,
    test_read_write.test_a_closed_node_says_so,
    test_zero_discard.test_zeroes_over_nothing,
    test_zero_discard.test_discards_round_inwards,
    test_zero_discard.test_all_is_discarded,
    test_extents.test_extents_say_what_a_reader_gets,
    test_extents.test_extents_of_every_range,
    test_concurrent.test_threads_on_one_node,
)


@pytest.fixture(scope="module", autouse=True)
def _servers_end() -> Iterator[None]:
    yield
    end_all()


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
@pytest.mark.parametrize("test", TESTS, ids=lambda test: test.__name__)
def test_behind_a_server(test: Callable[..., None], row: ServedRow, tmp_path, rng, seed):
    known = {"row": row, "tmp_path": tmp_path, "rng": rng, "seed": seed}
    test(**{name: known[name] for name in signature(test).parameters})


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
@pytest.mark.parametrize("unmap", [False, True], ids=["keep", "unmap"])
def test_zeroes_behind_a_server(row: ServedRow, unmap: bool, tmp_path, rng):
    test_zero_discard.test_zeroes_of_every_alignment(row, tmp_path, unmap, rng)
