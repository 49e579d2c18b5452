"""Merge methods on stored vectors, against the methods on whole tensors in memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from vector_files import SHAPES, open_set, put_set, random_mask

from raytvb.maths.merge_registry import MERGE_METHODS, compared_merges, stored_merges
from raytvb.search.merged_vectors import method_direction
from raytvb.storage.basis_writer import write_combinations
from raytvb.storage.store import Store
from raytvb.storage.stored_basis import StoredBasis

COUNT = 4
TOLERANCE = {"tsv-m": 1e-4, "iso-c": 1e-4}  # SVDs in float32


def reference(W: Tensor, method: str, bits: Tensor | None, seed: int = 0) -> Tensor:
    """The merged vector (D,) of a method on whole vectors W (D, n) float64; `bits` (D,) are those
    of a mask.
    """
    seen = W if bits is None or MERGE_METHODS[method].matrices else W[bits]
    options: dict[str, Any] = {"dare": {"generator": torch.Generator().manual_seed(seed)}}.get(
        method, {}
    )
    if method == "ties":
        sizes = seen.T.float().abs().sort(dim=1, descending=True).values
        options = {"thresholds": sizes[:, round(0.2 * len(seen)) - 1]}
    out, first = torch.zeros(len(W)), 0
    for _, shape in sorted(SHAPES.items()):
        last = first + torch.Size(shape).numel()
        rows = W[first:last].T.float()
        kept = torch.ones(last - first, dtype=torch.bool) if bits is None else bits[first:last]
        if bits is None or MERGE_METHODS[method].matrices:
            out[first:last] = MERGE_METHODS[method](rows.view(-1, *shape), **options).reshape(-1)
        else:
            out[first:last][kept] = MERGE_METHODS[method](rows[:, kept], **options)
        first = last
    return out


def mixing(count: int) -> Tensor:
    """Task vectors as mixes (COUNT, count) of all stored vectors."""
    return torch.randn(
        COUNT, count, dtype=torch.float64, generator=torch.Generator().manual_seed(count)
    )


def agree(found: Tensor, expected: Tensor, method: str) -> None:
    tolerance = TOLERANCE.get(method, 1e-6)
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
    )


@pytest.mark.parametrize("kind", ["dense", "shared", "per-task", "mixed"])
@pytest.mark.parametrize("method", stored_merges())
@pytest.mark.parametrize("count", [1, 4])
def test_every_method_is_that_of_whole_tensors(
    tmp_path: Path, kind: str, method: str, count: int
) -> None:
    keys, V = put_set(Store(str(tmp_path)), kind, count=COUNT)
    vectors, bits = (
        open_set(Store(str(tmp_path)), keys),
        random_mask(SHAPES, 99).bits if kind == "shared" else None,
    )
    found = method_direction(vectors, mixing(count), method)
    expected = reference(V @ mixing(count), method, bits)
    assert found.dtype == torch.float32
    if bits is not None and not MERGE_METHODS[method].matrices:
        assert len(found) == vectors.count
        expected = expected[bits]
    agree(found, expected, method)
    if bits is not None and MERGE_METHODS[method].matrices:
        assert found[~bits].any()


@pytest.mark.parametrize("method", ["mean", "ties", "dare", "breadcrumbs", "consensus"])
def test_zeros_of_sparse_vectors_stay_zeros(tmp_path: Path, method: str) -> None:
    """Vectors with their own masks, where no mask keeps an entry."""
    keys, V = put_set(Store(str(tmp_path)), "per-task", count=COUNT)
    found = method_direction(
        open_set(Store(str(tmp_path)), keys), torch.eye(COUNT).double(), method
    )
    assert not found[~V.any(dim=1)].any() and found.any()


@pytest.mark.parametrize("kind", ["shared", "per-task"])
@pytest.mark.parametrize("method", stored_merges())
def test_vectors_without_weight_are_not_read(tmp_path: Path, kind: str, method: str) -> None:
    """The remaining vectors keep their coordinates, even if they share more entries than all
    vectors do.
    """
    store = Store(str(tmp_path))
    keys, V = put_set(store, kind, count=COUNT)
    vectors, bits = (
        open_set(store, keys),
        random_mask(SHAPES, 99).bits if kind == "shared" else None,
    )
    for key in keys[2:]:
        store.delete(key)
    found = method_direction(vectors, torch.eye(COUNT).double()[:, :2] * 0.5, method)
    expected = reference(V[:, :2] * 0.5, method, bits)
    agree(
        found,
        expected if bits is None or MERGE_METHODS[method].matrices else expected[bits],
        method,
    )


@pytest.mark.parametrize("method", stored_merges())
def test_vectors_that_a_basis_gives_back(tmp_path: Path, method: str) -> None:
    store = Store(str(tmp_path))
    keys, V = put_set(store, "shared", count=COUNT)
    B, W = mixing(2), mixing(3)[:2]
    write_combinations([store.where(k) for k in keys], {"basis": B}, str(tmp_path / "out"))
    basis, bits = StoredBasis(str(tmp_path / "out"), "basis"), random_mask(SHAPES, 99).bits
    expected = reference(V @ B @ W, method, bits)
    agree(
        method_direction(basis, W, method),
        expected if MERGE_METHODS[method].matrices else expected[bits],
        method,
    )


def test_draws_are_those_of_the_seed(tmp_path: Path) -> None:
    keys, V = put_set(Store(str(tmp_path)), "dense", count=COUNT)
    vectors, tasks = open_set(Store(str(tmp_path)), keys), torch.eye(COUNT).double()
    first, again, other = (method_direction(vectors, tasks, "dare", seed) for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)
    agree(other, reference(V, "dare", None, seed=4), "dare")
    assert torch.equal(
        method_direction(vectors, tasks, "dare"), method_direction(vectors, tasks, "dare", 0)
    )


def test_vectors_of_zeros_merge_to_zeros(tmp_path: Path) -> None:
    keys, _ = put_set(Store(str(tmp_path)), "shared", count=COUNT)
    vectors = open_set(Store(str(tmp_path)), keys)
    for method in stored_merges():
        assert not method_direction(vectors, torch.zeros(COUNT, 3).double(), method).any()


def test_the_names_of_the_methods_are_the_same_everywhere() -> None:
    assert set(stored_merges()) == {"sum", *compared_merges()} == MERGE_METHODS.keys() - {"fisher"}


def test_a_method_that_needs_fishers_is_refused(tmp_path: Path) -> None:
    keys, _ = put_set(Store(str(tmp_path)), "dense", count=COUNT)
    vectors = open_set(Store(str(tmp_path)), keys)
    with pytest.raises(ValueError, match="'fisher' needs the Fisher information"):
        method_direction(vectors, torch.eye(COUNT).double(), "fisher")
    with pytest.raises(ValueError, match=r"unknown merge method 'soup'; there are: .*ties"):
        method_direction(vectors, torch.eye(COUNT).double(), "soup")
