"""Vector files and sets of them: format, ranges, blocks and sums, against plain dense float64
arithmetic.
"""

import itertools
import json
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor
from vector_files import (
    BIG,
    DTYPES,
    KINDS,
    SHAPES,
    common,
    open_set,
    put_mask,
    put_set,
    put_vector,
    random_mask,
    truncate,
    values_of,
    vector_data,
)

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK
from raytvb.storage.masks import OpenMasks
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.storage.vector_set import VectorSet, block_columns
from raytvb.storage.vectors import VectorFile, vector_bytes, vector_info

INFO = vector_info("base")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES["both"])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_vector_file_is_an_ordinary_safetensors_file(
    store: Store, sparse: bool, dtype: torch.dtype
) -> None:
    values, mask = (
        values_of(SHAPES, seed=1, dtype=dtype),
        random_mask(SHAPES, seed=2) if sparse else None,
    )
    key = put_vector(store, "glyphs/one", values, mask)
    path = store.path(key)
    with safe_open(path, "pt") as file:
        assert list(file.metadata()) == ["raytvb"]
        info = json.loads(file.metadata()["raytvb"])
        assert file.metadata()["raytvb"] == json.dumps(info, sort_keys=True)
    assert info["base"] == "base-1" and info["kind"] == ("sparse" if sparse else "dense")
    assert not sparse or info["mask"] == "../../../masks/shared/mask.safetensors"
    loaded = load_file(path)
    assert loaded.keys() == values.keys()
    for name, value in values.items():
        expected = value if mask is None else value[mask.tensors()[name]]
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], expected)


def test_equal_vectors_are_equal_bytes_whatever_the_order_of_the_tensors() -> None:
    values, info = values_of(SHAPES, seed=1), vector_info("base", mask_path="../m", mask="f")
    files = {vector_bytes(dict(order), info) for order in itertools.permutations(values.items())}
    assert files == {vector_bytes(values, info)}
    assert vector_bytes(values_of(SHAPES, seed=2), info) not in files


def test_a_vector_file_has_one_dtype() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        vector_bytes({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}, INFO)


@pytest.mark.parametrize("dtype", DTYPES["both"])
@pytest.mark.parametrize("sparse", [False, True])
def test_any_range_of_values_can_be_read(store: Store, sparse: bool, dtype: torch.dtype) -> None:
    values, mask = (
        values_of(SHAPES, seed=1, dtype=dtype),
        random_mask(SHAPES, seed=2) if sparse else None,
    )
    file = VectorFile(store, put_vector(store, "one", values, mask))
    expected = torch.cat([values[n].reshape(-1) for n in sorted(values)]).float()
    expected = expected if mask is None else expected[mask.bits]
    assert file.stored == len(expected)
    rng = np.random.default_rng(0)
    for start, stop in [
        (0, file.stored),
        (0, 0),
        (file.stored, file.stored),
        *np.sort(rng.integers(0, file.stored + 1, (30, 2))).tolist(),
    ]:
        found = file.values(start, stop)
        assert found.dtype == torch.float32 and torch.equal(found, expected[start:stop])
        buffer = torch.full((stop - start + 2,), 7.0)
        file.read_into(start, buffer[1:-1])
        assert torch.equal(
            buffer, torch.cat([torch.tensor([7.0]), expected[start:stop], torch.tensor([7.0])])
        )
        first, last = file.byte_range(start, stop)
        assert (
            store.read(file.key)[first:last]
            == expected[start:stop].to(dtype).view(torch.uint8).numpy().tobytes()
        )


@pytest.mark.parametrize("dtype", DTYPES["both"])
def test_reading_past_the_end_is_an_error(store: Store, dtype: torch.dtype) -> None:
    file = VectorFile(store, put_vector(store, "one", values_of(SHAPES, seed=1, dtype=dtype)))
    with pytest.raises(VectorError, match=r"vectors/one/.* has 205 values, not 204\.\.206"):
        file.values(file.stored - 1, file.stored + 1)


@pytest.mark.parametrize("dtype", DTYPES["both"])
def test_tensors_that_are_not_finite_are_listed(store: Store, dtype: torch.dtype) -> None:
    values = values_of({**SHAPES, "visual.d": (16 * BLOCK + 5,)}, seed=1, dtype=dtype)
    assert VectorFile(store, put_vector(store, "good", values)).not_finite() == []
    values["visual.B"][-1], values["visual.d"][-1] = float("nan"), float("-inf")
    assert VectorFile(store, put_vector(store, "bad", values)).not_finite() == [
        "visual.B",
        "visual.d",
    ]


def test_parameters_have_their_shapes_where_only_some_entries_are_stored(store: Store) -> None:
    mask = random_mask(SHAPES, seed=2)
    file = VectorFile(store, put_vector(store, "one", values_of(SHAPES, seed=1), mask))
    assert file.parameters == SHAPES and list(file.parameters) == sorted(SHAPES)
    assert file.shapes == {n: (int(m.sum()),) for n, m in mask.tensors().items()}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"1234567",
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b'"a"',
        struct.pack("<Q", 12) + b'{"a": [1, 2]',
        b"not a vector file",
        save({"a": torch.zeros(3)}),
        save({"a": torch.zeros(3)}, metadata={"raytvb": "no"}),
        save({"a": torch.zeros(3)}, metadata={"raytvb": "[1]"}),
    ],
)
def test_a_file_that_is_no_vector_file_is_an_error_that_names_it(store: Store, data: bytes) -> None:
    store.write("x/vector.safetensors", data)
    with pytest.raises(VectorError, match=r"x/vector\.safetensors is not a whole"):
        VectorFile(store, "x/vector.safetensors")


@pytest.mark.parametrize("field", ["base", "mask", "mask_fingerprint"])
def test_metadata_without_a_field_is_an_error_that_names_both(store: Store, field: str) -> None:
    info = vector_info("base", mask_path="mask.safetensors", mask="f").to_json()
    del info[field]
    data = save({"a": torch.zeros(3)}, metadata={"raytvb": json.dumps(info)})
    store.write("x/vector.safetensors", data)
    with pytest.raises(
        VectorError, match=rf"x/vector\.safetensors is not a vector file: .* no {field}$"
    ):
        VectorFile(store, "x/vector.safetensors")


def test_a_shape_that_does_not_fit_its_bytes_is_an_error_that_names_the_tensor(
    store: Store,
) -> None:
    data = vector_data("x", values_of(SHAPES, seed=1), None, "", "base")
    store.write("x/vector.safetensors", data.replace(b"[7,19]", b"[7,18]"))
    with pytest.raises(
        VectorError, match=r"x/vector\.safetensors: shape and place of visual\.b\.weight do not fit"
    ):
        VectorFile(store, "x/vector.safetensors")


@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_other_dtypes_are_an_error(store: Store, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = {"a": torch.zeros(2, dtype=dtypes[0]), "b": torch.zeros(2, dtype=dtypes[1])}
    metadata = {"raytvb": json.dumps(INFO.to_json())}
    store.write("vector.safetensors", save(tensors, metadata=metadata))
    with pytest.raises(VectorError, match=r"vector\.safetensors.*F32 or BF16"):
        VectorFile(store, "vector.safetensors")


def test_a_vector_with_another_mask_than_its_own_is_an_error_that_names_both(store: Store) -> None:
    keys, _ = put_set(store, "shared")
    put_mask(store, "shared", random_mask(SHAPES, seed=1234))
    with pytest.raises(VectorError, match=r"task-1/vector.*another mask than.*masks/shared/mask"):
        VectorFile(store, keys[1])


def test_a_missing_mask_is_an_error_that_names_it(store: Store) -> None:
    keys, _ = put_set(store, "shared")
    store.delete("masks/shared/mask.safetensors")
    with pytest.raises(FileNotFoundError, match=r"masks/shared/mask\.safetensors"):
        VectorFile(store, keys[1])


def test_a_mask_outside_of_the_store_is_an_error_that_names_both(store: Store) -> None:
    put_set(store, "shared")
    inner = Store(store.path("vectors/suite"))
    with pytest.raises(
        VectorError, match=r"task-1/vector.*masks/shared/mask\.safetensors lies outside"
    ):
        VectorFile(inner, "task-1/vector.safetensors")
    found = VectorFile.open(
        inner.path("task-1/vector.safetensors")
    )  # roots the store where the mask can be reached
    assert found.mask is not None and found.mask.kept == found.stored


# Sets ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_common_coordinates_are_the_kept_ones_only_where_all_share_a_mask(
    store: Store, kind: str
) -> None:
    keys, V = put_set(store, kind)
    vectors = open_set(store, keys)
    assert vectors.compact == (kind in ("dense", "shared"))
    assert vectors.count == len(common(kind, V))
    assert vectors.parameters == SHAPES and list(vectors.parameters) == sorted(SHAPES)
    assert (vectors.mask is not None) == (kind == "shared")
    assert vectors.mask is None or torch.equal(
        vectors.mask.load().bits, random_mask(SHAPES, 99).bits
    )


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_cover_everything_once_and_in_order(store: Store, kind: str, dtypes: str) -> None:
    """There are 205 coordinates, or the kept ones of them, so the last block is narrower."""
    keys, V = put_set(store, kind, dtypes=DTYPES[dtypes])
    vectors, rows = open_set(store, keys), common(kind, V).T.float()
    for columns in (8, 40, 104, None):
        place = 0
        for start, block in vectors.blocks(columns):
            assert start == place and block.dtype == torch.float32 and block.is_contiguous()
            assert torch.equal(block, rows[:, start : start + block.shape[1]])
            place += block.shape[1]
            assert place == rows.shape[1] or block.shape[1] == columns
        assert place == vectors.count


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_vectors_that_are_longer_than_those(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind, BIG, count=3)
    rows = common(kind, V, BIG).T.float()
    for columns in (BLOCK, 8 * 3001):
        found = [(s, b.clone()) for s, b in open_set(store, keys).blocks(columns)]
        assert [s for s, _ in found] == list(range(0, rows.shape[1], columns))
        assert torch.equal(torch.cat([b for _, b in found], dim=1), rows)


def test_a_block_stays_as_it_is_while_the_next_is_read(store: Store) -> None:
    keys, V = put_set(store, "dense")
    places = set()
    for start, block in open_set(store, keys).blocks(40):
        time.sleep(0.02)
        assert torch.equal(block, V[start : start + 40].T.float())
        places.add(block.data_ptr())
    assert len(places) == 2


@pytest.mark.parametrize("columns", [0, 4, 12, -8])
def test_a_block_is_a_multiple_of_eight(store: Store, columns: int) -> None:
    keys, _ = put_set(store, "dense")
    with pytest.raises(ValueError, match=f"multiple of 8, not {columns}"):
        next(open_set(store, keys).blocks(columns))


def readers() -> set[threading.Thread]:
    """The threads of all pools of this process."""
    return {t for t in threading.enumerate() if t.name.startswith("ThreadPoolExecutor")}


@pytest.mark.parametrize("taken", [1, 2])
def test_readers_end_where_the_blocks_are_not_wanted_any_more(store: Store, taken: int) -> None:
    keys, _ = put_set(store, "per-task")
    before = readers()
    blocks = open_set(store, keys).blocks(8)
    for _ in range(taken):
        next(blocks)
    assert len(readers() - before) == 1
    blocks.close()
    assert not readers() - before


@pytest.mark.s3
def test_readers_of_a_bucket_end_too(s3_environment: str) -> None:
    store = Store(f"{s3_environment}/one")
    keys, V = put_set(store, "mixed")
    before, blocks = readers(), open_set(store, keys).blocks(24)
    start, block = next(blocks)
    assert start == 0 and torch.equal(block, V[:24].T.float()) and len(readers() - before) > 1
    blocks.close()
    assert not readers() - before


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_what_a_reader_meets_surfaces_and_ends_the_others(store: Store, kind: str) -> None:
    keys, _ = put_set(store, kind)
    vectors, before = open_set(store, keys), readers()
    truncate(store, keys[3], -4)  # after it was opened
    with pytest.raises(StoreError, match=r"suite/task-3/vector\.safetensors.*too short"):
        for _ in vectors.blocks(8):
            pass
    assert not readers() - before


def test_no_vectors_are_an_error() -> None:
    with pytest.raises(VectorError, match="no vectors"):
        VectorSet([])


def test_vectors_of_different_bases_are_an_error_that_names_both(store: Store) -> None:
    keys, _ = put_set(store, "dense")
    keys.append(put_vector(store, "stranger", values_of(SHAPES, seed=7), base="base-2"))
    with pytest.raises(
        VectorError, match=r"task-0/vector.*stranger/vector.*different pretrained models"
    ):
        open_set(store, keys)


@pytest.mark.parametrize("sparse", [False, True])
def test_vectors_of_different_parameters_are_an_error_that_names_both(
    store: Store, sparse: bool
) -> None:
    keys, _ = put_set(store, "dense")
    shapes = {**SHAPES, "visual.c": (2,)}
    mask = random_mask(shapes, seed=5) if sparse else None
    keys.append(put_vector(store, "stranger", values_of(shapes, seed=7), mask))
    with pytest.raises(
        VectorError, match=r"task-0/vector.*stranger/vector.*different names or shapes"
    ):
        open_set(store, keys)


@pytest.mark.parametrize("rows", [1, 3, 20, 255, 256, 257, 1000, 10_000])
def test_a_block_of_any_number_of_vectors_fits_the_budget(rows: int) -> None:
    columns = block_columns(rows)
    assert (
        columns % BLOCK == 0 or BLOCK % columns == 0
    )  # blocks of files and of masks never lie across each other
    assert columns % 8 == 0 and 4 * rows * columns <= 64 * 2**20 < 4 * rows * (3 * columns)


# Sums ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_combinations_are_the_weighted_sums_on_the_common_coordinates(
    store: Store, kind: str
) -> None:
    keys, V = put_set(store, kind)
    vectors, weights = open_set(store, keys), signed_weights()
    found = list(vectors.combinations(weights))
    assert len(found) == 4 and all(
        f.dtype == torch.float32 and f.shape == (vectors.count,) for f in found
    )
    torch.testing.assert_close(
        torch.stack(found, dim=1).double(), common(kind, V) @ weights, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("together", [0, 1, 2, 3])
def test_combinations_beyond_the_budget_are_the_same_numbers(
    store: Store, kind: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sums are made in several passes, and each pass makes at least one."""
    keys, V = put_set(store, kind)
    vectors, weights = open_set(store, keys), signed_weights()
    monkeypatch.setattr("raytvb.storage.vector_set.COMBINED_BYTES", 4 * vectors.count * together)
    passes, blocks = list[int](), VectorSet.blocks

    def counted(self: VectorSet) -> Iterator[tuple[int, Tensor]]:
        passes.append(1)
        return blocks(self)

    monkeypatch.setattr(VectorSet, "blocks", counted)
    found = torch.stack([f.clone() for f in vectors.combinations(weights)], dim=1)
    torch.testing.assert_close(found.double(), common(kind, V) @ weights, rtol=1e-5, atol=1e-5)
    assert (
        len(passes) == {0: 3, 1: 3, 2: 2, 3: 2}[together]
    )  # one column is zero, and takes no pass


def test_combinations_of_long_vectors_are_made_of_several_blocks(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, V = put_set(store, "per-task", BIG, count=3)
    monkeypatch.setattr("raytvb.storage.vector_set.block_columns", lambda rows: BLOCK)
    weights = torch.tensor([[1.0, 0.5], [-2.0, 0.0], [0.0, 0.25]], dtype=torch.float64)
    found = torch.stack(list(open_set(store, keys).combinations(weights)), dim=1)
    torch.testing.assert_close(found.double(), V @ weights, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_without_weight_is_not_read(store: Store, kind: str) -> None:
    """This holds even if the vectors that are read share a mask that the others do not have."""
    keys, V = put_set(store, kind)
    vectors = open_set(store, keys)
    for key in (keys[0], keys[1], keys[4]):
        store.delete(key)
    weights = torch.zeros(5, 2, dtype=torch.float64)
    weights[2, 0], weights[3, 1] = 1.0, -1.0
    found = torch.stack(list(vectors.combinations(weights)), dim=1)
    assert torch.equal(found.double(), common(kind, V)[:, 2:4] * torch.tensor([1.0, -1.0]))


def test_sums_without_any_weight_are_zero_and_read_nothing(store: Store) -> None:
    keys, V = put_set(store, "dense")
    vectors = open_set(store, keys)
    store.delete("vectors")
    found = list(vectors.combinations(torch.zeros(5, 2, dtype=torch.float64)))
    assert len(found) == 2 and all(torch.equal(f, torch.zeros(len(V))) for f in found)
    assert list(vectors.combinations(torch.zeros(5, 0, dtype=torch.float64))) == []


def signed_weights() -> Tensor:
    """Weights (5, 4) with a row of zeros, a column of zeros, and one more zero."""
    weights = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights[1], weights[:, 2], weights[3, 3] = 0.0, 0.0, 0.0
    return weights


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_has_the_coordinates_of_all(store: Store, kind: str) -> None:
    """Two of the vectors with own masks share a mask. Opened without the others they have fewer
    coordinates.
    """
    keys, V = put_set(store, kind)
    vectors = open_set(store, keys)
    chosen = vectors.subset([2, 3])
    assert [file.key for file in chosen.files] == keys[2:4] and len(vectors.files) == 5
    assert (chosen.count, chosen.mask, chosen.compact) == (
        vectors.count,
        vectors.mask,
        vectors.compact,
    )
    expected = common(kind, V)[:, 2:4].T.float()
    assert torch.equal(chosen.read_all(0, chosen.count), expected)
    assert torch.equal(vectors.subset([3]).read_all(0, chosen.count), expected[1:])
    alone = open_set(store, keys[2:4])
    assert (alone.count < chosen.count) == (kind == "per-task")


@pytest.mark.parametrize("kind", KINDS)
def test_a_set_opened_by_its_keys_is_the_same(store: Store, kind: str) -> None:
    keys, _ = put_set(store, kind)
    expected, opened = open_set(store, keys), VectorSet.open(store, keys)
    assert [file.key for file in opened.files] == keys
    assert (opened.compact, opened.count) == (expected.compact, expected.count)
    assert torch.equal(opened.read_all(0, opened.count), expected.read_all(0, expected.count))
    masks = {id(file.mask) for file in opened.files if file.mask is not None}
    assert len(masks) == {"dense": 0, "shared": 1, "per-task": 3, "mixed": 2}[kind]


def test_a_mask_that_was_made_again_is_opened_again(store: Store) -> None:
    masks, values = OpenMasks(), values_of(SHAPES, seed=1)
    first = VectorFile(store, put_vector(store, "one", values, random_mask(SHAPES, 1)), masks)
    second = VectorFile(store, put_vector(store, "two", values, random_mask(SHAPES, 1)), masks)
    assert first.mask is second.mask
    third = VectorFile(store, put_vector(store, "three", values, random_mask(SHAPES, 2)), masks)
    assert third.mask is not None and third.mask is not first.mask
    assert third.mask.fingerprint == random_mask(SHAPES, 2).fingerprint
