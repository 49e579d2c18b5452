"""Which merges are measured and how: subsets, intervals, line search, and a tower that is merged without drift."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from raytvb.data import Split
from raytvb.encoder import Preprocess
from raytvb.evaluate import (
    BATCH,
    LADDER,
    SUBSETS_PER_SIZE,
    Count,
    Evaluator,
    best_coefficient,
    climb,
    coefficient_ladder,
    mean,
    task_subsets,
    wilson,
)
from raytvb.task_vector import TaskVector

CPU = torch.device("cpu")
PREPROCESS = Preprocess(4, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), {})


@pytest.mark.parametrize(("count", "sizes"), [
    (1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (8, [1, 2, 4, 8]), (16, [1, 4, 8, 16])])
def test_subsets_have_the_sizes_one_quarter_half_and_all(count: int, sizes: list[int]) -> None:
    for seed in range(3):
        subsets = task_subsets(count, seed)
        assert list(subsets) == sizes
        assert subsets[1] == [(t,) for t in range(count)]  # every task once
        assert subsets[count] == [tuple(range(count))]
        for size, chosen in subsets.items():
            assert len(chosen) == len(set(chosen))
            assert all(len(s) == size and list(s) == sorted(set(s)) and set(s) <= set(range(count)) for s in chosen)
            if 1 < size < count:
                assert len(chosen) == min(SUBSETS_PER_SIZE, math.comb(count, size))


def test_subsets_are_seeded() -> None:
    assert task_subsets(16, 7) == task_subsets(16, 7)
    drawn = [str(task_subsets(16, seed)) for seed in range(5)]
    assert len(set(drawn)) == 5


def test_subsets_reach_every_task() -> None:
    seen = {t for seed in range(20) for s in task_subsets(16, seed)[4] for t in s}
    assert seen == set(range(16))


@pytest.mark.parametrize(("correct", "total"), [
    (0, 1), (1, 1), (0, 300), (300, 300), (0, 11), (1, 300), (157, 300), (890, 960)])
def test_the_interval_is_wilsons(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    z = 1.959963984540054
    assert wilson(Count(correct, total), z) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert wilson(Count(correct, total)) == pytest.approx((expected.low, expected.high), abs=2e-5)
    low, high = wilson(Count(correct, total))
    assert 0.0 <= low <= correct / total <= high <= 1.0


def test_accuracy_is_a_share_and_the_mean_ignores_the_order() -> None:
    assert Count(3, 4).accuracy == 0.75
    values = [1e16, 1.0, -1e16, 0.1, 0.2, 0.3]
    assert mean(values) == mean(values[::-1]) == math.fsum(values) / 6


def counted(function: Callable[[float], float]) -> tuple[list[float], Callable[[float], float]]:
    seen: list[float] = []

    def value(point: float) -> float:
        seen.append(point)
        return function(point)

    return seen, value


@pytest.mark.parametrize("rungs", range(1, 10))
def test_climbing_finds_the_maximum_wherever_it_lies(rungs: int) -> None:
    ladder = [0.1 * 1.5**r for r in range(rungs)]
    for peak in range(rungs):
        for start in range(rungs):
            seen, value = counted(lambda a, top=ladder[peak]: -abs(math.log(a / top)))
            tried = climb(ladder, start, value)
            assert best_coefficient(tried) == ladder[peak]
            assert len(seen) == len(set(seen)) and seen[0] == ladder[start]
            assert sorted(tried) == sorted(seen) and all(tried[a] == -abs(math.log(a / ladder[peak])) for a in tried)
            assert len(seen) <= abs(peak - start) + 3  # the way there, and a look at each side


@pytest.mark.parametrize("start", range(6))
def test_climbing_stops_on_a_plateau_at_the_smallest_of_equals(start: int) -> None:
    """Where merging changes nothing any more, the smaller coefficient is taken from above."""
    values = [0.2, 0.5, 0.8, 0.8, 0.8, 0.1]
    ladder = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    seen, value = counted(lambda a: values[ladder.index(a)])
    tried = climb(ladder, start, value)
    assert tried[best_coefficient(tried)] == 0.8 and len(seen) == len(set(seen))
    if start <= 4:
        assert best_coefficient(tried) == 3.0


def test_the_best_coefficient_is_the_smallest_of_equals() -> None:
    assert best_coefficient({0.5: 0.7, 0.25: 0.9, 1.0: 0.9, 0.75: 0.8}) == 0.25
    assert best_coefficient({2.0: 0.0}) == 2.0


@pytest.mark.parametrize("size", [1, 3, 16])
def test_the_ladder_is_multiples_of_one_over_the_size_within_the_limits(size: int) -> None:
    assert coefficient_ladder(size, 0.0, 100.0) == pytest.approx([m / size for m in LADDER])
    for low, high in [(0.0, 2.0), (0.0, 0.05), (0.1, 0.5), (1.0, 1.5)]:
        ladder = coefficient_ladder(size, low, high)
        assert ladder == sorted(set(ladder)) and len(ladder) >= 1
        assert all(low <= a <= high and a > 0.0 for a in ladder)


def tower(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(20, 6))


def head(classes: int, seed: int) -> Tensor:
    return torch.randn(classes, 6, generator=torch.Generator().manual_seed(seed))


def split(count: int, classes: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return Split(images, torch.randint(classes, (count,), generator=generator), tuple(map(str, range(classes))))


def a_mask(density: float = 0.3) -> dict[str, Tensor]:
    """Of the tower's parameters by their open_clip names; nothing of the convolution's bias."""
    generator = torch.Generator().manual_seed(5)
    mask = {f"visual.{n}": torch.rand(p.shape, generator=generator) < density for n, p in tower().named_parameters()}
    mask["visual.0.bias"][:] = False
    return mask


def state(net: nn.Module) -> dict[str, Tensor]:
    return {f"visual.{n}": p.detach().clone() for n, p in net.named_parameters()}


def evaluator(net: nn.Module, mask: dict[str, Tensor] | None) -> Evaluator:
    heads, splits = {"a": head(4, 1), "b": head(3, 2)}, {"a": split(40, 4, 3), "b": split(BATCH + 30, 3, 4)}
    return Evaluator(net, heads, splits, PREPROCESS, mask=mask, device=CPU)


def a_direction(mask: dict[str, Tensor] | None, seed: int = 8) -> tuple[Tensor, TaskVector]:
    """A direction as the evaluator takes it, and the same as a task vector of whole tensors."""
    generator = torch.Generator().manual_seed(seed)
    whole = {n: torch.randn(t.shape, generator=generator) for n, t in state(tower()).items()}
    if mask is not None:
        whole = {n: t * mask[n] for n, t in whole.items()}
    kept = [whole[n].reshape(-1) if mask is None else whole[n][mask[n]] for n in sorted(whole)]
    return torch.cat(kept), TaskVector(whole)


@pytest.mark.parametrize("masked", [False, True])
def test_merging_is_applying_the_vector(masked: bool) -> None:
    mask = a_mask() if masked else None
    net, base = tower(), state(tower())
    direction, vector = a_direction(mask)
    merged = evaluator(net, mask)
    for alpha in (1.0, -0.7, 1 / 3):
        merged.merge(direction, alpha)
        expected = vector.apply(base, alpha)
        assert all(torch.equal(t, expected[n]) for n, t in state(net).items())
        assert not all(torch.equal(t, base[n]) for n, t in state(net).items())


@pytest.mark.parametrize("masked", [False, True])
def test_a_thousand_merges_leave_no_drift(masked: bool) -> None:
    mask = a_mask() if masked else None
    net, base = tower(), state(tower())
    merged = evaluator(net, mask)
    generator = torch.Generator().manual_seed(0)
    direction, _ = a_direction(mask)
    others = [a_direction(mask, seed)[0] for seed in range(5)]
    for number in range(1000):
        merged.merge(others[number % 5], float(torch.rand((), generator=generator)) * 4 - 2)
    merged.merge(direction, 0.5)
    first = state(net)
    merged.merge(None)
    assert all(torch.equal(t, base[n]) for n, t in state(net).items())
    evaluator(again := tower(), mask).merge(direction, 0.5)
    assert all(torch.equal(t, first[n]) for n, t in state(again).items())


@torch.no_grad()
def test_counting_compares_the_most_similar_class_with_the_label() -> None:
    net = tower()
    reference = copy.deepcopy(net)
    made = evaluator(net, None)
    for task, classes, count, seeds in (("a", 4, 40, (1, 3)), ("b", 3, BATCH + 30, (2, 4))):
        data, correct = split(count, classes, seeds[1]), 0
        for image, label in zip(data.images, data.labels, strict=True):
            pixels = (image / 255 - torch.tensor(PREPROCESS.mean)[:, None, None]) / torch.tensor(
                PREPROCESS.std)[:, None, None]
            feature = reference(pixels[None])[0]
            similar = [float(feature @ row / feature.norm()) for row in head(classes, seeds[0])]
            correct += similar.index(max(similar)) == int(label)
        assert made.count(task) == Count(correct, count)
        assert 0 < correct < count


def test_zero_shot_is_that_of_the_pretrained_tower_whatever_was_merged_before() -> None:
    net = tower()
    made, direction = evaluator(net, None), a_direction(None)[0]
    expected = {task: made.count(task) for task in ("a", "b")}
    made.merge(direction, 3.0)
    assert any(made.count(task) != expected[task] for task in ("a", "b"))
    for task in ("a", "b", "a"):
        made.merge(direction, 3.0)
        assert made.zero_shot(task) == expected[task]
        assert all(torch.equal(t, state(tower())[n]) for n, t in state(net).items())
