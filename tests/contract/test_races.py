"""The races of races.py, with nothing taken out: each row passes those that it can have."""

from __future__ import annotations

import pytest

from tests.contract import races
from tests.contract.rows import Row, rows

#: Rows whose blocks are small enough to have several of them in an image in memory.
HERE = "raw qcow2 qcow2-v2 qcow2-512 qcow2-4k-refcount1 qcow2-lazy qcow2-overlay vdi vdi-512 \
vdi-static vdi-diff vpc vpc-4k vpc-fixed vpc-diff odd odd-scramble".split()
FREEING = "qcow2 qcow2-v2 qcow2-512 qcow2-4k-refcount1 qcow2-lazy odd odd-scramble".split()
MAPPED = [name for name in HERE if name not in ("raw", "vpc-fixed")]
BLOCKS = ["odd", "odd-scramble", "vpc-diff"]  # validity in units below a block
OVERLAYS = ["qcow2-overlay", "vdi-diff", "vpc-diff"]
ENCODING = ["qcow2", "qcow2-v2", "odd"]
FIRSTS = ["qcow2-lazy", "vdi", "vdi-diff", "vpc", "odd"]


def of(*names: str) -> pytest.MarkDecorator:
    return rows(lambda row: row.name in names)


@of(*HERE)
def test_a_held_read_keeps_nobody(row: Row):
    races.a_held_read_keeps_nobody(row)


@of(*MAPPED)
def test_a_held_write_keeps_nobody(row: Row):
    races.a_held_write_keeps_nobody(row)


@of(*BLOCKS)
def test_two_writers_in_one_block(row: Row):
    races.two_writers_in_one_block(row)


@of("raw", "qcow2", "odd")
@pytest.mark.parametrize("request_", races.HELD)
def test_an_owner_waits(row: Row, request_: str):
    if request_ == "discard" and row.name != "raw":
        pytest.skip("nothing comes to the file at once")
    if request_ == "write_encoded" and not row.encodes:
        pytest.skip("not here")
    races.an_owner_waits_for(row, request_)


@of(*OVERLAYS)
def test_an_owner_waits_for_a_populate(row: Row):
    races.an_owner_waits_for_a_populate(row)


@of(*HERE)
def test_requests_wait_for_an_owner(row: Row):
    races.requests_wait_for_an_owner(row)


@of(*HERE)
def test_closing_waits(row: Row):
    races.closing_waits(row)


@of(*FREEING)
def test_freed_space_waits_for_its_reader(row: Row):
    races.freed_space_waits_for_its_reader(row)


@of(*FREEING)
def test_freed_space_waits_for_its_writer(row: Row):
    races.freed_space_waits_for_its_writer(row)


@of(*FREEING)
def test_freed_space_comes_back(row: Row):
    races.freed_space_comes_back(row)


@of("odd", "odd-scramble", *OVERLAYS)
def test_data_before_its_name(row: Row):
    races.data_before_its_name(row)


@of(*ENCODING)
def test_replaced_units_are_forgotten(row: Row):
    races.replaced_units_are_forgotten(row)


@of(*MAPPED)
def test_two_writers_of_a_new_cluster(row: Row):
    races.two_writers_of_a_new_cluster(row)


@of(*(name for name in MAPPED if name != "odd-scramble"))
def test_a_zeroed_edge_and_a_writer(row: Row):
    races.a_zeroed_edge_and_a_writer(row)


@of(*ENCODING)
def test_a_zeroing_and_a_filling(row: Row):
    races.a_zeroing_and_a_filling(row)


@of(*ENCODING)
def test_a_unit_and_a_writer(row: Row):
    races.a_unit_and_a_writer(row)


@of("qcow2", "odd", "vdi")
def test_a_placing_and_a_writer(row: Row):
    races.a_placing_and_a_writer(row)


@of(*OVERLAYS)
def test_a_populate_and_a_writer(row: Row):
    races.a_populate_and_a_writer(row)


@of("odd-scramble")
@pytest.mark.parametrize("kind", ["write", "zero"])
def test_two_padded_writers(row: Row, kind: str):
    races.two_padded_writers(row, kind)


@of(*HERE)
def test_a_flush_starts_after_its_caller_came(row: Row):
    races.a_flush_starts_after_its_caller_came(row)


@of(*OVERLAYS)
def test_populate_fills_before_it_names(row: Row):
    races.populate_fills_before_it_names(row)


@of(*ENCODING)
def test_units_are_there_before_their_name(row: Row):
    races.units_are_there_before_their_name(row)


@of(*FREEING)
def test_freed_space_comes_back_beside_readers(row: Row):
    races.freed_space_comes_back_beside_readers(row)


@of("vdi-512", "vpc-4k")
def test_tables_in_use_stay(row: Row):
    races.tables_in_use_stay(row)


@of("vdi-512", "vpc-4k")
def test_changed_tables_stay(row: Row):
    races.changed_tables_stay(row)


@of(*HERE)
def test_a_flush_misses_nothing(row: Row):
    races.a_flush_misses_nothing(row)


@of("qcow2", "qcow2-overlay")
@pytest.mark.parametrize("operation", races.OPERATIONS)
def test_an_operation_waits(row: Row, operation: str):
    if operation in ("change_backing", "make_empty") and not row.differs:
        pytest.skip("no backing file")
    races.an_operation_waits(row, operation)


@of(*FIRSTS)
def test_nobody_passes_the_first_write(row: Row):
    races.nobody_passes_the_first_write(row)
