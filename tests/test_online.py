"""Online bases, against references computed from the explicit vectors in float64."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.basis_registry import online_methods
from raytvb.maths.online_basis import (
    OnlineState,
    advance,
    arrivals,
    forgetting,
    relative_bounds,
    start,
    watched,
)

CONVEX = ["ae", "ae-anchored"]
BATCHES = [1, 3]


@dataclasses.dataclass
class Arrival:
    """The basis after an arrival, and the explicit vectors seen so far (D, n)."""

    S: Tensor
    V: Tensor
    state: OnlineState

    @property
    def rebuilt(self) -> Tensor:
        return self.S @ self.state.W

    @property
    def loss(self) -> float:
        return residual(self.rebuilt, self.V)


def vectors(kind: str, tasks: int, seed: int = 0) -> Tensor:
    """V (200, T): unit noise, plus a common mean, plus cluster centres, of mixed sign, or with
    uneven norms.
    """
    rng = np.random.default_rng(seed)
    noise, mean = rng.standard_normal((200, tasks)), rng.standard_normal((200, 1))
    centres = rng.standard_normal((200, 5))[:, rng.integers(5, size=tasks)]
    made = {
        "clustered": centres + noise / 2,
        "orthogonal": noise,
        "positive": noise + mean,
        "signed": noise + mean * rng.choice([-1, 1], tasks),
        "uneven": (noise + mean / 2) * np.exp(rng.standard_normal(tasks)),
    }
    return torch.from_numpy(made[kind])


def degenerate(kind: str) -> Tensor:
    """V (200, T) with fewer directions than vectors."""
    V = vectors("positive", 9)
    zero = torch.zeros(200, 1, dtype=torch.float64)
    made = {
        "all zero": zero.expand(200, 8),
        "duplicates": V[:, [0, 0, 1, 0, 1, 2, 2, 0, 3, 4]],
        "in the span": torch.cat([V[:, :4], V[:, :4] @ V[:4, :5]], 1),
        "opposites": torch.cat([V[:, :2], -V[:, :2], zero, V[:, 2:3], -V[:, 2:3], V[:, 3:5]], 1),
        "rank two": V[:, :2] @ V[:2, :9],
        "zero first": torch.cat([zero, zero, zero, zero, V[:, :5]], 1),
        "zeros between": torch.cat([V[:, :2], zero, V[:, 2:5], zero, zero, V[:, 5:]], 1),
    }
    return made[kind]


DEGENERATE = [
    "all zero",
    "duplicates",
    "in the span",
    "opposites",
    "rank two",
    "zero first",
    "zeros between",
]


def stream(method: str, size: int, V: Tensor, batch: int) -> list[Arrival]:
    """The work of the caller, who holds the long vectors: S′ = [S N] B′, one arrival after the
    other.
    """
    state, S = start(method, size), V[:, :0]
    arrivals = []
    for first in range(0, V.shape[1], batch):
        A = torch.cat([S, V[:, first : first + batch]], 1)
        B, state = advance(state, A.T @ A)
        S = A @ B
        arrivals.append(Arrival(S, V[:, : first + batch], state))
        assert S.shape[1] == len(state.W) == state.H.shape[1]
        assert 1 <= S.shape[1] <= size
        assert (
            state.W.shape[1] == len(state.H) == len(state.error) == len(state.norm) == state.tasks
        )
        for part in (B, state.W, state.H, state.error, state.norm):
            assert part.dtype == torch.float64 and part.isfinite().all()
    return arrivals


def check(arrivals: list[Arrival], batch: int) -> None:
    """Check what always holds: S = V H, the norms, and bounds that never fall. Bounds are above the
    errors, and equal to them at arrival.
    """
    scale = float(arrivals[-1].V.norm(dim=0).max())
    before = torch.zeros(0, dtype=torch.float64)
    for a in arrivals:
        true = (a.V - a.rebuilt).norm(dim=0)
        new = a.state.tasks - len(before)
        torch.testing.assert_close(a.S, a.V @ a.state.H, rtol=1e-9, atol=1e-9 * scale)
        torch.testing.assert_close(a.state.norm, a.V.norm(dim=0), rtol=1e-9, atol=1e-12)
        assert (a.state.error >= true - 1e-7 * scale).all()
        torch.testing.assert_close(a.state.error[-new:], true[-new:], rtol=1e-7, atol=1e-7 * scale)
        assert (a.state.error[: len(before)] >= before).all()
        before = a.state.error


def residual(rebuilt: Tensor, V: Tensor) -> float:
    return float((rebuilt - V).square().sum() / V.square().sum())


def condition(S: Tensor) -> float:
    """Condition number of SᵀS with the columns of S scaled to unit norm."""
    return float(torch.linalg.cond(S / S.norm(dim=0)) ** 2)


def incremental_svd(V: Tensor, size: int, batch: int) -> list[Tensor]:
    """Brand's update by dense SVDs of explicit (D, M + b) matrices: the reconstructions (D, n)
    after each arrival.
    """
    U_S, R = V[:, :0], torch.zeros(0, 0, dtype=torch.float64)
    rebuilt = []
    for first in range(0, V.shape[1], batch):
        new = V[:, first : first + batch]
        U, s, Yt = torch.linalg.svd(torch.cat([U_S, new], 1), full_matrices=False)
        U_S = (U * s)[:, :size]
        R = Yt[:size] @ torch.block_diag(R, torch.eye(new.shape[1], dtype=torch.float64))
        rebuilt.append(U_S @ R)
    return rebuilt


@pytest.mark.parametrize("method", online_methods())
@pytest.mark.parametrize("kind", ["clustered", "signed", "uneven"])
@pytest.mark.parametrize("batch", BATCHES)
def test_bounds_and_coefficients_are_those_of_the_explicit_vectors(
    method: str, kind: str, batch: int
) -> None:
    arrivals = stream(method, 5, vectors(kind, 15), batch)
    check(arrivals, batch)
    for a in arrivals[5 // batch :]:
        floor = fit_basis(a.V.T @ a.V, 5, method="svd").floor
        assert a.loss >= floor * (1 - 1e-9)


@pytest.mark.parametrize("method", online_methods())
@pytest.mark.parametrize("batch", BATCHES)
def test_as_many_vectors_as_the_size_are_kept_exactly(method: str, batch: int) -> None:
    arrivals = stream(method, 6, vectors("uneven", 6), batch)
    check(arrivals, batch)
    for a in arrivals:
        assert (a.state.error == 0).all()
        torch.testing.assert_close(a.rebuilt, a.V, rtol=0, atol=1e-11)
        kept = 0 if method == "svd" else 1
        assert torch.equal(a.S[:, kept:], a.V[:, kept:])
        if method != "svd":
            torch.testing.assert_close(a.S[:, 0], a.V.mean(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["clustered", "orthogonal", "signed", "uneven"])
@pytest.mark.parametrize(("size", "batch"), [(1, 1), (6, 1), (6, 3), (4, 7)])
def test_svd_is_incremental_svd(kind: str, size: int, batch: int) -> None:
    V = vectors(kind, 21)
    for a, rebuilt in zip(
        stream("svd", size, V, batch), incremental_svd(V, size, batch), strict=True
    ):
        torch.testing.assert_close(a.rebuilt, rebuilt, rtol=0, atol=1e-8)
        Q, U = (
            torch.linalg.qr(a.S)[0],
            torch.linalg.svd(rebuilt, full_matrices=False)[0][:, : a.S.shape[1]],
        )
        torch.testing.assert_close(Q @ (Q.T @ U), U, rtol=0, atol=1e-8)


def test_svd_of_one_batch_is_the_offline_svd() -> None:
    V = vectors("clustered", 12)
    assert stream("svd", 4, V, 12)[0].loss == pytest.approx(
        fit_basis(V.T @ V, 4, method="svd").floor, rel=1e-9
    )


@pytest.mark.parametrize("method", CONVEX)
@pytest.mark.parametrize("kind", ["clustered", "positive", "signed"])
@pytest.mark.parametrize("batch", BATCHES)
def test_basis_vectors_stay_convex_combinations_of_all_vectors(
    method: str, kind: str, batch: int
) -> None:
    for a in stream(method, 4, vectors(kind, 15), batch):
        assert (a.state.H >= 0).all()
        torch.testing.assert_close(
            a.state.H.sum(0), torch.ones(a.S.shape[1], dtype=torch.float64), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("kind", ["clustered", "positive", "signed", "uneven", *DEGENERATE])
@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("batch", BATCHES)
def test_ae_anchored_keeps_the_mean_and_decodes_the_sum_exactly(
    kind: str, size: int, batch: int
) -> None:
    V = degenerate(kind) if kind in DEGENERATE else vectors(kind, 15)
    V = V / V.norm().clamp(min=1)
    for a in stream("ae-anchored", size, V, batch):
        uniform = torch.full((a.state.tasks,), 1 / a.state.tasks, dtype=torch.float64)
        torch.testing.assert_close(a.state.H[:, 0], uniform, rtol=1e-12, atol=0)
        torch.testing.assert_close(a.S[:, 0], a.V.mean(1), rtol=0, atol=1e-12)
        torch.testing.assert_close(a.rebuilt.sum(1), a.V.sum(1), rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", online_methods())
@pytest.mark.parametrize("kind", DEGENERATE)
@pytest.mark.parametrize(("size", "batch"), [(1, 1), (1, 3), (3, 1), (3, 3), (3, 5), (5, 1)])
def test_fewer_directions_than_vectors(method: str, kind: str, size: int, batch: int) -> None:
    V = degenerate(kind)
    arrivals = stream(method, size, V, batch)
    check(arrivals, batch)
    if method != "ae-anchored" and torch.linalg.matrix_rank(V) <= size:
        torch.testing.assert_close(arrivals[-1].rebuilt, V, rtol=0, atol=1e-6 * float(V.norm()))
    if method in CONVEX:
        assert all((a.state.H >= 0).all() for a in arrivals)
    assert (relative_bounds(arrivals[-1].state)[V.norm(dim=0) == 0] == 0).all()


@pytest.mark.parametrize("method", online_methods())
def test_loss_on_clustered_vectors_comes_near_the_offline_floor(method: str) -> None:
    V = vectors("clustered", 40)
    floor = fit_basis(V.T @ V, 8, method="svd").floor
    last = stream(method, 8, V, 1)[-1]
    assert floor * (1 - 1e-9) <= last.loss <= 1.03 * floor
    assert condition(last.S) <= 1e4
    bounds = relative_bounds(last.state)
    torch.testing.assert_close(bounds * last.V.norm(dim=0), last.state.error)
    true = (last.V - last.rebuilt).norm(dim=0)
    assert (last.state.error / true).median() < 3


@pytest.mark.parametrize("kind", ["clustered", "positive"])
@pytest.mark.parametrize("batch", BATCHES)
def test_ae_is_as_good_as_incremental_svd_on_vectors_with_a_common_mean(
    kind: str, batch: int
) -> None:
    V = vectors(kind, 30)
    reference = incremental_svd(V, 6, batch)
    for a, rebuilt in zip(stream("ae", 6, V, batch), reference, strict=True):
        torch.testing.assert_close(a.rebuilt, rebuilt, rtol=0, atol=1e-7)


@pytest.mark.parametrize("method", CONVEX)
@pytest.mark.parametrize("kind", ["orthogonal", "signed", "uneven"])
@pytest.mark.parametrize("batch", BATCHES)
def test_convexity_costs_little(method: str, kind: str, batch: int) -> None:
    V = vectors(kind, 40)
    last = stream(method, 8, V, batch)[-1]
    assert last.loss <= 1.03 * residual(incremental_svd(V, 8, batch)[-1], V)
    assert condition(last.S) <= 1e5


@pytest.mark.parametrize("kind", ["clustered", "signed"])
def test_ae_anchored_of_one_batch_is_the_offline_fit(kind: str) -> None:
    V = vectors(kind, 12)
    offline = fit_basis(V.T @ V, 4, method="ae-anchored")
    assert stream("ae-anchored", 4, V, 12)[0].loss == pytest.approx(offline.loss, rel=1e-9)


@pytest.mark.parametrize("kind", ["clustered", "uneven"])
def test_ae_anchored_gives_each_refit_its_least_weighted_loss(kind: str) -> None:
    """The refit is the best of all bases of the decoded and new vectors whose span has the mean, by
    an explicit SVD.
    """
    V = vectors(kind, 20)
    arrivals = stream("ae-anchored", 5, V, 1)
    for a, after in pairwise(arrivals[5:]):
        tasks = torch.cat([a.rebuilt, after.V[:, -1:]], 1)
        mean = tasks.mean(1, keepdim=True)
        rest = tasks - mean @ (mean.T @ tasks) / mean.square().sum()
        least = torch.linalg.svdvals(rest)[4:].square().sum()
        torch.testing.assert_close((after.rebuilt - tasks).square().sum(), least, rtol=1e-9, atol=0)


@pytest.mark.parametrize("method", online_methods())
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_of_the_vectors_does_not_matter(method: str, scale: float) -> None:
    V = vectors("clustered", 9)
    plain, scaled = stream(method, 3, V, 3)[-1], stream(method, 3, V * scale, 3)[-1]
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-5)
    torch.testing.assert_close(
        relative_bounds(scaled.state), relative_bounds(plain.state), rtol=1e-3, atol=0
    )


@pytest.mark.parametrize(
    ("count", "buffer", "looks"),
    [
        (3, 1, [1, 2, 3]),
        (5, 2, [2, 4, 5]),
        (1, 4, [1]),
        (6, 6, [6]),
        (32, 1, list(range(2, 33, 2))),
        (64, 2, list(range(4, 65, 4))),
    ],
)
def test_looks_are_after_arrivals(count: int, buffer: int, looks: list[int]) -> None:
    assert arrivals(count, buffer) == looks
    assert watched(5) == [0, 1, 2, 3, 4] and len(watched(100)) == 16 and watched(100)[-1] == 99
    many = arrivals(1001, 3)
    assert len(many) == 16 and many[-1] == 1001 and all(n % 3 == 0 for n in many[:-1])


@pytest.mark.parametrize("method", online_methods())
def test_same_stream_same_basis(method: str) -> None:
    V = vectors("signed", 9)
    first, again = stream(method, 3, V, 1)[-1], stream(method, 3, V.clone(), 1)[-1]
    assert torch.equal(first.S, again.S)
    for name in ("W", "H", "error", "norm"):
        assert torch.equal(getattr(first.state, name), getattr(again.state, name))


def test_a_state_is_frozen_and_inputs_are_left_alone() -> None:
    V = vectors("positive", 6)
    gram = V.T @ V
    before = gram.clone()
    state = start("ae", 2)
    advance(state, gram)
    assert torch.equal(gram, before) and state.tasks == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.size = 3  # type: ignore[misc]


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"'kmeans' has no online form.* ae, ae-anchored, svd"):
        start("kmeans", 3)
    with pytest.raises(ValueError, match="at least 1"):
        start("svd", 0)
    state = start("svd", 3)
    for shape in ((3, 2), (3,), (0, 0)):
        with pytest.raises(ValueError, match="square"):
            advance(state, torch.ones(shape))
    _, state = advance(state, torch.eye(2))
    with pytest.raises(ValueError, match="2 basis vectors and at least one new"):
        advance(state, torch.eye(2))
    with pytest.raises(ValueError, match="not symmetric"):
        advance(state, torch.eye(3) + torch.ones(3, 3).triu())
    with pytest.raises(ValueError, match="not positive semi-definite"):
        advance(state, torch.eye(3) - 1)
    with pytest.raises(ValueError, match="1 entries that are not finite"):
        advance(state, torch.diag(torch.tensor([1.0, 1.0, math.nan])))


def test_forgetting_is_the_fall_from_the_best_earlier_accuracy() -> None:
    nan = math.nan
    accuracy = torch.tensor([[0.9, nan, nan, nan], [0.8, 0.5, nan, nan], [0.7, 0.6, 0.4, nan]])
    torch.testing.assert_close(
        forgetting(accuracy), torch.tensor([0.2, -0.1, 0.0, nan]), equal_nan=True
    )
    torch.testing.assert_close(
        forgetting(accuracy[:1]), torch.tensor([0.0, nan, nan, nan]), equal_nan=True
    )
