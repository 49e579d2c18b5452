"""Bases from Gram matrices, against references computed from explicit vectors in float64."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog, minimize
from scipy.special import softmax

from raytvb.maths.basis_fit import BasisFit, best_weights, fit_bases, fit_basis, relative_loss
from raytvb.maths.basis_registry import BASIS_METHODS, convex_methods

FAST = sorted(set(BASIS_METHODS) - {"ae-adam"})
CONVEX = convex_methods()
DETERMINISTIC = ["ae", "ae-anchored", "greedy", "pca", "svd"]


def vectors(kind: str, tasks: int, seed: int = 0, strength: float = 1.0) -> torch.Tensor:
    """V (20 T, T): unit noise, plus a common mean, plus cluster centres, or with norms spread over
    two decades.
    """
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((20 * tasks, tasks))
    mean = strength * rng.standard_normal((20 * tasks, 1))
    clusters = max(2, tasks // 5)
    centres = rng.standard_normal((20 * tasks, clusters))[:, np.arange(tasks) % clusters]
    made = {
        "orthogonal": noise,
        "positive": noise + mean,
        "clustered": centres + noise / 2,
        "signed": noise + mean * rng.choice([-1, 1], tasks),
        "uneven": (noise + mean / 2) * np.exp(rng.standard_normal(tasks)),
    }
    return torch.from_numpy(made[kind])


def gram(kind: str, tasks: int, seed: int = 0, strength: float = 1.0) -> torch.Tensor:
    V = vectors(kind, tasks, seed, strength)
    return V.T @ V


def square_root(Q: torch.Tensor) -> torch.Tensor:
    values, U = torch.linalg.eigh(Q)
    root: torch.Tensor = (U * values.clamp(min=0).sqrt()) @ U.T
    return root


def quietly(G: torch.Tensor, size: int, method: str) -> BasisFit:
    fit = fit_basis(G, size, method=method)
    assert fit.method == method and fit.B.dtype == fit.W.dtype == torch.float64
    assert fit.B.isfinite().all() and fit.W.isfinite().all() and math.isfinite(fit.loss)
    return fit


def trailing(G: torch.Tensor, size: int) -> float:
    values = np.linalg.eigvalsh(G.numpy())[::-1]
    return float(values[size:].sum() / np.trace(G.numpy()))


def anchored_floor(G: torch.Tensor, size: int) -> float:
    rest = G - torch.outer(G.sum(0), G.sum(0)) / G.sum()
    return float(torch.linalg.eigvalsh(rest).flip(0)[size - 1 :].sum() / G.trace())


def floor_is_reachable(G: torch.Tensor, size: int) -> bool:
    """Whether the top eigenspace holds a strictly positive vector: max s with U a >= s, sum(U a) =
    1.
    """
    U = np.linalg.eigh(G.numpy())[1][:, -size:]
    bounds = np.hstack([-U, np.ones((len(U), 1))])
    total = np.append(U.sum(0), 0)[None]
    cost = np.append(np.zeros(size), -1)
    found = linprog(
        cost, A_ub=bounds, b_ub=np.zeros(len(U)), A_eq=total, b_eq=[1], bounds=(None, None)
    )
    return bool(found.status == 0 and found.x[-1] > 1e-9)


def best_softmax_loss(G: torch.Tensor, size: int, restarts: int = 8) -> float:
    """Plain L-BFGS on the logits of B from several random starts, W eliminated by the normal
    equations.
    """
    scaled = (G / G.trace()).numpy()

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        B = softmax(x.reshape(len(scaled), size), 0)
        W = np.linalg.solve(B.T @ scaled @ B + 1e-14 * np.eye(size), B.T @ scaled)
        error = scaled @ (B @ W - np.eye(len(scaled)))
        grad = 2 * error @ W.T
        loss = np.trace((B @ W - np.eye(len(scaled))).T @ error)
        return loss, (B * (grad - (grad * B).sum(0))).ravel()

    starts = [
        2 * np.random.default_rng(seed).standard_normal(len(scaled) * size)
        for seed in range(restarts)
    ]
    options = {"maxiter": 500, "ftol": 1e-12}
    losses: list[float] = [
        minimize(objective, x, jac=True, method="L-BFGS-B", options=options).fun for x in starts
    ]
    return min(losses)


@pytest.mark.parametrize("method", list(BASIS_METHODS))
def test_loss_is_the_loss_of_the_explicit_vectors(method: str) -> None:
    for kind in ("clustered", "uneven")[: 2 if method in FAST else 1]:
        V = vectors(kind, 9)
        fit = quietly(V.T @ V, 4, method)
        naive = (V @ fit.B @ fit.W - V).square().sum() / V.square().sum()
        assert fit.B.shape == (9, 4) and fit.W.shape == (4, 9) and fit.size == 4
        assert fit.loss == pytest.approx(float(naive), rel=1e-9)
        assert fit.floor == pytest.approx(trailing(V.T @ V, 4), rel=1e-9)
        assert fit.loss >= fit.floor * (1 - 1e-9)
        assert fit.seconds > 0


@pytest.mark.parametrize("method", sorted(set(BASIS_METHODS) - {"ae-adam", "pca"}))
def test_weights_are_least_squares(method: str) -> None:
    V = vectors("positive", 9)
    fit = quietly(V.T @ V, 4, method)
    reference = np.linalg.lstsq((V @ fit.B).numpy(), V.numpy(), rcond=None)[0]
    np.testing.assert_allclose(fit.W.numpy(), reference, atol=1e-9)
    np.testing.assert_allclose(best_weights(V.T @ V, fit.B).numpy(), reference, atol=1e-9)
    assert relative_loss(V.T @ V, fit.B, fit.W) == pytest.approx(fit.loss, rel=1e-9)


def test_condition_is_that_of_the_unit_basis_vectors() -> None:
    V = vectors("positive", 9)
    for method in FAST:
        fit = quietly(V.T @ V, 4, method)
        S = V @ fit.B
        cosines = (S / S.norm(dim=0)).T @ (S / S.norm(dim=0))
        assert fit.condition == pytest.approx(float(torch.linalg.cond(cosines)), rel=1e-6)


def test_svd_reaches_the_floor() -> None:
    for kind in ("clustered", "orthogonal", "signed", "uneven"):
        fit = quietly(gram(kind, 20), 7, "svd")
        assert fit.loss == pytest.approx(fit.floor, rel=1e-10)
        assert not fit.convex


def test_pca_is_centred_pca_with_the_mean_stored() -> None:
    V = vectors("uneven", 12)
    mean = V.mean(1, keepdim=True)
    U, s, Wt = torch.linalg.svd(V - mean, full_matrices=False)
    rebuilt = mean + U[:, :4] @ torch.diag(s[:4]) @ Wt[:4]
    fit = quietly(V.T @ V, 5, "pca")
    torch.testing.assert_close(V @ fit.B @ fit.W, rebuilt, rtol=0, atol=1e-9)
    torch.testing.assert_close(V @ fit.B[:, :1], mean, rtol=0, atol=1e-12)
    assert fit.loss == pytest.approx(
        float((rebuilt - V).square().sum() / V.square().sum()), rel=1e-9
    )


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize("kind", ["clustered", "positive", "uneven"])
@pytest.mark.parametrize(("tasks", "size"), [(8, 2), (8, 4), (20, 5), (20, 10), (50, 12), (50, 25)])
def test_ae_reaches_a_reachable_floor_exactly(kind: str, tasks: int, size: int, seed: int) -> None:
    G = gram(kind, tasks, seed)
    assert floor_is_reachable(G, size)
    fit = fit_basis(G, size)
    assert fit.method == "ae" and fit.convex
    assert fit.loss <= (1 + 1e-9) * fit.floor
    assert fit.condition <= 1e4


@pytest.mark.parametrize("kind", ["clustered", "positive", "orthogonal"])
@pytest.mark.parametrize(("size", "seed"), [(50, 3), (100, 4)])
def test_ae_with_many_tasks(kind: str, size: int, seed: int) -> None:
    fit = fit_basis(gram(kind, 200, seed), size)
    assert fit.loss <= 1.002 * fit.floor and fit.condition <= 1e4 and fit.convex


@pytest.mark.parametrize("seed", [0, 1, 17])
@pytest.mark.parametrize(
    ("tasks", "size", "strength"), [(8, 4, 10), (20, 5, 10), (20, 10, 3), (50, 12, 3), (50, 25, 3)]
)
def test_ae_with_a_strong_common_mean(tasks: int, size: int, strength: float, seed: int) -> None:
    """The condition number of columns on the simplex is above M r², with a mean of r times the
    noise.
    """
    fit = fit_basis(gram("positive", tasks, seed, strength), size)
    assert fit.loss <= 1.002 * fit.floor and fit.condition <= 1e4


def test_ae_gives_up_condition_before_loss() -> None:
    fit = fit_basis(gram("positive", 50, 0, 10), 25)
    assert fit.loss <= 1.002 * fit.floor and 25 * 100 < fit.condition < 1e5


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("tasks", "size"), [(8, 2), (8, 4), (20, 5), (20, 10), (50, 25)])
def test_ae_on_orthogonal_vectors(tasks: int, size: int, seed: int) -> None:
    G = gram("orthogonal", tasks, 30 + seed)
    fit = fit_basis(G, size)
    assert fit.condition <= 1e4 and fit.convex
    if floor_is_reachable(G, size):
        assert fit.loss <= 1.002 * fit.floor


@pytest.mark.parametrize(
    ("kind", "size", "scale"),
    [("orthogonal", 2, 1e-8), ("orthogonal", 4, 1e8), ("positive", 4, 1e-8)],
)
def test_ae_is_no_worse_than_joint_adam(kind: str, size: int, scale: float) -> None:
    G = scale * gram(kind, 8)
    adam = fit_basis(G, size, method="ae-adam")
    assert fit_basis(G, size).loss <= (1 + 1e-6) * adam.loss


@pytest.mark.parametrize("kind", ["orthogonal", "signed"])
@pytest.mark.parametrize(
    ("tasks", "size", "seed"), [(6, 2, 0), (6, 2, 1), (8, 2, 0), (8, 2, 1), (12, 3, 0), (20, 5, 1)]
)
def test_ae_is_as_good_as_restarts_on_softmax_logits(
    kind: str, tasks: int, size: int, seed: int
) -> None:
    G = gram(kind, tasks, seed)
    fit = fit_basis(G, size)
    assert fit.loss <= 1.01 * best_softmax_loss(G, size)
    assert fit.condition <= 1e4


def test_ae_reaches_a_floor_that_needs_zeros_in_the_basis() -> None:
    G = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    assert not floor_is_reachable(G.double(), 2)
    fit = fit_basis(G, 2)
    assert fit.loss == pytest.approx(1 / 6, rel=1e-3)


@pytest.mark.parametrize("kind", ["clustered", "orthogonal", "positive", "signed", "uneven"])
@pytest.mark.parametrize(("tasks", "size"), [(8, 1), (8, 3), (50, 25)])
def test_ae_anchored_reaches_its_floor_and_decodes_the_sum_exactly(
    kind: str, tasks: int, size: int
) -> None:
    V = vectors(kind, tasks)
    V = V / V.norm()
    fit = quietly(V.T @ V, size, "ae-anchored")
    assert fit.loss == pytest.approx(anchored_floor(V.T @ V, size), rel=1e-6)
    assert fit.convex
    torch.testing.assert_close(fit.B[:, 0], torch.full((tasks,), 1 / tasks, dtype=torch.float64))
    torch.testing.assert_close((V @ fit.B @ fit.W).sum(1), V.sum(1), rtol=0, atol=1e-10)


def test_ae_anchored_when_the_vectors_sum_to_zero() -> None:
    V = vectors("orthogonal", 8)
    V = V - V.mean(1, keepdim=True)
    fit = quietly(V.T @ V, 4, "ae-anchored")
    assert fit.convex and fit.loss == pytest.approx(trailing(V.T @ V, 3), rel=1e-6)


def test_convex_is_true_for_bases_on_the_simplex_only() -> None:
    G = gram("positive", 10)
    for method in BASIS_METHODS:
        fit = quietly(G, 4, method)
        assert fit.convex == (method in CONVEX), method
        if fit.convex:
            assert fit.B.min() >= 0
            torch.testing.assert_close(fit.B.sum(0), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("method", FAST)
@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_scale_of_the_vectors_does_not_matter(method: str, scale: float) -> None:
    G = gram("positive", 20)
    plain, scaled = quietly(G, 6, method), quietly(G * scale, 6, method)
    torch.testing.assert_close(scaled.B, plain.B, rtol=0, atol=1e-6)
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-8)
    assert scaled.floor == pytest.approx(plain.floor, rel=1e-8)


@pytest.mark.parametrize("method", DETERMINISTIC)
@pytest.mark.parametrize("kind", ["positive", "signed"])
def test_order_of_the_tasks_does_not_matter(method: str, kind: str) -> None:
    G = gram(kind, 8)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    plain, permuted = quietly(G, 2, method), quietly(G[order][:, order], 2, method)
    torch.testing.assert_close(permuted.B, plain.B[order], rtol=0, atol=1e-5)
    assert permuted.loss == pytest.approx(plain.loss, rel=1e-7)


@pytest.mark.parametrize("method", sorted(set(BASIS_METHODS) - {"ae-adam", "pca"}))
def test_decoded_sum_is_the_projection_of_the_task_sum(method: str) -> None:
    V = vectors("clustered", 10)
    fit = quietly(V.T @ V, 4, method)
    Q = torch.linalg.qr(V @ fit.B)[0]
    total = V.sum(1)
    torch.testing.assert_close((V @ fit.B @ fit.W).sum(1), Q @ (Q.T @ total), rtol=0, atol=1e-8)


@pytest.mark.parametrize("method", list(BASIS_METHODS))
def test_same_generator_same_fit(method: str) -> None:
    G = gram("signed", 8)
    first = quietly(G, 3, method)
    again = fit_basis(G, 3, method=method, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first.B, again.B) and torch.equal(first.W, again.W)


def test_random_methods_follow_the_generator() -> None:
    G = gram("positive", 20)
    for method in ("random-subset", "random-projection"):
        other = fit_basis(G, 5, method=method, generator=torch.Generator().manual_seed(1))
        assert not torch.equal(other.B, quietly(G, 5, method).B)


def test_clusterings_find_the_clusters() -> None:
    for method in ("kmeans", "spectral"):
        B = quietly(gram("clustered", 20), 4, method).B
        members = {tuple(column.nonzero().ravel().tolist()) for column in B.T}
        assert members == {tuple(range(k, 20, 4)) for k in range(4)}


def test_ae_adam_comes_near_the_floor_on_small_vectors() -> None:
    fit = quietly(gram("clustered", 12) * 1e-8, 4, "ae-adam")
    assert fit.loss <= 1.05 * fit.floor


@pytest.mark.parametrize("method", list(BASIS_METHODS))
@pytest.mark.parametrize("size", [4, 5])
def test_above_the_rank_the_basis_is_exact_and_no_larger_than_needed(
    method: str, size: int
) -> None:
    V = vectors("orthogonal", 8)[
        :, [0, 0, 0, 1, 1, 2, 2]
    ]  # seven vectors, of which three are different
    with pytest.warns(UserWarning, match="the vectors have rank 3: "):
        fit = quietly(V.T @ V, size, method)
    assert fit.B.shape == (7, 3) and fit.W.shape == (3, 7)
    assert fit.floor < 1e-12 and fit.loss < 1e-12 and fit.condition < 1e6
    torch.testing.assert_close(V @ fit.B @ fit.W, V, rtol=0, atol=1e-9)
    assert fit.convex == (method in CONVEX)


@pytest.mark.parametrize("method", ["pca", "ae-anchored"])
@pytest.mark.parametrize(("size", "expected"), [(5, 5), (6, 5)])
def test_a_mean_that_vanishes_takes_one_vector_more_than_the_rank(
    method: str, size: int, expected: int
) -> None:
    V = vectors("orthogonal", 8)[:, [0, 1, 2, 3, 0, 1, 2, 3]] * torch.tensor(
        [1, 1, 1, 1, -1, -1, -1, -1]
    )
    with pytest.warns(
        UserWarning, match=f"rank 4: {expected} basis vectors are exact, so the size {size} is not"
    ):
        fit = quietly(V.T @ V, size, method)
    assert fit.size == expected and fit.loss < 1e-12


@pytest.mark.parametrize(
    "method", sorted(set(BASIS_METHODS) - {"ae-adam", "kmeans", "spectral", "random-subset", "pca"})
)
def test_as_many_vectors_as_rank_are_exact(method: str) -> None:
    V = vectors("positive", 8)[:, :4]
    V = torch.cat([V, V[:, :2] + V[:, 2:]], 1)
    fit = quietly(V.T @ V, 4, method)
    assert fit.size == 4 and fit.loss < 1e-12


@pytest.mark.parametrize("method", list(BASIS_METHODS))
def test_zero_and_duplicate_vectors(method: str) -> None:
    V = vectors("positive", 10)
    V[:, 3] = 0
    V[:, 7] = V[:, 2]
    fit = quietly(V.T @ V, 4, method)
    assert fit.floor * (1 - 1e-9) <= fit.loss <= 1
    if method == "ae":
        assert fit.loss <= 1.01 * fit.floor and fit.convex


@pytest.mark.parametrize("method", list(BASIS_METHODS))
def test_size_one(method: str) -> None:
    fit = quietly(gram("positive", 6), 1, method)
    assert fit.size == 1 and fit.condition == pytest.approx(1)
    assert fit.floor * (1 - 1e-9) <= fit.loss < 1


@pytest.mark.parametrize("method", list(BASIS_METHODS))
@pytest.mark.parametrize(("tasks", "size"), [(1, 1), (1, 3), (4, 4), (4, 9)])
def test_size_at_or_above_the_number_of_vectors_keeps_them(
    method: str, tasks: int, size: int
) -> None:
    with pytest.warns(UserWarning, match="not below the"):
        fit = fit_basis(gram("positive", tasks), size, method=method)
    assert torch.equal(fit.B, torch.eye(tasks, dtype=torch.float64)) and torch.equal(fit.W, fit.B)
    assert fit.loss == fit.floor == 0 and fit.convex


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_any_real_dtype(dtype: torch.dtype) -> None:
    G = (100 * gram("positive", 8)).to(dtype)
    assert quietly(G, 3, "ae").loss == pytest.approx(quietly(G.double(), 3, "ae").loss)


@pytest.mark.parametrize("method", list(BASIS_METHODS))
def test_fits_of_several_sizes_are_those_of_each(method: str) -> None:
    G = gram("signed", 9)
    generator = torch.Generator().manual_seed(7)
    state = generator.get_state()
    sizes = [3, 5, 2] if method in FAST else [3, 2]
    fits = fit_bases(G, sizes, method=method, generator=generator)
    assert [fit.size for fit in fits] == sizes
    for fit in fits:
        alone = fit_basis(G, fit.size, method=method, generator=torch.Generator().set_state(state))
        assert torch.equal(fit.B, alone.B) and torch.equal(fit.W, alone.W) and fit.seconds > 0
        assert (fit.loss, fit.floor, fit.condition) == (alone.loss, alone.floor, alone.condition)


@pytest.mark.parametrize("tasks", [1, 6])
def test_sizes_from_one_to_all(tasks: int) -> None:
    with pytest.warns(UserWarning, match="not below the"):
        fits = fit_bases(gram("positive", tasks), range(1, tasks + 1))
    assert [fit.size for fit in fits] == list(range(1, tasks + 1)) and fits[-1].loss == 0
    assert fit_bases(gram("positive", tasks), []) == []


def test_ae_anchored_is_well_conditioned() -> None:
    for kind in ("clustered", "positive", "orthogonal"):
        assert fit_basis(gram(kind, 50, 1), 25, method="ae-anchored").condition <= 1e4


def test_a_fit_is_frozen_and_leaves_its_input_alone() -> None:
    G = gram("positive", 6)
    before = G.clone()
    fit = quietly(G, 2, "ae")
    assert torch.equal(G, before)
    with pytest.raises(dataclasses.FrozenInstanceError):
        fit.loss = 0.0  # type: ignore[misc]


def test_errors_name_what_is_wrong() -> None:
    G = gram("positive", 4)
    with pytest.raises(ValueError, match=r"unknown basis method 'nmf'.*ae-anchored.*svd"):
        fit_basis(G, 2, method="nmf")
    for size in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            fit_basis(G, size)
    for shape in ((4, 3), (4,), (0, 0)):
        with pytest.raises(ValueError, match="square"):
            fit_basis(torch.ones(shape), 2)
    with pytest.raises(ValueError, match="real"):
        fit_basis(G.to(torch.complex128), 2)
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="2 entries that are not finite"):
            fit_basis(
                G.index_put(
                    (torch.tensor([0, 1]), torch.tensor([1, 0])), torch.tensor(bad).double()
                ),
                2,
            )
    with pytest.raises(ValueError, match="not symmetric"):
        fit_basis(G + torch.triu(G), 2)
    with pytest.raises(ValueError, match="not positive semi-definite"):
        fit_basis(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), 1)
    with pytest.raises(ValueError, match="all zero"):
        fit_basis(torch.zeros(4, 4), 2)


def test_the_rank_of_a_gram_matrix_of_rounded_products() -> None:
    """In float32 the eigenvalues that should vanish come out as noise of either sign."""
    for seed in range(8):
        V = vectors("orthogonal", 12, seed).float()
        V[:, 6:] = V[:, :6] @ torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))
        with pytest.warns(UserWarning, match="rank 6"):
            fit = fit_basis(V.T @ V, 9, method="svd")
        assert fit.size == 6
        error = (V.double() @ fit.B @ fit.W - V.double()).norm() / V.double().norm()
        assert error < 1e-3


def test_the_rank_of_duplicates_and_of_a_float64_product() -> None:
    for seed in range(30):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((200, 3))[:, [0, 1, 2, 0, 1, 0]] * rng.uniform(0.1, 10, 6)
        noise = rng.standard_normal((6, 6)) * 1e-9 * np.sqrt(np.outer(*[(X**2).sum(0)] * 2))
        for G in (torch.from_numpy(X.T @ X), torch.from_numpy(X.T @ X + noise + noise.T)):
            for size in (4, 5):
                with pytest.warns(UserWarning, match="rank 3"):
                    fit = fit_basis(G, size)
                assert fit.size == 3 and fit.condition < 1e9 and fit.loss < 1e-6


def test_short_vectors_beside_long_ones_count_for_the_rank() -> None:
    V = vectors("orthogonal", 8) * torch.logspace(0, -7, 8, dtype=torch.float64)
    fit = fit_basis(V.T @ V, 6, method="svd")
    assert fit.size == 6 and fit.loss == pytest.approx(fit.floor, rel=1e-6)


def test_numpy_and_generators_are_taken_and_fractions_are_not() -> None:
    G = gram("positive", 6)
    assert torch.equal(fit_basis(G.numpy(), 2, method="svd").B, fit_basis(G, 2, method="svd").B)  # type: ignore[arg-type]
    assert [f.size for f in fit_bases(G, (m for m in (1, 2, 3)), method="svd")] == [1, 2, 3]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"whole number of at least 1, got 2\.5"):
        fit_basis(G, 2.5)  # type: ignore[arg-type]
