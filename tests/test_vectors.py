"""Vector and mask files: format, random access, and sums over them against plain dense float64 arithmetic."""

import hashlib
import itertools
import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from raytvb.store import Store, StoreError
from raytvb.vectors import (
    BLOCK,
    Mask,
    MaskFile,
    VectorError,
    VectorFile,
    VectorSet,
    _header_bytes,
    gram_matrix,
    gram_row,
    mask_intersections,
    vector_bytes,
    vector_info,
    write_combinations,
)

SHAPES = {"visual.b.weight": (7, 19), "visual.a": (3, 2, 5), "visual.c": (1,), "visual.B": (41,)}
BIG = {"visual.weight": (300, 701), "visual.bias": (13,)}  # more than three blocks of the mask's counts
KINDS = ("dense", "shared", "per-task", "mixed")


def values_of(shapes: dict[str, tuple[int, ...]], seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}


def random_mask(shapes: dict[str, tuple[int, ...]], seed: int, density: float = 0.3) -> Mask:
    """Keeps nothing of the first two tensors by name where there are more than two."""
    generator = torch.Generator().manual_seed(seed)
    mask = {n: torch.rand(s, generator=generator) < density for n, s in shapes.items()}
    for name in sorted(shapes)[:2] if len(shapes) > 2 else ():
        mask[name][:] = False
    return Mask.of(mask)


def put_mask(store: Store, name: str, mask: Mask) -> str:
    key = f"masks/{name}/mask.safetensors"
    store.write(key, mask.to_bytes())
    return key


def put_vector(store: Store, task: str, values: dict[str, Tensor], mask: Mask | None = None, mask_name: str = "shared",
               base: str = "base-1") -> str:
    """Store `values`, sparse where there is a mask; the key."""
    key = f"vectors/{task}/vector.safetensors"
    if mask is None:
        store.write(key, vector_bytes(values, vector_info(base)))
        return key
    up = "../" * (task.count("/") + 2)
    info = vector_info(base, mask_path=f"{up}{put_mask(store, mask_name, mask)}", mask=mask.fingerprint)
    kept = mask.tensors()
    store.write(key, vector_bytes({n: v[kept[n]] for n, v in values.items()}, info))
    return key


def flat(values: dict[str, Tensor], mask: Mask | None = None) -> Tensor:
    """The dense vector (D,) float64 that a file of these values stands for."""
    whole = torch.cat([values[n].reshape(-1) for n in sorted(values)]).double()
    return whole if mask is None else whole * mask.bits


def put_set(store: Store, kind: str, shapes: dict[str, tuple[int, ...]] = SHAPES, count: int = 5,
            dtype: torch.dtype = torch.float32) -> tuple[list[str], Tensor]:
    """Store `count` vectors of a kind: their keys, and V (D, count) float64."""
    keys, columns = [], []
    for t in range(count):
        values = values_of(shapes, seed=t, dtype=dtype)
        sparse = kind in ("shared", "per-task") or (kind == "mixed" and t % 2 == 1)
        mask = random_mask(shapes, seed=99 if kind == "shared" else 100 + t // 2) if sparse else None
        name = "shared" if kind == "shared" else f"own-{t // 2}"
        keys.append(put_vector(store, f"suite/task-{t}", values, mask, name))
        columns.append(flat(values, mask))
    return keys, torch.stack(columns, dim=1)


def open_set(store: Store, keys: list[str]) -> VectorSet:
    return VectorSet([VectorFile(store, k) for k in keys])


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_a_vector_file_is_an_ordinary_safetensors_file(store: Store, sparse: bool, dtype: torch.dtype) -> None:
    values, mask = values_of(SHAPES, seed=1, dtype=dtype), random_mask(SHAPES, seed=2) if sparse else None
    key = put_vector(store, "glyphs/one", values, mask)
    path = store.local_path(key)
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
    made = {vector_bytes(dict(order), dict(reversed(info.items()))) for order in itertools.permutations(values.items())}
    assert made == {vector_bytes(values, info)}
    assert vector_bytes(values_of(SHAPES, seed=2), info) not in made


def test_a_vector_file_has_one_dtype() -> None:
    with pytest.raises(ValueError, match="one dtype"):
        vector_bytes({"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.bfloat16)}, {})


@pytest.mark.parametrize("shapes", [SHAPES, {"a": (0,), "b": (3,), "c": (0,)}, {"x/ü\"\\": (2, 2), "x/z": ()}])
def test_the_streamed_header_is_byte_for_byte_what_safetensors_writes(shapes: dict[str, tuple[int, ...]]) -> None:
    values, info = values_of(shapes, seed=3), vector_info("bäse", mask_path="../m", mask="f")
    data = b"".join(values[n].numpy().tobytes() for n in sorted(values))
    assert _header_bytes(shapes, info) + data == vector_bytes(values, info)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
def test_any_range_of_values_can_be_read(store: Store, sparse: bool, dtype: torch.dtype) -> None:
    values, mask = values_of(SHAPES, seed=1, dtype=dtype), random_mask(SHAPES, seed=2) if sparse else None
    file = VectorFile(store, put_vector(store, "one", values, mask))
    expected = torch.cat([values[n].reshape(-1) for n in sorted(values)]).float()
    expected = expected if mask is None else expected[mask.bits]
    assert file.stored == len(expected)
    rng = np.random.default_rng(0)
    for start, stop in [(0, file.stored), (0, 0), (file.stored, file.stored),
                        *np.sort(rng.integers(0, file.stored + 1, (30, 2))).tolist()]:
        found = file.values(start, stop)
        assert found.dtype == torch.float32 and torch.equal(found, expected[start:stop])


def test_reading_past_the_end_is_an_error(store: Store) -> None:
    file = VectorFile(store, put_vector(store, "one", values_of(SHAPES, seed=1)))
    with pytest.raises((StoreError, VectorError), match="vectors/one"):
        file.values(file.stored - 1, file.stored + 1)


def test_a_mask_comes_back_whole_and_from_the_middle(store: Store) -> None:
    mask = random_mask(BIG, seed=4, density=0.1)
    total = 300 * 701 + 13
    file = MaskFile(store, put_mask(store, "big", mask))
    assert total > 3 * BLOCK and file.total == total and file.kept == mask.kept == int(mask.bits.sum())
    assert torch.equal(file.load().bits, mask.bits)
    rng = np.random.default_rng(0)
    starts = [0, 8, BLOCK - 8, BLOCK, BLOCK + 8, 3 * BLOCK, total - total % 8, *(8 * rng.integers(0, total // 8, 25))]
    for start in map(int, starts):
        assert file.kept_before(start) == int(mask.bits[:start].sum())
        for stop in (start, min(start + 1, total), min(start + 70_001, total), total):
            found = file.bits(start, stop)
            assert found.dtype == torch.bool and torch.equal(found, mask.bits[start:stop])


def test_a_mask_knows_its_tensors_and_its_fingerprint(store: Store) -> None:
    mask = random_mask(SHAPES, seed=4)
    file = MaskFile(store, put_mask(store, "one", mask))
    loaded = file.load()
    assert list(loaded.shapes) == sorted(SHAPES) and loaded.shapes == SHAPES and torch.equal(loaded.bits, mask.bits)
    assert torch.equal(torch.cat([t.reshape(-1) for t in mask.tensors().values()]), mask.bits)
    assert all(torch.equal(t, loaded.tensors()[n]) and t.shape == SHAPES[n] for n, t in mask.tensors().items())
    assert file.fingerprint == loaded.fingerprint == mask.fingerprint == random_mask(SHAPES, seed=4).fingerprint
    other = Mask(mask.shapes, mask.bits.clone())
    other.bits[0] = ~other.bits[0]
    renamed = Mask({n + "x": s for n, s in mask.shapes.items()}, mask.bits)
    assert len({mask.fingerprint, other.fingerprint, renamed.fingerprint}) == 3


def test_a_damaged_mask_is_not_loaded(store: Store) -> None:
    mask = random_mask(SHAPES, seed=4)
    data = bytearray(mask.to_bytes())
    data[-1] ^= 1  # the bits are the last tensor of the file
    store.write("mask.safetensors", bytes(data))
    with pytest.raises(VectorError, match="damaged"):
        MaskFile(store, "mask.safetensors").load()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_matrix_is_that_of_the_explicit_vectors(store: Store, kind: str, dtype: torch.dtype) -> None:
    keys, V = put_set(store, kind, dtype=dtype)
    paths = [str(store.local_path(k)) for k in keys]
    expected = V.T @ V
    for block in (8, 40, 64, BLOCK):
        G = gram_matrix(paths, block=block)
        assert G.dtype == torch.float64 and torch.equal(G, G.T)
        torch.testing.assert_close(G, expected, rtol=0, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_gram_matrix_of_vectors_of_many_blocks(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind, BIG, count=3)
    expected = V.T @ V
    for block in (BLOCK, 8 * 3001):
        G = gram_matrix([str(store.local_path(k)) for k in keys], block=block)
        torch.testing.assert_close(G, expected, rtol=0, atol=1e-5 * float(expected.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gram_rows_make_the_same_matrix_bit_for_bit_in_any_order(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind)
    expected, reference = V.T @ V, torch.zeros(0)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 1, 3], [3, 4, 1, 0, 2]):
        G = torch.full((5, 5), torch.nan, dtype=torch.float64)
        vectors = open_set(store, [keys[t] for t in order])  # in the order of arrival
        for position, task in enumerate(order):
            row = gram_row(vectors, position, range(position + 1), block=64)
            for other, value in zip(order[:position + 1], row, strict=True):
                G[task, other] = G[other, task] = value
        torch.testing.assert_close(G, expected, rtol=1e-12, atol=1e-12 * float(expected.max()))
        reference = reference if len(reference) else G
        assert torch.equal(G, reference)


def test_a_single_vector_has_its_squared_norm(store: Store) -> None:
    keys, V = put_set(store, "shared", count=1)
    assert gram_matrix([str(store.local_path(keys[0]))]).item() == pytest.approx(float(V.square().sum()), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_common_coordinates_are_the_kept_ones_only_where_all_share_a_mask(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind)
    vectors = open_set(store, keys)
    assert vectors.compact == (kind in ("dense", "shared"))
    assert vectors.count == (random_mask(SHAPES, 99).kept if kind == "shared" else len(V))
    assert vectors.parameters == SHAPES and list(vectors.parameters) == sorted(SHAPES)
    for block in (8, 24, BLOCK):
        ranges = list(vectors.ranges(block))
        assert ranges[0][0] == 0 and ranges[-1][1] == vectors.count
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges)) and all(b - a <= block for a, b in ranges)
    for block in (0, 4, 12, -8):
        with pytest.raises(ValueError, match="multiple of 8"):
            vectors.ranges(block)


def dense(store: Store, key: str) -> Tensor:
    """A stored vector (D,) in float64, read with safetensors and nothing of the module's own readers."""
    with safe_open(store.local_path(key), "pt") as file:
        info = json.loads(file.metadata()["raytvb"])
        values = torch.cat([file.get_tensor(n).reshape(-1) for n in sorted(file.keys())]).double()
    if info["kind"] == "dense":
        return values
    path = os.path.normpath(os.path.join(os.path.dirname(store.local_path(key)), info["mask"]))
    packed = load_file(path)["bits"].numpy()
    out = torch.zeros(sum(int(np.prod(s)) for s in SHAPES.values()), dtype=torch.float64)
    out[torch.from_numpy(np.unpackbits(packed, count=len(out), bitorder="little").astype(bool))] = values
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_combinations_are_the_dense_products(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind)
    vectors = open_set(store, keys)
    weights = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    outputs = [f"basis/ae-m3/basis-{m}.safetensors" for m in range(3)]
    for block in (40, BLOCK):
        infos = write_combinations(vectors, [(weights, outputs)], store, block)
        assert list(infos) == outputs
        for m, key in enumerate(outputs):
            data = store.read(key)
            assert infos[key].size == len(data) and infos[key].sha256 == hashlib.sha256(data).hexdigest()
            torch.testing.assert_close(dense(store, key), V @ weights[:, m], rtol=1e-5, atol=1e-5)
            made = VectorFile(store, key)  # it can be used as any other vector
            assert made.info["base"] == "base-1"
            assert made.info["kind"] == ("sparse" if kind == "shared" else "dense")
            assert kind != "shared" or made.info["mask"] == "../../masks/shared/mask.safetensors"
        gram = gram_matrix([str(store.local_path(k)) for k in outputs])
        S = V @ weights
        torch.testing.assert_close(gram, S.T @ S, rtol=0, atol=1e-5 * float((S.T @ S).max()))


@pytest.mark.parametrize("kind", ["dense", "shared", "per-task"])
def test_the_bits_of_a_combination_do_not_depend_on_the_others_in_the_pass(store: Store, kind: str) -> None:
    keys, _ = put_set(store, kind, BIG, count=4)
    vectors = open_set(store, keys)
    generator = torch.Generator().manual_seed(0)
    outputs = [(torch.randn(4, m, dtype=torch.float64, generator=generator), [f"basis/m{m}/{i}" for i in range(m)])
               for m in (1, 2, 3, 4)]
    together = write_combinations(vectors, outputs, store)
    for weights, group in outputs:
        for key, info in write_combinations(vectors, [(weights, group)], store).items():
            assert info == together[key]
    assert write_combinations(vectors, outputs[::-1], store) == together


def test_a_failed_pass_leaves_no_outputs(store: Store) -> None:
    keys, _ = put_set(store, "dense")
    vectors = open_set(store, keys)
    path = Path(str(store.local_path(keys[-1])))
    path.write_bytes(path.read_bytes()[:-4])  # after it was opened
    with pytest.raises((StoreError, VectorError), match="task-4"):
        write_combinations(vectors, [(torch.ones(5, 1, dtype=torch.float64), ["basis/one"])], store)
    assert store.keys("basis") == []


@pytest.mark.parametrize("kind", KINDS)
def test_combine_is_the_weighted_sum_on_the_common_coordinates(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind)
    vectors = open_set(store, keys)
    expected = V[random_mask(SHAPES, 99).bits] if kind == "shared" else V
    weights = torch.tensor([0.5, 0.0, -2.0, 1.0, 0.25], dtype=torch.float64)
    for block in (8, BLOCK):
        found = vectors.combine(weights, block)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected @ weights, rtol=1e-5, atol=1e-5)


def test_a_vector_without_weight_is_not_read(store: Store) -> None:
    keys, V = put_set(store, "dense")
    vectors = open_set(store, keys)
    store.delete(keys[1])
    found = vectors.combine(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert torch.equal(found.double(), V[:, 0])


@pytest.mark.parametrize("cut", [1, 4, 200, 100_000])
@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_a_truncated_file_is_an_error_that_names_it(store: Store, kind: str, cut: int) -> None:
    keys, _ = put_set(store, kind)
    path = Path(str(store.local_path(keys[2])))
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises((VectorError, StoreError), match=r"vectors/suite/task-2/vector\.safetensors"):
        gram_matrix([str(store.local_path(k)) for k in keys])


def test_a_truncated_mask_is_an_error_that_names_it(store: Store) -> None:
    keys, _ = put_set(store, "shared")
    path = Path(str(store.local_path("masks/shared/mask.safetensors")))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VectorError, match=r"masks/shared/mask\.safetensors is not a whole"):
        VectorFile(store, keys[0])


@pytest.mark.parametrize("data", [struct.pack("<Q", 2**60) + b"{}", struct.pack("<Q", 2) + b"[]", b"not a vector file",
                                  save({"a": torch.zeros(3)}), save({"a": torch.zeros(3)}, metadata={"raytvb": "no"})])
def test_a_file_that_is_no_vector_file_is_an_error_that_names_it(store: Store, data: bytes) -> None:
    store.write("x/vector.safetensors", data)
    with pytest.raises(VectorError, match=r"x/vector\.safetensors is not a whole"):
        VectorFile(store, "x/vector.safetensors")


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)])
def test_other_dtypes_are_an_error(store: Store, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    tensors = {"a": torch.zeros(2, dtype=dtypes[0]), "b": torch.zeros(2, dtype=dtypes[1])}
    store.write("vector.safetensors", save(tensors, metadata={"raytvb": json.dumps(vector_info("base"))}))
    with pytest.raises(VectorError, match="F32 or BF16"):
        VectorFile(store, "vector.safetensors")


def test_vectors_of_different_bases_are_an_error_that_names_both(store: Store) -> None:
    keys, _ = put_set(store, "dense")
    keys.append(put_vector(store, "stranger", values_of(SHAPES, seed=7), base="base-2"))
    with pytest.raises(VectorError, match=r"task-0/vector.*stranger/vector.*different pretrained models"):
        gram_matrix([str(store.local_path(k)) for k in keys])


@pytest.mark.parametrize("sparse", [False, True])
def test_vectors_of_different_parameters_are_an_error_that_names_both(store: Store, sparse: bool) -> None:
    keys, _ = put_set(store, "dense")
    shapes = {**SHAPES, "visual.c": (2,)}
    mask = random_mask(shapes, seed=5) if sparse else None
    keys.append(put_vector(store, "stranger", values_of(shapes, seed=7), mask))
    with pytest.raises(VectorError, match=r"task-0/vector.*stranger/vector.*different names or shapes"):
        open_set(store, keys)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["dense", "shared", "per-task"])
def test_values_that_are_not_finite_are_an_error_that_names_the_file(store: Store, kind: str, bad: float) -> None:
    keys, _ = put_set(store, kind)
    values, mask = values_of(SHAPES, seed=3), random_mask(SHAPES, seed=99)
    values["visual.b.weight"][mask.tensors()["visual.b.weight"]] = bad
    name = "shared" if kind == "shared" else "of-3"
    keys[3] = put_vector(store, "suite/task-3", values, None if kind == "dense" else mask, name)
    with pytest.raises(VectorError, match=r"task-3/vector\.safetensors has NaN or infinite"):
        gram_matrix([str(store.local_path(k)) for k in keys])
    with pytest.raises(VectorError, match=r"task-3/vector\.safetensors has NaN or infinite"):
        gram_row(open_set(store, keys), 3, range(5))


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


def test_no_vectors_are_an_error() -> None:
    with pytest.raises(VectorError, match="no vectors"):
        VectorSet([])


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_paths_may_be_relative_to_the_working_folder(store: Store, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys, _ = put_set(store, kind)
    expected = gram_matrix([str(store.local_path(k)) for k in keys])
    monkeypatch.chdir(str(store.local_path("vectors/suite/task-0")))
    found = gram_matrix(["vector.safetensors", *(f"../task-{t}/vector.safetensors" for t in range(1, 5))])
    assert torch.equal(found, expected)
    monkeypatch.chdir(store.url)
    assert torch.equal(gram_matrix(keys), expected)
    assert torch.equal(gram_matrix([f"file://{store.local_path(k)}" for k in keys]), expected)


def test_intersections_of_masks_are_counted_over_the_whole_length(tmp_path: Path) -> None:
    """Over the ends of a block of 65,536 and of the 16 that are read together."""
    store, total = Store(str(tmp_path)), 16 * 65536 + 70_003
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(total, generator=generator) < d for d in (0.1, 0.1, 0.9, 0.5)]
    for number, bits in enumerate(masks):
        store.write(f"{number}.safetensors", Mask({"a": (total,)}, bits).to_bytes())
    found = mask_intersections([MaskFile(store, f"{n}.safetensors") for n in range(4)])
    assert found.tolist() == [[int((a & b).sum()) for b in masks] for a in masks]
    store.write("other.safetensors", Mask({"a": (9,)}, torch.ones(9, dtype=torch.bool)).to_bytes())
    with pytest.raises(VectorError, match="different numbers of parameters"):
        mask_intersections([MaskFile(store, "0.safetensors"), MaskFile(store, "other.safetensors")])
