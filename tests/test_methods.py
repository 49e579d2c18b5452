"""Merge methods against dense float64 references that see all parameters as one (T, D) array."""

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raytvb.maths.merge_methods.iso_c import iso_c
from raytvb.maths.merge_methods.ties import ties
from raytvb.maths.merge_methods.tsv_m import tsv_m
from raytvb.maths.merge_registry import MERGE_METHODS
from raytvb.maths.thresholds import Thresholds, global_thresholds
from raytvb.maths.trimming import PREPARE

SHAPES = {"bias": (7,), "conv": (4, 3, 2, 2), "scale": (), "tall": (9, 5), "wide": (6, 11)}
SIZES = [int(np.prod(s)) for s in SHAPES.values()]
D = sum(SIZES)
KINDS = ("dense", "bf16", "sparse", "levels", "zeros", "single", "many")

Model = dict[str, Tensor]
Reference = Callable[[np.ndarray], np.ndarray]


def some_vectors(kind: str, seed: int) -> Model:
    """T vectors by parameter: few distinct values (many ties), a task of zeros, one task, more
    tasks than rows.
    """
    rng = np.random.default_rng(seed)
    tasks = {"single": 1, "many": 8}.get(kind, 3)
    flat: np.ndarray = rng.normal(size=(tasks, D)) * 10.0 ** rng.integers(-4, 2, size=(tasks, 1))
    if kind == "sparse":
        flat *= rng.random(flat.shape) < 0.3
    if kind == "levels":
        flat = rng.integers(-2, 3, size=flat.shape) / 4
    if kind == "zeros":
        flat[1] = 0
    return by_name(torch.tensor(flat, dtype=torch.bfloat16 if kind == "bf16" else torch.float32))


def by_name(flat: Tensor) -> Model:
    parts = flat.split(SIZES, dim=-1)
    return {
        n: p.reshape(*flat.shape[:-1], *s) for (n, s), p in zip(SHAPES.items(), parts, strict=True)
    }


def dense(model: Model) -> np.ndarray:
    """The vectors as one array (T, D) float64."""
    return torch.cat([v.double().reshape(len(v), -1) for v in model.values()], dim=1).numpy()


def merged(model: Model, method: Callable[..., Tensor], **options: object) -> np.ndarray:
    """All parameters merged one by one, (D,) float64."""
    parts = []
    for name, vectors in model.items():
        part = method(vectors, **options)
        assert part.dtype == torch.float32 and part.shape == SHAPES[name]
        parts.append(part.double().reshape(-1))
    return torch.cat(parts).numpy()


def prepared(model: Model, name: str, **options: object) -> Model:
    parts = {n: PREPARE[name](v, **options) for n, v in model.items()}
    assert all(p.dtype == torch.float32 and p.shape == model[n].shape for n, p in parts.items())
    return parts


def thresholds_of(model: Model, density: float = 0.2) -> Tensor:
    return global_thresholds(lambda: model.values(), density)


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= tolerance * max(np.abs(expected).max(), 1e-30)


def slices() -> Iterator[tuple[str, slice]]:
    stops = np.cumsum(SIZES)
    yield from (
        (n, slice(stop - size, stop)) for n, size, stop in zip(SHAPES, SIZES, stops, strict=True)
    )


# References


def reference_trim(flat: np.ndarray, density: float) -> np.ndarray:
    out = np.zeros_like(flat)
    for t, vector in enumerate(flat):
        ranked = sorted(range(len(vector)), key=lambda j: -abs(vector[j]))
        least = abs(vector[ranked[max(1, round(density * len(vector))) - 1]])
        for j in ranked:
            out[t, j] = vector[j] if abs(vector[j]) >= least else 0
    return out


def reference_ties(flat: np.ndarray, density: float = 0.2) -> np.ndarray:
    out = np.zeros(flat.shape[1])
    for j, column in enumerate(reference_trim(flat, density).T):
        positive, negative = column[column > 0], column[column < 0]
        strength = positive.sum() + negative.sum()
        if strength != 0:
            out[j] = (positive if strength > 0 else negative).mean()
    return out


def reference_breadcrumbs(flat: np.ndarray, beta: float, gamma: float) -> np.ndarray:
    out = np.zeros_like(flat)
    for _, where in slices():
        for t in range(len(flat)):
            layer = flat[t, where]
            ordered = np.sort(np.abs(layer))
            middle = ordered[int(beta * len(layer)) : len(layer) - int((1 - gamma) * len(layer))]
            if len(middle):
                out[t, where] = np.where(np.isin(np.abs(layer), middle), layer, 0)
    return out


def reference_masks(flat: np.ndarray, strength: np.ndarray) -> np.ndarray:
    whole = flat.sum(axis=0)
    return np.array(
        [
            [abs(x) > lam * abs(s - x) for x, s in zip(row, whole, strict=True)]
            for row, lam in zip(flat, strength, strict=True)
        ]
    )


def inverse_root(gram: np.ndarray) -> np.ndarray:
    """gram^(-1/2) where it has an inverse, 0 elsewhere."""
    values, vectors = np.linalg.eigh(gram)
    kept = values > 1e-8 * values.max()
    root: np.ndarray = (vectors[:, kept] / np.sqrt(values[kept])) @ vectors[:, kept].T
    return root


def reference_tsv(flat: np.ndarray) -> np.ndarray:
    """With U' = U (U'U)^(-1/2), and singular vectors from the eigenvectors of A'A."""
    out: np.ndarray = flat.mean(axis=0)
    for name, where in slices():
        if len(SHAPES[name]) != 2:
            continue
        left, sizes, right = [], [], []
        for vector in flat[:, where]:
            matrix = vector.reshape(SHAPES[name])
            values, vectors = np.linalg.eigh(matrix.T @ matrix)
            for i in np.argsort(-values)[: max(1, min(matrix.shape) // len(flat))]:
                if values[i] > 1e-10 * values.max():
                    sizes.append(np.sqrt(values[i]))
                    right.append(vectors[:, i])
                    left.append(matrix @ vectors[:, i] / sizes[-1])
        U, V = np.array(left).T, np.array(right).T
        whole = U @ inverse_root(U.T @ U) @ np.diag(sizes) @ inverse_root(V.T @ V) @ V.T
        out[where] = whole.ravel()
    return out


def reference_iso(flat: np.ndarray) -> np.ndarray:
    """U V' = A (A'A)^(-1/2), with A'A or AA' whichever is smaller; the mean singular value is their
    trace norm / r.
    """
    out: np.ndarray = flat.mean(axis=0)
    for name, where in slices():
        if len(SHAPES[name]) == 2:
            A = flat[:, where].sum(axis=0).reshape(SHAPES[name])
            short = A if A.shape[0] >= A.shape[1] else A.T
            direction = short @ inverse_root(short.T @ short)
            size = np.sqrt(np.linalg.eigvalsh(short.T @ short)).mean()
            out[where] = (size * (direction if short is A else direction.T)).ravel()
    return out


REFERENCES: dict[str, Reference] = {
    "sum": lambda flat: flat.sum(axis=0),
    "mean": lambda flat: flat.sum(axis=0) / len(flat),
    "breadcrumbs": lambda flat: reference_breadcrumbs(flat, 0.85, 0.994).sum(axis=0),
    "tall": lambda flat: (
        flat.sum(axis=0) * (reference_masks(flat, np.full(len(flat), 0.4)).sum(axis=0) >= 1)
    ),
    "consensus": lambda flat: (
        flat.sum(axis=0) * (reference_masks(flat, np.full(len(flat), 0.4)).sum(axis=0) >= 2)
    ),
    "tsv-m": reference_tsv,
    "iso-c": reference_iso,
}
SPECTRAL = {"tsv-m": 2e-4, "iso-c": 2e-4}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFERENCES)
def test_a_method_is_its_dense_reference(name: str, kind: str) -> None:
    for seed in range(3):
        model = some_vectors(kind, seed)
        assert_close(
            merged(model, MERGE_METHODS[name]),
            REFERENCES[name](dense(model)),
            SPECTRAL.get(name, 1e-6),
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 1.0])
def test_ties_trims_over_whole_vectors(kind: str, density: float) -> None:
    for seed in range(3):
        model = some_vectors(kind, seed)
        limits = thresholds_of(model, density)
        found = prepared(model, "trimmed", thresholds=limits)
        assert np.array_equal(dense(found), reference_trim(dense(model), density))
        assert_close(merged(model, ties, thresholds=limits), reference_ties(dense(model), density))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("beta", "gamma"), [(0.85, 0.994), (0.3, 0.7), (0.0, 1.0), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0)]
)
def test_breadcrumbs_masks_both_tails_layer_by_layer(kind: str, beta: float, gamma: float) -> None:
    for seed in range(3):
        model = some_vectors(kind, seed)
        expected = reference_breadcrumbs(dense(model), beta, gamma)
        assert np.array_equal(
            dense(prepared(model, "sparsified", beta=beta, gamma=gamma)), expected
        )


@pytest.mark.parametrize("kind", KINDS)
def test_fisher_is_the_weighted_average_of_every_entry(kind: str) -> None:
    for seed in range(3):
        model = some_vectors(kind, seed)
        flat, rng = dense(model), np.random.default_rng(seed)
        information = (
            rng.random(flat.shape).astype(np.float32) * 1e-20 * (rng.random(flat.shape) < 0.6)
        )
        scales = rng.random(len(flat)) + 0.1
        fishers = by_name(torch.tensor(information, dtype=torch.float32))
        parts = [
            MERGE_METHODS["fisher"](v, fishers=fishers[n], weights=torch.tensor(scales))
            for n, v in model.items()
        ]
        expected = np.zeros(D)
        for j in range(D):
            used = scales * information[:, j]
            expected[j] = np.average(flat[:, j], weights=used if used.any() else scales)
        assert_close(torch.cat([p.reshape(-1) for p in parts]).double().numpy(), expected)


# Thresholds


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thresholds_are_exact_for_magnitudes_of_all_sizes(dtype: torch.dtype) -> None:
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        exponents = torch.randint(-160, 100, (5000,), generator=generator)
        vectors = torch.randn(3, 5000, generator=generator) * 2.0**exponents
        vectors[1, ::2] = (
            1.0 + torch.arange(2500) * 2.0**-23
        )  # the values differ only in their last bits
        vectors[2, :4500] = 0
        vectors = vectors.to(dtype)
        for density in (1e-6, 0.01, 0.2, 0.5, 0.99, 1.0):
            falling = vectors.float().abs().sort(dim=1, descending=True).values
            expected = falling[:, max(1, round(5000 * density)) - 1]
            parameters = partial(vectors.split, 777, dim=1)
            assert torch.equal(global_thresholds(parameters, density), expected)


def test_bf16_needs_one_pass_and_float32_two() -> None:
    for dtype, passes in ((torch.bfloat16, 1), (torch.float32, 2)):
        thresholds, count = Thresholds(0.5), 0
        while thresholds.values is None:
            thresholds.add(torch.randn(2, 10, generator=torch.Generator().manual_seed(0)).to(dtype))
            thresholds.end_pass()
            count += 1
        assert count == passes


def test_a_second_pass_that_differs_is_an_error() -> None:
    once = iter([torch.ones(2, 4)])
    with pytest.raises(ValueError, match="both passes"):
        global_thresholds(lambda: once)
    passes = iter([[torch.ones(2, 4)], [torch.ones(2, 3)]])
    with pytest.raises(ValueError, match="second pass"):
        global_thresholds(lambda: next(passes))
    with pytest.raises(ValueError, match="3 vectors after one of 2"):
        global_thresholds(lambda: [torch.ones(2, 4), torch.ones(3, 4)])
    for bad in (torch.nan, torch.inf, -torch.inf):
        with pytest.raises(ValueError, match="vector 1"):
            Thresholds().add(torch.tensor([[0.0, 1.0], [0.0, bad]]))
    with pytest.raises(ValueError, match="density"):
        Thresholds(0.0)


# Properties


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", sorted(set(MERGE_METHODS) - {"dare", "fisher"}))
def test_the_order_of_the_tasks_does_not_matter(name: str, kind: str) -> None:
    for seed in range(2):
        model = some_vectors(kind, seed)
        order = torch.randperm(len(model["bias"]), generator=torch.Generator().manual_seed(seed))
        other = {n: v[order] for n, v in model.items()}
        found, expected = (
            merged(
                m,
                MERGE_METHODS[name],
                **({"thresholds": thresholds_of(m)} if name == "ties" else {}),
            )
            for m in (other, model)
        )
        assert_close(found, expected, SPECTRAL.get(name, 1e-6))


def required_keywords(function: Callable[..., Tensor]) -> list[str]:
    """Names of the keyword arguments without a default."""
    names = []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind == parameter.KEYWORD_ONLY and parameter.default is parameter.empty:
            names.append(parameter.name)
    return names


@pytest.mark.parametrize("name", list(MERGE_METHODS))
def test_a_method_registers_what_its_function_needs(name: str) -> None:
    method = MERGE_METHODS[name]
    assert required_keywords(method.function) == list(method.needs)


def test_inputs_stay_as_they_are() -> None:
    model = some_vectors("dense", 0)
    before = {n: v.clone() for n, v in model.items()}
    given = {"thresholds": thresholds_of(model), "generator": torch.Generator(), "fishers": None}
    functions = [method.function for method in MERGE_METHODS.values()]
    for method in (*functions, *PREPARE.values()):
        needed = required_keywords(method)
        assert set(needed) <= set(given)
        for vectors in model.values():
            method(vectors, **{n: vectors.abs() if n == "fishers" else given[n] for n in needed})
    assert all(torch.equal(before[n], v) for n, v in model.items())


def test_ties_of_equal_vectors_is_that_vector_trimmed() -> None:
    one = some_vectors("single", 0)
    model = {n: v.repeat(4, *[1] * (v.ndim - 1)) for n, v in one.items()}
    limits = thresholds_of(model)
    expected = dense(prepared(one, "trimmed", thresholds=limits[:1]))[0]
    assert (expected != 0).sum() == round(0.2 * D)
    assert np.array_equal(merged(model, ties, thresholds=limits), expected)


def test_ties_leaves_out_those_that_disagree() -> None:
    vectors = torch.tensor([[3.0, -1.0, 2.0, 0.0], [-1.0, -2.0, -2.0, 0.0], [2.0, 4.0, 0.0, 0.0]])
    assert ties(vectors, thresholds=torch.zeros(3)).tolist() == [2.5, 4.0, 0.0, 0.0]


def test_consensus_needs_as_many_masks_as_asked() -> None:
    model = some_vectors("dense", 3)
    whole = merged(model, MERGE_METHODS["sum"])
    consensus = MERGE_METHODS["consensus"]
    assert np.array_equal(merged(model, consensus, least=0), whole)
    assert not merged(model, consensus, least=4).any()
    assert np.array_equal(merged(model, consensus, least=1), merged(model, MERGE_METHODS["tall"]))
    kept = [(merged(model, consensus, least=k) != 0).sum() for k in range(5)]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) > 2


def test_consensus_takes_another_merge_such_as_ties() -> None:
    model = some_vectors("dense", 1)
    limits = thresholds_of(model, 0.5)
    for vectors in model.values():
        multi = ties(vectors, thresholds=limits)
        masks = vectors.double().abs() > 0.4 * (multi.double() - vectors.double()).abs()
        assert torch.equal(
            MERGE_METHODS["consensus"](vectors, merged=multi), multi * (masks.sum(0) >= 2)
        )


def test_dare_depends_on_its_generator_only() -> None:
    model = some_vectors("dense", 0)

    def drawn(seed: int, name: str = "dare") -> np.ndarray:
        generator = torch.Generator().manual_seed(seed)
        return merged(model, MERGE_METHODS[name], rate=0.5, generator=generator)

    assert np.array_equal(drawn(1), drawn(1)) and not np.array_equal(drawn(1), drawn(2))
    generator = torch.Generator().manual_seed(1)
    assert_close(
        drawn(1), dense(prepared(model, "dropped", rate=0.5, generator=generator)).sum(axis=0)
    )


def test_dare_drops_and_rescales_without_bias() -> None:
    vectors = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, 0.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack(
        [PREPARE["dropped"](vectors, rate=0.75, generator=generator) for _ in range(4000)]
    )
    assert all(
        set(draws[:, t, i].tolist()) == {0.0, 4 * float(vectors[t, i])}
        for t in range(2)
        for i in range(3)
    )
    # A kept entry is 4 times its value: the standard deviation of the mean is sqrt(3 / 4000) = 2.7
    # % of it.
    assert torch.allclose(draws.mean(0), vectors, rtol=0.1)
    assert torch.equal(
        MERGE_METHODS["dare"](vectors, rate=0.0, generator=generator), vectors.sum(0)
    )


def test_dare_drops_the_entries_of_each_task_independently() -> None:
    kept = (
        PREPARE["dropped"](
            torch.ones(2, 20000), rate=0.9, generator=torch.Generator().manual_seed(0)
        )
        != 0
    )
    assert abs(float(kept.double().mean()) - 0.1) < 0.01
    assert abs(float((kept[0] & kept[1]).double().mean()) - 0.01) < 0.005


@pytest.mark.parametrize("shape", [(9, 5), (6, 11)])
def test_iso_c_makes_all_singular_values_equal(shape: tuple[int, int]) -> None:
    vectors = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = torch.linalg.svdvals(iso_c(vectors))
    assert torch.allclose(
        found, torch.linalg.svdvals(vectors.sum(0)).mean().expand(len(found)), rtol=1e-5
    )


def test_tsv_m_keeps_orthogonal_low_rank_tasks() -> None:
    rng = np.random.default_rng(0)
    P, _ = np.linalg.qr(rng.normal(size=(12, 12)))
    Q, _ = np.linalg.qr(rng.normal(size=(15, 15)))
    tasks = [
        P[:, 2 * t : 2 * t + 2] @ np.diag([3.0, 1.0 + t]) @ Q[:, 2 * t : 2 * t + 2].T
        for t in range(4)
    ]
    vectors = torch.tensor(np.array(tasks), dtype=torch.float32)
    assert_close(tsv_m(vectors).double().numpy(), sum(tasks), 1e-5)


def test_tsv_m_of_one_task_is_that_task_and_of_equal_ones_its_leading_part() -> None:
    task = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(tsv_m(task[None]), task, atol=1e-5)
    U, s, Vh = torch.linalg.svd(task, full_matrices=False)
    assert torch.allclose(tsv_m(task.expand(3, 6, 9)), (U[:, :2] * s[:2]) @ Vh[:2], atol=1e-5)


def test_a_task_of_zeros_disturbs_no_other_one_in_tsv_m() -> None:
    task = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    zero = torch.zeros(6, 9)
    U, s, Vh = torch.linalg.svd(task, full_matrices=False)
    assert torch.allclose(tsv_m(torch.stack([zero, task])), (U[:, :3] * s[:3]) @ Vh[:3], atol=1e-5)


def test_vectors_of_zeros_merge_to_zero() -> None:
    model = by_name(torch.zeros(3, D))
    needed: dict[str, dict[str, Any]] = {
        "ties": {"thresholds": thresholds_of(model)},
        "dare": {"generator": torch.Generator()},
    }
    for name in sorted(set(MERGE_METHODS) - {"fisher"}):
        assert not merged(model, MERGE_METHODS[name], **needed.get(name, {})).any(), name
    for vectors in model.values():
        assert not MERGE_METHODS["fisher"](vectors, fishers=vectors).any()


def test_fisher_with_equal_information_is_the_mean() -> None:
    model = some_vectors("dense", 0)
    for vectors in model.values():
        equal = torch.rand(vectors.shape[1:], generator=torch.Generator().manual_seed(0)).expand(
            vectors.shape
        )
        assert torch.allclose(
            MERGE_METHODS["fisher"](vectors, fishers=equal),
            MERGE_METHODS["mean"](vectors),
            atol=1e-7,
        )


@pytest.mark.parametrize("name", list(MERGE_METHODS))
def test_what_is_no_stack_of_vectors_is_an_error(name: str) -> None:
    needed: dict[str, dict[str, Any]] = {
        "ties": {"thresholds": torch.zeros(0)},
        "dare": {"generator": torch.Generator()},
        "fisher": {"fishers": torch.zeros(0)},
    }
    for bad in (torch.tensor(1.0), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="T >= 1 vectors"):
            MERGE_METHODS[name](bad, **needed.get(name, {}))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("ties", {"thresholds": torch.zeros(3)}, "as many thresholds"),
        ("dare", {"rate": 1.0, "generator": torch.Generator()}, "drop rate"),
        ("dare", {"rate": -0.1, "generator": torch.Generator()}, "drop rate"),
        ("breadcrumbs", {"beta": 0.9, "gamma": 0.8}, "beta"),
        ("tall", {"strength": -1.0}, "strength"),
        ("consensus", {"strength": torch.ones(3)}, "strength"),
        ("consensus", {"merged": torch.ones(3)}, "merged vector"),
        ("fisher", {"fishers": torch.ones(2, 3)}, "Fishers"),
        ("fisher", {"fishers": -torch.ones(2, 4)}, "Fishers"),
        ("fisher", {"fishers": torch.full((2, 4), torch.nan)}, "Fishers"),
        ("fisher", {"fishers": torch.ones(2, 4), "weights": torch.zeros(2)}, "weights"),
        ("fisher", {"fishers": torch.ones(2, 4), "weights": torch.ones(3)}, "weights"),
    ],
)
def test_wrong_options_are_errors(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MERGE_METHODS[name](torch.ones(2, 4), **options)
