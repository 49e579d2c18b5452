"""The Gram matrix of vector files, compared with V'V in float64; its errors and its memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from vector_files import (
    BIG,
    DTYPES,
    KINDS,
    SHAPES,
    close_to,
    dense,
    flip,
    paths_of,
    put_set,
    put_vector,
    random_mask,
    truncate,
    values_of,
)

from raytvb.errors import VectorError
from raytvb.maths.gram_blocks import BLOCK, gram_of_blocks
from raytvb.storage.gram_files import gram_matrix
from raytvb.storage.store import Store
from raytvb.storage.vectors import vector_bytes, vector_info

MEASURE = """
import json, sys, torch
from raytvb.storage.gram_files import gram_matrix
def kilobytes(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))
before = kilobytes("VmRSS")
gram = gram_matrix(sys.argv[1:])
print(json.dumps({"grown": 1024 * (kilobytes("VmHWM") - before), "gram": gram.tolist()}))
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_the_explicit_vectors(store: Store, kind: str, dtypes: str) -> None:
    keys, V = put_set(store, kind, dtypes=DTYPES[dtypes])
    assert torch.equal(V, torch.stack([dense(store, k) for k in keys], dim=1))
    for block in (8, 40, 64, BLOCK):
        G = gram_matrix(paths_of(store, keys), block=block)
        assert G.dtype == torch.float64 and torch.equal(G, G.T)
        assert close_to(G, V.T @ V)


@pytest.mark.parametrize("kind", KINDS)
def test_vectors_of_many_blocks(store: Store, kind: str) -> None:
    keys, V = put_set(store, kind, BIG, count=9)
    for block in (BLOCK, 8 * 3001):
        G = gram_matrix(paths_of(store, keys), block=block)
        assert torch.equal(G, G.T) and close_to(G, V.T @ V)


@pytest.mark.parametrize("count", [1, 2, 63, 64, 65, 130])
def test_any_number_of_vectors(store: Store, count: int) -> None:
    """Products are taken in panels of up to 64 vectors."""
    keys, V = put_set(store, "dense", count=count)
    G = gram_matrix(paths_of(store, keys))
    assert G.shape == (count, count) and torch.equal(G, G.T) and close_to(G, V.T @ V)


def test_sums_over_many_coordinates_stay_exact() -> None:
    """Positive values: float32 alone would be off by 1e-4 here."""
    rows = torch.rand(3, 40 * BLOCK, generator=torch.Generator().manual_seed(0)) + 1
    expected = rows.double() @ rows.double().T
    found = gram_of_blocks(
        3, ((s, rows[:, s : s + 5 * BLOCK]) for s in range(0, 40 * BLOCK, 5 * BLOCK))
    )
    assert close_to(found, expected, 1e-7)


@pytest.mark.s3
@pytest.mark.parametrize(("kind", "block"), [("shared", BLOCK), ("mixed", 8 * 9001)])
def test_vectors_in_a_bucket_give_the_same_bits(
    s3_environment: str, tmp_path: Path, kind: str, block: int
) -> None:
    local, remote = Store(str(tmp_path)), Store(f"{s3_environment}/experiments/one")
    keys, V = put_set(local, kind, BIG, count=3, dtypes=DTYPES["both"])
    put_set(remote, kind, BIG, count=3, dtypes=DTYPES["both"])
    G = gram_matrix(paths_of(remote, keys), block=block)
    assert torch.equal(G, gram_matrix(paths_of(local, keys), block=block)) and close_to(G, V.T @ V)


def test_memory_is_two_buffers_whatever_the_size(tmp_path: Path) -> None:
    """20 vectors of 20 MB are 400 MB in all. Beyond the imports, memory grows by two buffers of 64
    MB, but not by a third one.
    """
    size, gram = 5_200_003, torch.zeros(20, 20, dtype=torch.float64)
    noise = torch.randn(size + 20_000, generator=torch.Generator().manual_seed(0))
    vectors = [noise[1000 * t :][:size] for t in range(20)]
    paths = [tmp_path / f"{t}.safetensors" for t in range(20)]
    for path, values in zip(paths, vectors, strict=True):
        tensors = {"a": values[:4_000_000].view(2000, 2000), "b": values[4_000_000:]}
        path.write_bytes(vector_bytes(tensors, vector_info("base")))
    for start in range(0, size, 2**18):
        part = torch.stack([v[start : start + 2**18] for v in vectors]).double()
        gram += part @ part.T
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(run.stdout)
    assert sum(p.stat().st_size for p in paths) > 400e6
    assert found["grown"] < 180e6
    assert close_to(torch.tensor(found["gram"], dtype=torch.float64), gram)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["dense", "shared", "per-task"])
def test_values_that_are_not_finite_name_file_and_tensor(
    store: Store, kind: str, bad: float
) -> None:
    keys, _ = put_set(store, kind)
    values, mask = values_of(SHAPES, seed=3), random_mask(SHAPES, seed=99)
    values["visual.b.weight"][mask.tensors()["visual.b.weight"]] = bad
    name = "shared" if kind == "shared" else "of-3"
    keys[3] = put_vector(store, "suite/task-3", values, None if kind == "dense" else mask, name)
    for block in (8, BLOCK):
        with pytest.raises(
            VectorError, match=r"task-3/vector\.safetensors has NaN or infinite values in visual\.b"
        ):
            gram_matrix(paths_of(store, keys), block=block)


@pytest.mark.parametrize("position", [0, 17 * BLOCK, 17 * BLOCK + 4])
@pytest.mark.parametrize("dtype", DTYPES["both"])
def test_one_bad_value_is_found_wherever_it_is(
    store: Store, position: int, dtype: torch.dtype
) -> None:
    """The first and the last value of a large tensor, and one in another."""
    values = {
        f"{n}": torch.zeros(s, dtype=dtype) for n, s in (("a", 17 * BLOCK + 1), ("b", 3), ("c", 2))
    }
    name, inside = ("a", position) if position <= 17 * BLOCK else ("c", position - 17 * BLOCK - 4)
    values[name][inside] = float("nan")
    keys = [
        put_vector(store, "good", values_of({n: tuple(v.shape) for n, v in values.items()}, 0)),
        put_vector(store, "bad", values),
    ]
    with pytest.raises(
        VectorError, match=rf"bad/vector\.safetensors has NaN or infinite values in {name}$"
    ):
        gram_matrix(paths_of(store, keys))


def test_many_bad_tensors_are_counted(store: Store) -> None:
    values = {n: torch.full(s, float("inf")) for n, s in SHAPES.items()}
    with pytest.raises(
        VectorError, match=r"in visual\.B, visual\.a, visual\.b\.weight and 1 more$"
    ):
        gram_matrix(paths_of(store, [put_vector(store, "bad", values)]))


@pytest.mark.parametrize("dtype", DTYPES["both"])
def test_values_whose_products_overflow_are_told_from_infinite_ones(
    store: Store, dtype: torch.dtype
) -> None:
    keys, _ = put_set(store, "dense")
    huge = {n: 1e25 * v for n, v in values_of(SHAPES, seed=8, dtype=dtype).items()}
    keys[1] = put_vector(store, "huge", huge)
    with pytest.raises(
        VectorError, match=r"huge/vector\.safetensors has values so large that their products"
    ):
        gram_matrix(paths_of(store, keys))


def test_a_vector_of_zeros_is_no_error(store: Store) -> None:
    keys, V = put_set(store, "dense", count=2)
    keys.append(put_vector(store, "zero", {n: torch.zeros(s) for n, s in SHAPES.items()}))
    G = gram_matrix(paths_of(store, keys))
    assert not G[2].any() and close_to(G[:2, :2], V.T @ V)


def test_vectors_of_different_bases_are_an_error_that_names_both(store: Store) -> None:
    keys, _ = put_set(store, "dense")
    keys.append(put_vector(store, "stranger", values_of(SHAPES, seed=7), base="base-2"))
    with pytest.raises(
        VectorError, match=r"task-0/vector.*stranger/vector.*different pretrained models"
    ):
        gram_matrix(paths_of(store, keys))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sparse", [False, True])
def test_vectors_of_different_shapes_are_an_error_that_names_both(
    store: Store, kind: str, sparse: bool
) -> None:
    keys, _ = put_set(store, kind)
    shapes = {**SHAPES, "visual.c": (2,)}
    mask = random_mask(shapes, seed=5) if sparse else None
    keys.append(put_vector(store, "stranger", values_of(shapes, seed=7), mask, "stranger"))
    with pytest.raises(
        VectorError, match=r"task-0/vector.*stranger/vector.*different names or shapes"
    ):
        gram_matrix(paths_of(store, keys))


@pytest.mark.parametrize("size", [-1, -4, -200, 300, 8, 7, 0])
@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_a_truncated_file_is_an_error_that_names_it(store: Store, kind: str, size: int) -> None:
    keys, _ = put_set(store, kind)
    truncate(store, keys[2], size)
    with pytest.raises(
        VectorError, match=r"vectors/suite/task-2/vector\.safetensors is not a whole"
    ):
        gram_matrix(paths_of(store, keys))


def test_a_missing_file_is_an_error_that_names_it(store: Store) -> None:
    keys, _ = put_set(store, "dense")
    store.delete(keys[2])
    with pytest.raises(FileNotFoundError, match=r"vectors/suite/task-2/vector\.safetensors"):
        gram_matrix(paths_of(store, keys))


def test_no_vectors_are_an_error() -> None:
    with pytest.raises(VectorError, match="no vectors"):
        gram_matrix([])


@pytest.mark.parametrize("block", [0, 4, 12, -8])
def test_a_block_is_a_multiple_of_eight(store: Store, block: int) -> None:
    keys, _ = put_set(store, "dense")
    with pytest.raises(ValueError, match="multiple of 8"):
        gram_matrix(paths_of(store, keys), block=block)


@pytest.mark.parametrize("kind", ["dense", "shared"])
def test_paths_may_be_relative_to_the_working_folder(
    store: Store, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, _ = put_set(store, kind)
    expected = gram_matrix(paths_of(store, keys))
    monkeypatch.chdir(str(store.local_path("vectors/suite/task-0")))
    found = gram_matrix(
        ["vector.safetensors", *(f"../task-{t}/vector.safetensors" for t in range(1, 5))]
    )
    assert torch.equal(found, expected)
    monkeypatch.chdir(store.url)
    assert torch.equal(gram_matrix(keys), expected)
    assert torch.equal(gram_matrix([f"file://{store.local_path(k)}" for k in keys]), expected)


def test_a_vector_far_from_its_mask_is_an_error_that_names_both(
    store: Store, tmp_path: Path
) -> None:
    keys, _ = put_set(store, "shared")
    (tmp_path / "alone.safetensors").write_bytes(store.read(keys[0]))
    with pytest.raises((VectorError, FileNotFoundError), match=r"masks/shared/mask\.safetensors"):
        gram_matrix([str(tmp_path / "alone.safetensors")])


def test_a_changed_header_is_an_error_that_names_the_file(store: Store) -> None:
    """A flipped bit of any byte is either reported, or changes nothing."""
    keys, V = put_set(store, "shared", count=2)
    data = store.read(keys[1])
    for position in range(8 + int.from_bytes(data[:8], "little")):
        flip(store, keys[1], position)
        try:
            gram = gram_matrix(paths_of(store, keys))
        except (VectorError, FileNotFoundError) as error:
            assert "task-1/vector.safetensors" in str(error) or "mask" in str(error)
        else:
            assert close_to(gram, V.T @ V)
        store.write(keys[1], data)
