"""Evaluations in a store: counts are read back as they were written, and measured again if they
belong to something else.
"""

import io
import json
import math
from dataclasses import asdict, fields
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raytvb.errors import UserError
from raytvb.evaluation.rows import (
    PAIR_SCHEMA,
    SCHEMA,
    PairRow,
    Row,
    has_rows,
    prefix,
    read_pair_rows,
    read_rows,
    rows_file,
    stored_rows,
    write_pair_rows,
    write_rows,
)
from raytvb.evaluation.rows import ROWS as ROWS_FILE
from raytvb.maths.counts import Count
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.damage import DamagedError
from raytvb.storage.parquet import parquet_bytes
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreKeyError

IDENTITY: JsonObject = {"coefficient": {"1": 0.5, "8": 0.125}, "vector": None, "precision": "fp32"}
ROWS = [
    Row.of("ae-m4", "test", 8, 0, "glyphs/greek-blur", 0.1 + 0.2, Count(7, 11, 6.5)),
    Row.of("ae-m4", "test", 1, 2, "é", 0.0, Count(0, 2**40)),
]


def file_of(name: str) -> str:
    """Key of rows that have been written once."""
    return f"{prefix(name)}/{ROWS_FILE}"


def present_file(store: Store, name: str) -> str:
    """Key of the rows that the record lists, which are the only file beside it."""
    record = records.read_record(store, f"{prefix(name)}/{records.RECORD}")
    (file,) = record.files
    assert record.files[file] == rows_file(record, name)
    assert sorted(store.keys(prefix(name))) == sorted(
        f"{prefix(name)}/{each}" for each in (file, records.RECORD)
    )
    return f"{prefix(name)}/{file}"


def test_a_row_has_the_counts_and_what_they_are_of() -> None:
    assert ROWS[0] == Row(
        model="ae-m4",
        split="test",
        size=8,
        subset=0,
        task="glyphs/greek-blur",
        coefficient=0.1 + 0.2,
        correct=7,
        total=11,
    )
    assert ROWS[0].count == Count(7, 11) and ROWS[0].accuracy == 7 / 11
    assert [field.name for field in fields(Row)] == SCHEMA.names
    assert [field.name for field in fields(PairRow)] == PAIR_SCHEMA.names


def test_rows_come_back_as_they_were_written(store_url: str) -> None:
    store = Store(store_url)
    assert not has_rows(store, "ae-m4") and not has_rows(store, "ae-m4", IDENTITY)
    with pytest.raises(StoreKeyError):
        read_rows(store, "ae-m4")
    for name in ("ae-m4", "negation-full/glyphs/greek-blur"):
        write_rows(store, name, ROWS, IDENTITY)
        assert read_rows(store, name) == ROWS
        assert has_rows(store, name) and has_rows(store, name, IDENTITY)
    folders = [prefix(n) for n in ("ae-m4", "negation-full/glyphs/greek-blur")]
    assert folders == ["evals/ae-m4", "evals/negation-full/glyphs/greek-blur"]
    assert store.keys() == [f"{f}/{n}" for f in folders for n in ("record.json", "rows.parquet")]
    write_rows(store, "ae-m4", ROWS[:1], {})
    assert (
        read_rows(store, "ae-m4") == ROWS[:1]
        and read_rows(store, "negation-full/glyphs/greek-blur") == ROWS
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


OTHERS: list[JsonObject] = [
    {},
    {**IDENTITY, "precision": "bf16"},
    {**IDENTITY, "coefficient": {"1": 0.5}},
    {**IDENTITY, "more": 1},
    {**IDENTITY, "coefficient": {"1": 0.5, "8": 0.1250001}},
    {**IDENTITY, "vector": [0.1]},
]


@pytest.mark.parametrize("other", OTHERS)
def test_rows_of_something_else_do_not_count(store: Store, other: JsonObject) -> None:
    write_rows(store, "a", ROWS, IDENTITY)
    assert has_rows(store, "a") and not has_rows(store, "a", other)
    write_rows(store, "a", ROWS[1:], other)
    assert has_rows(store, "a", other) and not has_rows(store, "a", IDENTITY)
    assert read_rows(store, "a") == ROWS[1:]


def test_an_identity_is_its_values_not_their_order_or_containers(store: Store) -> None:
    write_rows(store, "a", ROWS, {"x": [1, 2.5], "y": {"b": "é", "a": None}})
    assert has_rows(store, "a", {"y": {"a": None, "b": "é"}, "x": [1, 2.5]})
    assert not has_rows(store, "a", {"y": {"a": None, "b": "é"}, "x": [2.5, 1]})


def first_format_file(store: Store, identity: JsonObject | None) -> None:
    described = {} if identity is None else {b"raytvb": json.dumps(identity).encode()}
    table = parquet_bytes([asdict(row) for row in ROWS], SCHEMA.with_metadata(described))
    store.write("evals/old.parquet", table)


def test_rows_of_the_first_format_are_read_in_a_store_of_that_format_only(store: Store) -> None:
    first_format_file(store, IDENTITY)
    assert not has_rows(store, "old")  # else a deleted record would leave rows that nobody checks
    with pytest.raises(StoreKeyError):
        read_rows(store, "old")
    store.write_json("base/record.json", {"identity": {}})
    assert has_rows(store, "old", IDENTITY) and read_rows(store, "old") == ROWS
    assert not has_rows(store, "old", {})
    first_format_file(store, None)
    # Rows that do not say what was measured do not count, but can be read.
    assert not has_rows(store, "old") and not has_rows(store, "old", {})
    assert read_rows(store, "old") == ROWS
    write_rows(store, "old", ROWS[:1], {})
    assert read_rows(store, "old") == ROWS[:1] and not store.exists("evals/old.parquet")
    assert list(records.find_all(store, "evals")) == ["evals/old"]


def test_columns_have_their_types_also_without_rows(store: Store) -> None:
    write_rows(store, "none", [], IDENTITY)
    assert read_rows(store, "none") == [] and has_rows(store, "none", IDENTITY)
    for name, rows in (("none", ROWS[:0]), ("some", ROWS)):
        write_rows(store, name, rows, IDENTITY)
        assert pq.read_schema(io.BytesIO(store.read(present_file(store, name)))) == SCHEMA


def test_rows_that_are_written_again_never_have_the_name_of_the_old_ones(store: Store) -> None:
    """So a reader has the old rows or the new ones, wherever the writer died."""
    write_rows(store, "a", ROWS, IDENTITY, {"vectors": "1"})
    first = present_file(store, "a")
    assert first == file_of("a")
    write_rows(store, "a", ROWS[:1], IDENTITY, {"vectors": "2"})
    second = present_file(store, "a")
    assert second != first and read_rows(store, "a") == ROWS[:1]
    stored = stored_rows(store, "a")
    assert stored is not None and stored.record is not None
    assert (stored.identity, stored.record.parents) == (IDENTITY, {"vectors": "2"})
    write_rows(store, "a", ROWS, IDENTITY)
    assert present_file(store, "a") != second and read_rows(store, "a") == ROWS


def test_rows_of_pairs_of_tasks(store: Store) -> None:
    pair = PairRow("full", "test", "a", "b", -1.0, 0.5, disagree=3, total=8, error=0.75)
    write_pair_rows(store, "pairs", [pair, pair], IDENTITY)
    assert read_pair_rows(store, "pairs") == [pair, pair] and has_rows(store, "pairs", IDENTITY)
    assert pq.read_schema(io.BytesIO(store.read(file_of("pairs")))) == PAIR_SCHEMA


def test_a_model_may_have_no_coefficient(store: Store) -> None:
    weighted = Row.of("per-task", "test", 4, 0, "a", None, Count(1, 2))
    write_rows(store, "vector", [weighted], IDENTITY)
    assert read_rows(store, "vector") == [weighted]
    strange = Row.of("per-task", "test", 4, 0, "a", math.nan, Count(1, 2))
    write_rows(store, "vector", [strange], IDENTITY)
    (found,) = read_rows(store, "vector")
    assert found.coefficient is not None and math.isnan(found.coefficient)


def test_a_file_that_has_no_such_rows_is_named(store: Store) -> None:
    write_rows(store, "a", ROWS, IDENTITY)
    with pytest.raises(DamagedError, match=r"evals/a cannot be read: .*verify STORE --repair"):
        read_pair_rows(store, "a")


def test_no_changed_bit_of_rows_is_read(store: Store) -> None:
    """The kind of table in which every other flipped bit gave other numbers without an error."""
    write_rows(store, "a", ROWS * 20, IDENTITY)
    for name in (records.RECORD, ROWS_FILE):
        whole = store.read(f"evals/a/{name}")
        for position in range(0, len(whole), max(1, len(whole) // 200)):
            changed = bytearray(whole)
            changed[position] ^= 1 << position % 8
            store.write(f"evals/a/{name}", bytes(changed))
            with pytest.raises((DamagedError, UserError), match="evals/a"):
                read_rows(store, "a")
        store.write(f"evals/a/{name}", whole)
    assert read_rows(store, "a") == ROWS * 20
    store.write(file_of("a"), store.read(file_of("a"))[:-7])
    with pytest.raises(DamagedError, match=r"evals/a/rows\.parquet .*bytes instead of"):
        read_rows(store, "a")
    assert not has_rows(store, "a") and not has_rows(store, "a", IDENTITY)
    store.delete(file_of("a"))
    with pytest.raises(DamagedError, match=r"evals/a/rows\.parquet .*it is missing"):
        read_rows(store, "a")


def test_equal_rows_are_equal_files(store: Store) -> None:
    for name in ("a", "b"):
        write_rows(store, name, ROWS, IDENTITY)
    assert store.read(file_of("a")) == store.read(file_of("b"))
