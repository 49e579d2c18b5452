"""Formats of files: a file of a newer raytvb is refused, and the message says what to do."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from vector_files import (
    SHAPES,
    metadata,
    open_set,
    paths_of,
    put_mask,
    put_set,
    put_vector,
    random_mask,
    values_of,
)

from raytvb.errors import UserError, VectorError
from raytvb.experiment.inventory import verify_store
from raytvb.storage import records
from raytvb.storage.basis_layout import INDEX
from raytvb.storage.basis_writer import write_combinations
from raytvb.storage.contract import Contract
from raytvb.storage.format_version import FORMAT
from raytvb.storage.gram_rows import Arrival
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.masks import MaskFile
from raytvb.storage.records import FileInfo
from raytvb.storage.sealed_json import json_bytes
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.stored_basis import StoredBasis
from raytvb.storage.vectors import VectorFile
from raytvb.storage.verify import ALTERED, verify_records

MALFORMED = ["1", 0, -1, None, True, 1.0, [1]]
NEWER = (
    f"has format {FORMAT + 1}, written by a newer raytvb; this one reads formats up to {FORMAT}; "
    "upgrade raytvb"
)


class Loss(Contract):
    """Metrics of a thing made for tests."""

    loss: float


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


def commit(store: Store, prefix: str = "things/one") -> None:
    records.commit(
        store,
        prefix,
        identity={"name": "one", "lr": 1e-5},
        parents={"base": "f00d"},
        metrics=Loss(loss=0.25),
        files={"b": b"2", "a": bytes(5 * 2**20)},
    )


def change_record(store: Store, **fields: object) -> None:
    key = "things/one/record.json"
    store.write_json(key, {**store.read_json(key), **fields})


def change_header(store: Store, key: str, **fields: object) -> None:
    """Rewrite a tensor file with other metadata."""
    data = store.read(key)
    info = {**json.loads(metadata(data)["raytvb"]), **fields}
    store.write(key, save(load(data), metadata={"raytvb": json.dumps(info)}))


# Records ------------------------------------------------------------------------------------------


def test_a_record_is_what_it_always_was_with_a_format(store: Store) -> None:
    commit(store)
    large = FileInfo.of(bytes(5 * 2**20))
    assert len(large.parts) == 2
    written = store.read_json("things/one/record.json")
    seal = written.pop("sha256")
    assert seal == hashlib.sha256(json_bytes(written)).hexdigest()
    assert written == {
        "identity": {"name": "one", "lr": 1e-5},
        "parents": {"base": "f00d"},
        "metrics": {"loss": 0.25},
        "files": {
            "a": {"sha256": large.sha256, "size": large.size, "parts": list(large.parts)},
            "b": {"sha256": FileInfo.of(b"2").sha256, "size": 1},
        },
        "versions": records.versions(),
        "format": FORMAT,
    }
    record = records.find(store, "things/one")
    assert record is not None
    assert record.to_json() == written
    assert record.metrics_as(Loss, "things/one") == Loss(loss=0.25)
    assert record.size == 5 * 2**20 + 1
    assert record.is_of({"name": "one", "lr": 1e-5})
    assert not record.is_of({"name": "one", "lr": 1e-4})


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_named_and_nothing_is_written(
    store: Store, loss: float
) -> None:
    with pytest.raises(
        VectorError, match=rf"things/one/record\.json would have metrics\.loss = {loss}"
    ):
        records.commit(store, "things/one", identity={}, metrics=Loss(loss=loss), files={"a": b""})
    with pytest.raises(VectorError, match=rf"identity\.of\.1 = {loss}"):
        records.commit(store, "things/one", identity={"of": [1.0, loss]})
    assert store.keys() == []


def test_records_that_have_no_format_are_read(store: Store) -> None:
    commit(store)
    fields = store.read_json("things/one/record.json")
    del fields["format"], fields["sha256"]
    store.write_json("things/one/record.json", fields)
    record = records.find(store, "things/one")
    assert record is not None and record.format == 1
    findings, _ = verify_records(store, ["things/one/record.json"])
    assert findings.checked == 3 and findings.messages() == []


def test_a_record_of_a_newer_raytvb_is_refused_whatever_else_it_says(store: Store) -> None:
    commit(store)
    for fields in (
        {"format": FORMAT + 1},
        {"format": FORMAT + 1, "files": "elsewhere", "identity": None},
    ):
        change_record(store, **fields)
        with pytest.raises(UserError, match=f"things/one/record.json {NEWER}"):
            records.find(store, "things/one")
        with pytest.raises(UserError, match=NEWER):
            records.find_all(store)


@pytest.mark.parametrize("number", MALFORMED)
def test_a_record_with_a_malformed_format_is_an_error_that_names_it(
    store: Store, number: object
) -> None:
    commit(store)
    change_record(store, format=number)
    with pytest.raises(StoreError, match=r"things/one/record\.json has the format .*not a format"):
        records.find(store, "things/one")
    (problem,) = verify_store(store).problems
    assert problem.kind == ALTERED and "not a format" in problem.reason


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b"\xff\x00\x81",
        b"[" * 100_000,
        b'{"identity": ' + b"[" * 100_000,
        b'{"identity": {}, "files": {"a": {"size": 1}}}',
    ],
    ids=["empty", "cut", "list", "no-fields", "binary", "deep", "deep-identity", "no-checksum"],
)
def test_a_file_that_is_no_record_is_an_error_that_names_it(store: Store, data: bytes) -> None:
    commit(store)
    store.write("things/two/record.json", data)
    with pytest.raises(
        StoreError,
        match=r"things/two/record\.json cannot be read: .*; `raytvb verify STORE --repair`",
    ):
        records.find(store, "things/two")
    findings = verify_store(store)
    assert findings.checked == 3  # the other thing: its record and two files
    assert [problem.key for problem in findings.problems] == ["things/two/record.json"]


def test_verify_tells_once_that_records_are_newer_and_checks_the_others(store: Store) -> None:
    for name in ("one", "two", "three"):
        commit(store, f"things/{name}")
    store.write("things/three/b", b"3")
    for name in ("one", "two"):
        key = f"things/{name}/record.json"
        store.write_json(key, {**store.read_json(key), "format": FORMAT + 1})
    findings = verify_store(store)
    newer, damaged = findings.messages()
    assert findings.checked == 3
    assert NEWER in newer and "(and 1 other records)" in newer
    assert damaged == "things/three/b: altered: its contents have changed"


def test_all_records_are_found_by_their_folders(store: Store) -> None:
    for prefix in ("things/b", "things/a/c", "things/a", "others/a"):
        commit(store, prefix)
    store.write("things/record.json.part", b"")
    assert list(records.find_all(store, "things")) == ["things/a/c", "things/a", "things/b"]
    assert list(records.find_all(store)) == ["others/a", "things/a/c", "things/a", "things/b"]
    assert records.find_all(store, "nothing") == {}


def test_files_are_told_from_what_was_recorded(store: Store) -> None:
    commit(store)
    store.write("things/one/b", b"22")
    store.delete("things/one/a")
    assert verify_store(store).messages() == [
        "things/one/a: missing: its record lists it, in things/one",
        "things/one/b: altered: it has 2 bytes instead of 1",
    ]


# Tensor files -------------------------------------------------------------------------------------


def put_basis(store: Store) -> str:
    keys, _ = put_set(store, "shared")
    weights = torch.eye(5, 2, dtype=torch.float64)
    write_combinations(paths_of(store, keys), {"basis/m2": weights}, store.url)
    store.delete("basis/m2/record.json")  # else every change of the index is damage
    return f"basis/m2/{INDEX}"


def change_index(store: Store, key: str, **fields: object) -> None:
    document = store.read_json(key)
    document["metadata"]["raytvb"] |= fields
    store.write_json(key, document)


def prepare(store: Store, kind: str) -> tuple[str, Callable[..., None], Callable[[], object]]:
    """One kind of file: its key, how to change its metadata, and how to open it."""
    mask = random_mask(SHAPES, seed=2)
    match kind:
        case "vector":
            key = put_vector(store, "one", values_of(SHAPES, seed=1), mask)
            return key, change_header, lambda: VectorFile(store, key)
        case "set":
            keys, _ = put_set(store, "dense")
            return keys[3], change_header, lambda: open_set(store, keys)
        case "mask":
            key = put_mask(store, "one", mask)
            return key, change_header, lambda: MaskFile(store, key)
        case "mask of a vector":
            put_vector(store, "one", values_of(SHAPES, seed=1), mask)
            key = "masks/shared/mask.safetensors"
            vector = "vectors/one/vector.safetensors"
            return key, change_header, lambda: VectorFile(store, vector)
        case _:
            return put_basis(store), change_index, lambda: StoredBasis(store, "basis/m2")


FILES = ["vector", "set", "mask", "mask of a vector", "basis"]


@pytest.mark.parametrize("kind", FILES)
def test_a_tensor_file_of_a_newer_raytvb_is_refused_with_the_way_out(
    store: Store, kind: str
) -> None:
    key, change, open_file = prepare(store, kind)
    open_file()
    change(store, key, format=FORMAT + 1)
    with pytest.raises(VectorError, match=f"{key} {NEWER}") as caught:
        open_file()
    assert caught.value.remedy.startswith("upgrade raytvb")
    assert caught.value.with_remedy("delete it") is caught.value


@pytest.mark.parametrize("number", MALFORMED)
@pytest.mark.parametrize("kind", FILES)
def test_a_tensor_file_with_a_malformed_format_is_an_error_that_names_it(
    store: Store, kind: str, number: object
) -> None:
    key, change, open_file = prepare(store, kind)
    change(store, key, format=number)
    with pytest.raises(VectorError, match=f"{key} has the format .*, which is not a format that"):
        open_file()


def test_rows_of_a_newer_raytvb_are_not_taken_for_damage(store: Store) -> None:
    """Damaged row files are ignored and written again. Files of a newer raytvb must not be."""
    writer, state = GramWriter(store), GramState()
    row = torch.ones(1, 1, dtype=torch.float64)
    writer.append(state, [("a", "f00d")], row, [Arrival(vectors=1, floor={})])
    change_header(store, "gram/rows/000000.safetensors", format=FORMAT + 1)
    with pytest.raises(VectorError, match=NEWER):
        GramState.read(store)
    change_header(store, "gram/rows/000000.safetensors", format="2")
    with pytest.raises(VectorError, match="not a format that this raytvb knows; upgrade raytvb"):
        GramState.read(store)


def test_a_snapshot_of_a_newer_raytvb_is_refused(store: Store) -> None:
    writer, state = GramWriter(store), GramState()
    writer.append(state, [("a", "f00d")], torch.ones(1, 1, dtype=torch.float64), [])
    writer.save(state)
    store.write_json(
        "gram/record.json", {**store.read_json("gram/record.json"), "format": FORMAT + 1}
    )
    with pytest.raises(UserError, match=NEWER):
        GramState.read(store)


# Errors -------------------------------------------------------------------------------------------


def test_an_error_of_a_vector_is_its_reason_and_its_remedy() -> None:
    error = VectorError("a.safetensors is damaged")
    assert str(error) == error.reason == "a.safetensors is damaged" and error.remedy == ""
    advised = error.with_remedy("delete it")
    assert str(advised) == "a.safetensors is damaged; delete it"
    assert (advised.reason, advised.remedy) == ("a.safetensors is damaged", "delete it")
    assert str(advised.with_remedy("keep it")) == str(advised)
