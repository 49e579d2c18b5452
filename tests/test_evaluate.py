"""Which merges are measured and how: subsets, intervals, shares of images, and a tower that is
merged without drift.
"""

import copy
import itertools
import math

import pytest
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.maths.counts import Count, even_grid, mean, wilson
from raytvb.maths.subsets import SUBSETS_PER_SIZE, edge, nested_order, task_subsets
from raytvb.maths.task_vector import TaskVector
from raytvb.models.evaluator import BATCH, Evaluator

CPU = torch.device("cpu")
PREPROCESS = Preprocess(4, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), {})


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (8, [1, 2, 4, 8]), (16, [1, 4, 8, 16])],
)
def test_subsets_have_the_sizes_one_quarter_half_and_all(count: int, sizes: list[int]) -> None:
    for seed in range(3):
        subsets = task_subsets(count, seed)
        assert list(subsets) == sizes
        assert subsets[1] == [(t,) for t in range(count)]  # every task once
        assert subsets[count] == [tuple(range(count))]
        for size, chosen in subsets.items():
            assert len(chosen) == len(set(chosen))
            assert all(
                len(s) == size and list(s) == sorted(set(s)) and set(s) <= set(range(count))
                for s in chosen
            )
            if 1 < size < count:
                assert len(chosen) == min(SUBSETS_PER_SIZE, math.comb(count, size))


def test_subsets_are_seeded() -> None:
    assert task_subsets(16, 7) == task_subsets(16, 7)
    drawn = [str(task_subsets(16, seed)) for seed in range(5)]
    assert len(set(drawn)) == 5


def test_subsets_reach_every_task() -> None:
    seen = {t for seed in range(20) for s in task_subsets(16, seed)[4] for t in s}
    assert seen == set(range(16))


@pytest.mark.parametrize(
    ("correct", "total"),
    [(0, 1), (1, 1), (0, 300), (300, 300), (0, 11), (1, 300), (157, 300), (890, 960)],
)
def test_the_interval_is_wilsons(correct: int, total: int) -> None:
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    z = 1.959963984540054
    assert wilson(Count(correct, total), z) == pytest.approx(
        (expected.low, expected.high), abs=1e-12
    )
    assert wilson(Count(correct, total)) == pytest.approx((expected.low, expected.high), abs=2e-5)
    low, high = wilson(Count(correct, total))
    assert 0.0 <= low <= correct / total <= high <= 1.0


def test_accuracy_is_a_share_and_the_mean_ignores_the_order() -> None:
    assert Count(3, 4).accuracy == 0.75
    values = [1e16, 1.0, -1e16, 0.1, 0.2, 0.3]
    assert mean(values) == mean(values[::-1]) == math.fsum(values) / 6


def tower(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(20, 6))


def head(classes: int, seed: int) -> Tensor:
    return torch.randn(classes, 6, generator=torch.Generator().manual_seed(seed))


def split(count: int, classes: int, seed: int) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return Split(
        images,
        torch.randint(classes, (count,), generator=generator),
        tuple(map(str, range(classes))),
    )


def a_mask(density: float = 0.3) -> dict[str, Tensor]:
    """A mask of the tower's parameters by their open_clip names. It keeps nothing of the
    convolution's bias.
    """
    generator = torch.Generator().manual_seed(5)
    mask = {
        f"visual.{n}": torch.rand(p.shape, generator=generator) < density
        for n, p in tower().named_parameters()
    }
    mask["visual.0.bias"][:] = False
    return mask


def state(net: nn.Module) -> dict[str, Tensor]:
    return {f"visual.{n}": p.detach().clone() for n, p in net.named_parameters()}


def evaluator(net: nn.Module, mask: dict[str, Tensor] | None, precision: str = "fp32") -> Evaluator:
    heads, splits = (
        {"a": head(4, 1), "b": head(3, 2)},
        {"a": split(40, 4, 3), "b": split(BATCH + 30, 3, 4)},
    )
    return Evaluator(net, heads, splits, PREPROCESS, mask=mask, device=CPU, precision=precision)


def a_direction(mask: dict[str, Tensor] | None, seed: int = 8) -> tuple[Tensor, TaskVector]:
    """A direction in the form that the evaluator takes, and the same direction as a task vector of
    whole tensors.
    """
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
        data, correct, expected, said = split(count, classes, seeds[1]), 0, 0.0, []
        for image, label in zip(data.images, data.labels, strict=True):
            pixels = (image / 255 - torch.tensor(PREPROCESS.mean)[:, None, None]) / torch.tensor(
                PREPROCESS.std
            )[:, None, None]
            feature = reference(pixels[None])[0]
            similar = [float(feature @ row / feature.norm()) for row in head(classes, seeds[0])]
            said.append(similar.index(max(similar)))
            correct += said[-1] == int(label)
            expected += math.exp(similar[int(label)]) / math.fsum(map(math.exp, similar))
        found = made.count(task)
        assert found == Count(correct, count) and 0 < correct < count
        assert found.expected == pytest.approx(expected, rel=1e-5)
        answers, labels = made.answers(task)
        assert (
            answers.tolist() == said
            and torch.equal(labels, data.labels)
            and labels.dtype == torch.int64
        )


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


def test_counts_add_up_and_are_compared_by_their_answers() -> None:
    total = Count(3, 4, 2.5) + Count(1, 6, 0.25) + Count(0, 0)
    assert (total.correct, total.total, total.expected) == (4, 10, 2.75)
    assert total == Count(4, 10) != Count(4, 11) and Count(5, 10) != total


def test_the_order_of_a_tasks_images_is_its_own_and_the_same_everywhere() -> None:
    names = ("a", "b", "glyphs/greek-blur", "é")
    orders = {n: nested_order(n, 500).tolist() for n in names}
    assert all(sorted(o) == list(range(500)) for o in orders.values())
    assert len({tuple(o) for o in orders.values()}) == len(names)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    assert {n: nested_order(n, 500).tolist() for n in names} == orders
    assert torch.equal(torch.random.get_rng_state(), before)
    # A quarter of a random permutation has about a quarter of any part of the images.
    assert all(80 < sum(k < 250 for k in o[:200]) < 120 for o in orders.values())
    # The seed must be the same in every process, which `hash` is not.
    seed = torch.Generator().manual_seed(0xE8B7BE43)  # the CRC-32 of "a"
    assert orders["a"] == torch.randperm(500, generator=seed).tolist()


def test_the_edge_of_a_share_is_at_least_one_image_and_all_at_one() -> None:
    shares = [k / 64 for k in range(65)]
    for count in (1, 2, 3, 7, 10, 300, 1001):
        edges = [edge(s, count) for s in shares]
        assert edges == sorted(edges) and edges[0] == 0 and edges[1] >= 1 and edges[-1] == count
        assert all(abs(e - s * count) <= 0.5 or e == 1 for e, s in zip(edges, shares, strict=True))
    assert edge(1e-9, 5) == 1


SHARES = [(0.25, 1.0), (0.1, 0.5, 1.0), (0.01, 0.011, 0.9, 1.0), (1.0,)]


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parts_from_share_to_share_are_all_images_once(
    shares: tuple[float, ...], precision: str
) -> None:
    made = evaluator(tower(), None, precision)
    for task, count in (("a", 40), ("b", BATCH + 30)):
        whole, labels = made.answers(task)
        assert len(whole) == len(labels) == count
        parts = [made.answers(task, *between) for between in itertools.pairwise((0.0, *shares))]
        counts = [made.count(task, *between) for between in itertools.pairwise((0.0, *shares))]
        assert [c.total for c in counts] == [len(p) for p, _ in parts]
        assert counts == [Count(int((p == q).sum()), len(q)) for p, q in parts]
        order = nested_order(task, count) if len(shares) > 1 else torch.arange(count)
        assert torch.equal(torch.cat([q for _, q in parts]), labels[order])
        assert torch.equal(torch.cat([p for p, _ in parts]), whole[order])
        assert (
            sum(counts, Count(0, 0))
            == made.count(task)
            == Count(int((whole == labels).sum()), count)
        )
        assert sum(c.expected for c in counts) == pytest.approx(made.count(task).expected, rel=1e-5)


def test_a_share_is_a_part_of_every_larger_one() -> None:
    made = evaluator(tower(), None)
    larger = made.answers("b", 0.0, 0.6)
    smaller = made.answers("b", 0.0, 0.2)
    assert all(torch.equal(s, t[: len(s)]) for s, t in zip(smaller, larger, strict=True))
    assert len(smaller[0]) == round(0.2 * (BATCH + 30)) < len(larger[0])


def test_an_empty_share_of_few_images_counts_nothing() -> None:
    made = Evaluator(
        tower(), {"one": head(4, 1)}, {"one": split(1, 4, 3)}, PREPROCESS, mask=None, device=CPU
    )
    assert made.count("one", 0.0, 0.25) == made.count("one")
    images = made.images
    empty = made.count("one", 0.25, 1.0)
    assert (empty.correct, empty.total, empty.expected) == (0, 0, 0.0) and made.images == images
    answers, labels = made.answers("one", 0.25, 1.0)
    assert len(answers) == len(labels) == 0 and answers.dtype == labels.dtype == torch.int64


def test_images_that_went_through_the_tower_are_counted() -> None:
    made = evaluator(tower(), None)
    seen = []
    hook = made._tower.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    made.count("a")
    made.count("a", 0.0, 0.25)
    made.answers("b", 0.25, 1.0)
    made.zero_shot("b")
    made.zero_shot("b")  # from before
    assert made.images == sum(seen) == 40 + 10 + (BATCH + 30 - round((BATCH + 30) / 4)) + BATCH + 30
    assert max(seen) == BATCH
    hook.remove()


class WithTokens(nn.Module):
    """A tower that returns its tokens as well."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = tower()

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        return self.inner(pixels), pixels


def test_a_tower_that_gives_tokens_as_well() -> None:
    assert evaluator(WithTokens(), None).count("b") == evaluator(tower(), None).count("b")


@pytest.mark.parametrize("masked", [False, True])
def test_bf16_keeps_most_answers_and_the_weights_in_float32(masked: bool) -> None:
    mask = a_mask() if masked else None
    nets = tower(), tower()
    exact, rough = (evaluator(n, mask, p) for n, p in zip(nets, ("fp32", "bf16"), strict=True))
    differ = 0
    for direction, alpha in (
        (None, 0.0),
        (a_direction(mask)[0], 0.5),
        (a_direction(mask, 3)[0], -1.0),
    ):
        for each in (exact, rough):
            each.merge(direction, alpha)
        assert all(
            torch.equal(t, state(nets[1])[n]) and t.dtype == torch.float32
            for n, t in state(nets[0]).items()
        )
        for task in ("a", "b"):
            left, right = exact.answers(task)[0], rough.answers(task)[0]
            differ += int((left != right).sum())
            assert (left == right).float().mean() > 0.9
            assert rough.count(task).expected == pytest.approx(exact.count(task).expected, rel=0.02)
            assert rough.count(task).expected != exact.count(task).expected  # else it was not bf16
    assert differ < 0.05 * 3 * (70 + BATCH)


def test_after_a_direction_over_all_parameters_a_masked_one_starts_from_the_pretrained_values() -> (
    None
):
    mask, net, base = a_mask(), tower(), state(tower())
    merged = evaluator(net, mask)
    generator = torch.Generator().manual_seed(2)
    kept, whole = [a_direction(mask, s) for s in (8, 9)], [a_direction(None, s) for s in (10, 11)]
    last = None
    for _ in range(300):
        draw = int(torch.randint(5, (), generator=generator))
        alpha = float(torch.rand((), generator=generator)) * 4 - 2
        if draw == 4:
            merged.merge(None)
            expected = base
        else:
            direction, vector = [*kept, *whole][draw]
            merged.merge(direction, alpha)
            expected = vector.apply(base, alpha)
        found = state(net)
        assert all(torch.equal(t, found[n]) for n, t in expected.items()), (last, draw)
        last = draw


def test_a_count_after_a_whole_direction_is_that_of_a_fresh_tower() -> None:
    mask = a_mask()
    kept, whole = a_direction(mask)[0], a_direction(None, 9)[0]
    used = evaluator(tower(), mask)
    used.merge(whole, 2.0)
    far = used.count("b")
    assert used.zero_shot("b") == evaluator(tower(), mask).count("b") != far
    used.merge(whole, 2.0)
    used.merge(kept, 1.0)
    fresh = evaluator(tower(), mask)
    fresh.merge(kept, 1.0)
    assert used.count("b") == fresh.count("b") and used.answers("b")[0].equal(fresh.answers("b")[0])


def test_a_mask_that_keeps_all_is_as_no_mask() -> None:
    everything = {n: torch.ones_like(t, dtype=torch.bool) for n, t in state(tower()).items()}
    direction, vector = a_direction(None, 4)
    net = tower()
    merged = evaluator(net, everything)
    for alpha in (0.5, -1.0):
        merged.merge(direction, alpha)
        assert all(
            torch.equal(t, state(net)[n]) for n, t in vector.apply(state(tower()), alpha).items()
        )
        merged.merge(None)
        assert all(torch.equal(t, state(net)[n]) for n, t in state(tower()).items())


def test_a_direction_of_another_length_is_refused() -> None:
    for mask in (None, a_mask()):
        with pytest.raises((RuntimeError, ValueError)):
            evaluator(tower(), mask).merge(torch.zeros(7), 1.0)


@pytest.mark.parametrize(("low", "high", "points"), [(0.0, 4.0, 21), (-1.0, 2.0, 7), (0.1, 0.3, 2)])
def test_a_grid_is_even_and_has_both_ends(low: float, high: float, points: int) -> None:
    grid = even_grid(low, high, points)
    assert len(grid) == points and grid[0] == low and grid[-1] == pytest.approx(high, rel=1e-15)
    steps = [b - a for a, b in itertools.pairwise(grid)]
    assert steps == pytest.approx([(high - low) / (points - 1)] * (points - 1), rel=1e-9)
