"""The basis benchmark: its fields, its reference, and the form of its random Gram matrices."""

from typing import Any

import pytest
import torch

from raytvb.bench.basis import (
    KINDS,
    bench_basis,
    floor_is_reachable,
    published_fit,
    random_gram,
    true_loss,
)


def test_bench_compares_the_two_fits_on_one_gram() -> None:
    found: Any = bench_basis(
        8, 3, kind="positive", scale=1e3, seed=4, repeats=2, steps=50
    ).to_json()
    reference, ours = found["reference"], found["ours"]
    assert (found["benchmark"], found["tasks"], found["size"], found["kind"]) == (
        "basis",
        8,
        3,
        "positive",
    )
    assert found["scale"] == 1e3 and found["floor_reachable"] is True
    assert reference["steps"] == 50 and reference["algorithm"] and ours["algorithm"] == "ae"
    assert found["ratio"] == pytest.approx(reference["seconds"] / ours["seconds"])
    assert (
        found["loss_ratio"] == pytest.approx(reference["loss"] / ours["loss"])
        and found["loss_ratio"] > 1
    )
    assert ours["loss"] == pytest.approx(found["floor"]) and 1 <= ours["condition"] <= 1e4
    assert found["machine"]["threads"] == 1 and found["versions"]["torch"]
    assert "curve" not in found


def test_curve_has_a_point_for_each_number_of_tasks() -> None:
    found: Any = bench_basis(6, repeats=1, steps=5, curve=[8, 20]).to_json()
    assert found["size"] == 3
    assert [(point["tasks"], point["size"]) for point in found["curve"]] == [(8, 2), (20, 5)]
    for point in found["curve"]:
        assert point["ae"]["loss_over_floor"] == pytest.approx(1) == point["svd"]["loss_over_floor"]
        assert point["ae-anchored"]["loss_over_floor"] >= 1 - 1e-9
        assert all(point[method]["seconds"] > 0 for method in ("ae", "ae-anchored", "svd"))


def test_the_loss_of_the_published_fit_is_that_of_the_explicit_vectors() -> None:
    V = torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    B, W = published_fit(V.T @ V, 2, steps=30)
    naive = (V @ B.double() @ W.double() - V).square().sum() / V.square().sum()
    assert true_loss(V.T @ V, B, W) == pytest.approx(float(naive), rel=1e-9)
    assert B.dtype == W.dtype == torch.float32 and B.min() > 0
    torch.testing.assert_close(B.sum(0), torch.ones(2))


def test_the_published_fit_comes_near_the_floor() -> None:
    G = random_gram("clustered", 8, 0)
    floor = float(torch.linalg.eigvalsh(G)[:6].sum() / G.trace())
    assert floor <= true_loss(G, *published_fit(G, 2, steps=1500)) <= 1.1 * floor


def test_kinds_of_vectors() -> None:
    cosines = {}
    for kind in KINDS:
        G = random_gram(kind, 20, 1)
        norm = G.diag().sqrt()
        cosines[kind] = (G / torch.outer(norm, norm)).fill_diagonal_(0)
    assert cosines["orthogonal"].abs().max() < 0.3 < cosines["positive"][0, 1:].min()
    assert cosines["clustered"][0, 4] > 0.7 and abs(cosines["clustered"][0, 1]) < 0.3


def test_reachable_floors() -> None:
    assert floor_is_reachable(random_gram("positive", 8, 0), 2)
    assert not floor_is_reachable(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 2)


def test_errors_name_what_is_allowed() -> None:
    with pytest.raises(ValueError, match="unknown kind of vectors 'odd'; there are: clustered"):
        bench_basis(6, kind="odd")
    with pytest.raises(ValueError, match="from 1 to 5"):
        bench_basis(6, 6)
    with pytest.raises(ValueError, match="unknown basis method"):
        bench_basis(6, method="odd")
