"""Masks against a stable sort."""

import numpy as np
import pytest
import torch
from torch import Tensor

from raytvb.maths.mask_selection import (
    damp,
    flatten,
    jaccard,
    kept_count,
    round_density,
    select_further,
    select_mask,
    unflatten,
)


def some_scores(seed: int = 0, levels: int | None = None) -> dict[str, Tensor]:
    """Scores of three tensors whose names are not in sorted order. They have only `levels`
    different values, so there are many ties.
    """
    rng = np.random.default_rng(seed)
    shapes = {"b": (7, 11), "c": (5,), "a": (3, 2, 4)}
    made = {
        n: rng.random(s) if levels is None else rng.integers(levels, size=s) / levels
        for n, s in shapes.items()
    }
    return {n: torch.tensor(v, dtype=torch.float32) for n, v in made.items()}


def sorted_mask(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    flat = np.concatenate([scores[n].numpy().ravel() for n in sorted(scores)])
    mask = np.zeros(len(flat), dtype=bool)
    mask[np.argsort(flat, kind="stable")[:keep]] = True
    return unflatten(torch.from_numpy(mask), scores)


def assert_same_mask(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == torch.bool and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("levels", [None, 1, 2, 6])
def test_the_mask_is_that_of_a_stable_sort(density: float, levels: int | None) -> None:
    for seed in range(3):
        scores = some_scores(seed, levels)
        keep = max(1, round(density * 106))
        mask = select_mask(scores, density)
        assert sum(int(m.sum()) for m in mask.values()) == keep == kept_count(106, density)
        assert_same_mask(mask, sorted_mask(scores, keep))


def test_the_lowest_scores_are_kept() -> None:
    mask = select_mask({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([[0.5], [9.0]])}, 0.4)
    assert mask["a"].tolist() == [False, True, False] and mask["b"].tolist() == [[True], [False]]


def test_ties_go_to_the_first_position_in_name_order() -> None:
    mask = select_mask({"b": torch.zeros(4), "a": torch.zeros(4)}, 0.75)
    assert mask["a"].tolist() == [True] * 4 and mask["b"].tolist() == [True, True, False, False]


def test_density_one_keeps_everything() -> None:
    scores = some_scores()
    scores["c"][2] = torch.inf
    assert all(bool(m.all()) for m in select_mask(scores, 1.0).values())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan")])
def test_a_density_outside_of_0_to_1_is_an_error(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        select_mask(some_scores(), density)


def test_scores_that_are_nan_are_an_error_that_names_the_tensors() -> None:
    scores = some_scores()
    scores["c"][1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN in c$"):
        select_mask(scores, 0.5)


def test_staged_rounds_never_take_back_a_rejected_entry() -> None:
    kept, rounds = None, 4
    for step in range(1, rounds + 1):
        scores = some_scores(
            seed=10 + step
        )  # new scores every round, so that rejected ones would look good again
        density = round_density(0.1, step, rounds)
        chosen = select_further(scores, kept, density)
        assert sum(int(m.sum()) for m in chosen.values()) == max(
            1, round(106 * 0.1 ** (step / rounds))
        )
        if kept is not None:
            assert all(bool((kept[n] | ~chosen[n]).all()) for n in chosen)
            barred = {n: s.where(kept[n], torch.tensor(torch.inf)) for n, s in scores.items()}
            assert_same_mask(
                chosen, sorted_mask(barred, sum(int(m.sum()) for m in chosen.values()))
            )
        kept = chosen
    assert kept is not None and sum(int(m.sum()) for m in kept.values()) == 11


def test_one_round_is_a_plain_threshold() -> None:
    scores = some_scores()
    assert round_density(0.1, 1, 1) == 0.1
    assert_same_mask(select_further(scores, None, 0.1), select_mask(scores, 0.1))


def test_an_infinite_score_does_not_bring_back_a_rejected_entry() -> None:
    """A sensitivity that overflowed is still better than one that an earlier round rejected."""
    kept = {"a": torch.tensor([False, True, True, False])}
    scores = {"a": torch.tensor([1.0, torch.inf, torch.inf, 1.0])}
    chosen = select_further(scores, kept, 0.5)
    assert chosen["a"].tolist() == [False, True, True, False]


def test_damp_multiplies_the_rejected_weights_only() -> None:
    parameters = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([[4.0]])}
    kept = {"a": torch.tensor([True, False, True]), "b": torch.tensor([[False]])}
    damped = damp(parameters, kept, 0.1)
    assert torch.equal(damped["a"], torch.tensor([1.0, -2.0 * 0.1, 3.0]))
    assert torch.equal(damped["b"], torch.tensor([[4.0 * 0.1]]))
    assert all(torch.equal(t, parameters[n]) for n, t in damp(parameters, kept, 1.0).items())
    assert parameters["a"][1] == -2.0


def test_jaccard_is_intersection_over_union() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = [torch.rand(200, generator=generator) < d for d in (0.1, 0.5, 0.5, 0.0, 0.0)]
    found = jaccard(torch.tensor([[int((a & b).sum()) for b in masks] for a in masks]))
    sets = [set(m.nonzero()[:, 0].tolist()) for m in masks]
    for i, a in enumerate(sets):
        for j, b in enumerate(sets):
            assert float(found[i, j]) == pytest.approx(len(a & b) / len(a | b) if a | b else 1.0)


def test_flatten_goes_by_sorted_names_and_unflatten_undoes_it() -> None:
    scores = some_scores()
    flat = flatten(scores)
    assert torch.equal(flat, torch.cat([scores[n].reshape(-1) for n in ("a", "b", "c")]))
    back = unflatten(flat, scores)
    assert back.keys() == scores.keys() and all(torch.equal(back[n], scores[n]) for n in scores)
