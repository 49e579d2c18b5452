"""The rounds of a candidate on a small store: what is measured, once, and that only the candidate
decides it.
"""

import itertools
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vector_files import flat, put_vector, values_of

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.experiment.basis_specs import sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.searching import MERGES
from raytvb.experiment.stored import write_coefficients
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.counts import Count, even_grid, mean
from raytvb.maths.merge_methods import MATRIX_METHODS, UNSCALED
from raytvb.maths.subsets import edge, task_subsets
from raytvb.models.evaluator import Evaluator
from raytvb.search.additions import Additions
from raytvb.search.candidates import (
    FULL,
    ZERO_SHOT,
    Candidate,
    basis_candidates,
    merge_candidates,
    random_candidates,
)
from raytvb.search.directions import method_direction
from raytvb.search.size_class import Setting, SizeClass, first_round, lengths_to_try
from raytvb.search.trial import CandidateSearch, objective
from raytvb.storage.basis_writer import write_combinations
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.masks import Mask
from raytvb.storage.store import Store
from raytvb.suite.glyphs import task_names

COUNT, CLASSES, SIZE = 5, 3, 2
NAMES = task_names()[:COUNT]
IMAGES = dict(zip(NAMES, (37, 20, 5, 1, 24), strict=True))
PREPROCESS = Preprocess(4, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), {})
PARAMETERS = {
    "visual.0.weight": (5, 3, 3, 3),
    "visual.0.bias": (5,),
    "visual.3.weight": (6, 20),
    "visual.3.bias": (6,),
}


def tower() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(20, 6))


def evaluator(mask: Mapping[str, Tensor] | None) -> Evaluator:
    generator = torch.Generator().manual_seed(1)
    splits = {
        n: Split(
            torch.randint(0, 256, (k, 3, 4, 4), generator=generator, dtype=torch.uint8),
            torch.randint(CLASSES, (k,), generator=generator),
            ("a", "b", "c"),
        )
        for n, k in IMAGES.items()
    }
    heads = {n: torch.randn(CLASSES, 6, generator=generator) for n in NAMES}
    return Evaluator(tower(), heads, splits, PREPROCESS, mask=mask, device=torch.device("cpu"))


class Small:
    """A store with the vectors of five tasks and a basis of two; their reference V (D or kept, T)
    float64.
    """

    def __init__(self, folder: Path, masked: bool) -> None:
        self.store, self.mask = Store(str(folder)), None
        if masked:
            generator = torch.Generator().manual_seed(2)
            self.mask = Mask.of(
                {n: torch.rand(s, generator=generator) < 0.4 for n, s in PARAMETERS.items()}
            )
        values = [
            {n: 0.3 * v for n, v in values_of(PARAMETERS, 10 + t).items()} for t in range(COUNT)
        ]
        keys = [put_vector(self.store, n, v, self.mask) for n, v in zip(NAMES, values, strict=True)]
        columns = [flat(v) if self.mask is None else flat(v)[self.mask.bits] for v in values]
        self.V = torch.stack(columns, dim=1)
        self.gram = self.V.T @ self.V
        self.fit = fit_basis(self.gram, SIZE, method="ae-anchored")
        prefix = f"basis/ae-anchored-m{SIZE}"
        write_combinations(
            [self.store.where(k) for k in keys], {prefix: self.fit.B}, self.store.url
        )
        self.store.write(
            f"{prefix}/coefficients.safetensors", write_coefficients(self.fit.B, self.fit.W)
        )
        GramWriter(self.store).append(GramState(), [(n, "checksum") for n in NAMES], self.gram, [])
        decoded = self.V @ self.fit.B @ self.fit.W
        self.ratios = self.V.norm(dim=0) / decoded.norm(dim=0)

    def asked(self, **search: Any) -> Experiment:
        return parse_experiment(
            {
                "store": self.store.url,
                "tasks": list(NAMES),
                "talos": {} if self.mask else {"density": 1.0},
                "basis": {"method": "ae-anchored"},
                "search": {"sizes": [SIZE], **search},
            }
        )

    def evaluator(self) -> Evaluator:
        return evaluator(self.mask.tensors() if self.mask else None)

    def candidates(self) -> dict[str, Candidate]:
        found = [
            ZERO_SHOT,
            FULL,
            *basis_candidates(self.asked()),
            *random_candidates(self.asked(), self.gram),
            *merge_candidates(self.asked(merges=["ties", "tsv-m"])),
            Candidate(f"ae-anchored-m{SIZE}-sum", "sum", "ae-anchored", SIZE),
        ]
        return {c.name: c for c in found}


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("masked"), True)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("dense"), False)


@pytest.fixture(params=["masked", "dense"])
def small(request: pytest.FixtureRequest) -> Small:
    return request.getfixturevalue(request.param)


CANDIDATES = (
    "zero-shot",
    "full",
    "ae-anchored-m2",
    "ae-anchored-m2-sum",
    "random-own-m2",
    "random-lstsq-m2",
    "full-ties",
    "full-tsv-m",
    "ae-anchored-m2-tsv-m",
)
SUBSETS = task_subsets(COUNT, 0)


def subsets_of(small: Small, candidate: Candidate) -> list[tuple[int, ...]]:
    """Some that the candidate can add."""
    return list(candidate.subsets({2: SUBSETS[2], COUNT: SUBSETS[COUNT]})[COUNT]) + (
        [] if candidate.kind == "sum" else SUBSETS[2]
    )


def expected_direction(
    small: Small, candidate: Candidate, subset: Sequence[int], own: bool = False
) -> Tensor | None:
    """What a subset adds up to, of whole vectors in memory; for other merges by
    `method_direction`.
    """
    if candidate.kind == "zero-shot":
        return None
    V, table = small.V, torch.eye(COUNT, dtype=torch.float64)
    if candidate.kind == "decoded":
        table = small.fit.B @ small.fit.W * (small.ratios if own else 1.0)
    elif candidate.kind == "sum":
        return V @ small.fit.B.sum(dim=1)
    elif candidate.table is not None:
        table = torch.tensor(candidate.table, dtype=torch.float64)
    if candidate.merge == "sum":
        return V @ table[:, list(subset)].sum(dim=1)
    vectors, stored = candidate.open(small.asked())
    return method_direction(vectors, stored[:, list(subset)], candidate.merge, seed=0).double()


# Additions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES)
def test_directions_are_what_subsets_add_up_to(small: Small, name: str) -> None:
    candidate = small.candidates()[name]
    additions, subsets = (
        Additions(small.asked(), candidate, small.evaluator()),
        subsets_of(small, candidate),
    )
    for _ in range(2):  # read, then held
        found = list(additions.directions(subsets))
        assert len(found) == len(subsets)
        for direction, subset in zip(found, subsets, strict=True):
            expected = expected_direction(small, candidate, subset)
            assert (direction is None) == (expected is None)
            if direction is not None and expected is not None:
                assert direction.dtype == torch.float32
                torch.testing.assert_close(direction.double(), expected, rtol=1e-4, atol=1e-5)
    assert all(a is b for a, b in zip(found, additions.directions(subsets), strict=True))
    assert all(
        a is None or a.untyped_storage().nbytes() == a.nbytes for a in found
    )  # and nothing beside it
    every = small.mask is not None and candidate.merge in MATRIX_METHODS
    if found[0] is not None:
        assert len(found[0]) == (
            sum(map(math.prod, PARAMETERS.values())) if every else len(small.V)
        )


def test_decoded_vectors_may_have_the_lengths_of_the_task_vectors(small: Small) -> None:
    candidate = small.candidates()["ae-anchored-m2"]
    additions, subsets = (
        Additions(small.asked(), candidate, small.evaluator()),
        [*SUBSETS[1], *SUBSETS[2]],
    )
    for own in (True, False, False, True, True):
        for direction, subset in zip(additions.directions(subsets, own), subsets, strict=True):
            expected = expected_direction(small, candidate, subset, own)
            assert direction is not None and expected is not None
            torch.testing.assert_close(direction.double(), expected, rtol=1e-4, atol=1e-5)
            if own and len(subset) == 1:
                assert float(direction.norm()) == pytest.approx(
                    float(small.V[:, subset[0]].norm()), rel=1e-5
                )
    assert float((small.ratios - 1.0).abs().max()) > 0.01  # else both were the same


@pytest.mark.parametrize("name", CANDIDATES)
def test_only_decoded_vectors_have_two_lengths(masked: Small, name: str) -> None:
    candidate, two = masked.candidates()[name], name == "ae-anchored-m2"
    for lengths, expected in (("projected", (False,)), ("own", (True,)), ("auto", (False, True))):
        asked = masked.asked(lengths=lengths)
        assert lengths_to_try(asked, candidate, 2) == (expected if two else (False,))
        full = lengths_to_try(asked, candidate, COUNT)
        assert full == ((lengths == "own",) if two else (False,))


def test_directions_of_other_subsets_are_not_those_that_are_held(small: Small) -> None:
    additions = Additions(small.asked(), FULL, small.evaluator())
    rng = random.Random(0)
    for _ in range(20):
        subsets = [
            tuple(sorted(rng.sample(range(COUNT), rng.randrange(1, COUNT))))
            for _ in range(rng.randrange(1, 4))
        ]
        found = additions.directions(subsets)
        if rng.random() < 0.3:
            next(found)  # and no further: nothing may be held of that
            continue
        for direction, subset in zip(found, subsets, strict=True):
            torch.testing.assert_close(
                direction.double(), small.V[:, list(subset)].sum(dim=1), rtol=1e-4, atol=1e-5
            )


def test_directions_that_are_too_large_to_hold_are_made_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.search.additions.COMBINED_BYTES", 4 * 2 * len(small.V))
    additions = Additions(small.asked(), FULL, small.evaluator())
    for subsets, held in ((SUBSETS[1], False), (SUBSETS[1][:2], True), (SUBSETS[1][:3], False)):
        first, second = list(additions.directions(subsets)), list(additions.directions(subsets))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert [
            a.data_ptr() == b.data_ptr()
            for a, b in zip(additions.directions(subsets), second, strict=True)
        ] == ([held] * len(subsets))


def fresh_count(small: Small, direction: Tensor | None, alpha: float, task: int) -> Count:
    """On a tower that nothing was merged into before."""
    fresh = small.evaluator()
    fresh.merge(direction, alpha)
    return fresh.count(NAMES[task])


@pytest.mark.parametrize("name", CANDIDATES)
def test_counts_are_those_of_a_fresh_tower(small: Small, name: str) -> None:
    candidate, used = small.candidates()[name], small.evaluator()
    additions, subsets = Additions(small.asked(), candidate, used), subsets_of(small, candidate)
    for alpha in (0.5, -1.0):
        directions = list(additions.directions(subsets))
        for counts, subset, direction in zip(
            additions.counts(subsets, alpha), subsets, directions, strict=True
        ):
            assert counts == {NAMES[t]: fresh_count(small, direction, alpha, t) for t in subset}
            assert list(counts) == [NAMES[t] for t in subset]


def test_vectors_that_add_up_to_what_is_not_finite_are_named(tmp_path: Path) -> None:
    small = Small(tmp_path, False)
    put_vector(small.store, NAMES[1], {n: torch.full(s, 3e38) for n, s in PARAMETERS.items()})
    put_vector(small.store, NAMES[2], {n: torch.full(s, 3e38) for n, s in PARAMETERS.items()})
    additions = Additions(small.asked(), FULL, small.evaluator())
    assert len(list(additions.directions([(0,), (1,), (2, 3)]))) == 3
    with pytest.raises(ValueError, match="full: its vectors add up to NaN or infinite values"):
        list(additions.directions([(0,), (1, 2)]))


@pytest.mark.parametrize("per_basis", [False, True])
def test_equal_weights_say_the_same_as_one_coefficient(small: Small, per_basis: bool) -> None:
    for name, length in (("full", COUNT), ("ae-anchored-m2", SIZE)):
        additions = Additions(small.asked(), small.candidates()[name], small.evaluator())
        for alpha in (0.2, 0.7):
            own = alpha > 0.5 and name != "full"
            weights = additions.start_weights(alpha, own=own, per_basis=per_basis)
            assert weights.shape == (length if per_basis else COUNT,)
            (weighted,) = additions.weighted(weights, per_basis=per_basis)
            (one,) = additions.counts(SUBSETS[COUNT], alpha, own)
            for task in NAMES:
                assert (
                    abs(weighted[task].correct - one[task].correct) <= 1
                )  # sums of floats in another order
                assert weighted[task].expected == pytest.approx(one[task].expected, rel=1e-4)


def test_weights_are_of_the_tasks_or_of_the_stored_vectors(small: Small) -> None:
    generator = torch.Generator().manual_seed(3)
    additions = Additions(small.asked(), small.candidates()["ae-anchored-m2"], small.evaluator())
    for per_basis, length in ((False, COUNT), (True, SIZE)):
        weights = torch.randn(length, generator=generator, dtype=torch.float64)
        direction = small.V @ small.fit.B @ (weights if per_basis else small.fit.W @ weights)
        (found,) = additions.weighted(weights, per_basis=per_basis)
        for t, task in enumerate(NAMES):
            expected = fresh_count(small, direction.float(), 1.0, t)
            assert (
                abs(found[task].correct - expected.correct) <= 1
                and found[task].total == expected.total
            )
            assert found[task].expected == pytest.approx(expected.expected, rel=1e-4)


# Size classes -------------------------------------------------------------------------------------

SHARES = ((0.25, 1.0), (0.1, 0.3, 0.7, 1.0), (1.0,))


@pytest.mark.parametrize("shares", SHARES)
def test_a_value_does_not_depend_on_what_was_measured_when(
    small: Small, shares: tuple[float, ...]
) -> None:
    """On the last share it is that of a direct count of all images; nothing goes through the tower
    twice.
    """
    rng, settings = random.Random(len(shares)), [(0.1, False), (0.4, True), (0.4, False)]
    candidate, direct = small.candidates()["ae-anchored-m2"], {}
    for size, setting in itertools.product((2, COUNT), settings):
        counts = Additions(small.asked(), candidate, small.evaluator()).counts(
            SUBSETS[size], *setting
        )
        direct[size, setting] = [c for found in counts for c in found.values()]
    before: dict[Any, tuple[float, float]] = {}
    for _ in range(2):
        used = small.evaluator()
        additions = Additions(small.asked(), candidate, used)
        classes = {s: SizeClass(additions, SUBSETS[s], shares) for s in (2, COUNT)}
        calls = [(s, a, n) for s in classes for a in settings for n in range(1, len(shares) + 1)]
        measured = set()
        for size, setting, number in rng.sample(calls, len(calls)) + rng.sample(calls, len(calls)):
            first, second = rng.sample((classes[size].value, classes[size].expected), 2)
            values = {f.__name__: f(setting, number) for f in (first, second)}
            pair = values["value"], values["expected"]
            assert pair == before.setdefault((size, setting, number), pair)
            measured |= {(size, setting, n) for n in range(number)}
            edges = (0.0, *shares)
            assert used.images == sum(
                edge(edges[n + 1], IMAGES[NAMES[t]]) - edge(edges[n], IMAGES[NAMES[t]])
                for s, _, n in measured
                for subset in SUBSETS[s]
                for t in subset
            )
        for (size, setting), counts in direct.items():
            row = classes[size].row(size, setting, len(shares))
            total = sum(counts, Count(0, 0))
            assert (
                row["accuracy"]
                == classes[size].value(setting, len(shares))
                == mean([c.accuracy for c in counts])
            )
            assert row["expected"] == pytest.approx(
                mean([c.expected / c.total for c in counts]), rel=1e-5
            )
            assert (row["correct"], row["total"]) == (total.correct, total.total)
            assert (row["size"], row["coefficient"], row["own_lengths"]) == (size, *setting)
    assert len({before[COUNT, (0.4, own), len(shares)] for own in (False, True)}) == 2


def test_a_value_of_a_share_is_the_mean_over_tasks_of_the_images_so_far(small: Small) -> None:
    used = small.evaluator()
    size_class = SizeClass(Additions(small.asked(), FULL, used), SUBSETS[2], (0.3, 1.0))
    direct = Additions(small.asked(), FULL, small.evaluator())
    for alpha, (number, share) in itertools.product((0.3, 0.6), enumerate((0.3, 1.0), 1)):
        every = [
            c for found in direct.counts(SUBSETS[2], alpha, stop=share) for c in found.values()
        ]
        assert size_class.value((alpha, False), number) == math.fsum(
            c.correct / c.total for c in every
        ) / len(every)
        assert size_class.expected((alpha, False), number) == pytest.approx(
            math.fsum(c.expected / c.total for c in every) / len(every), rel=1e-5
        )
        assert sum(c.total for c in every) == sum(
            edge(share, IMAGES[NAMES[t]]) for subset in SUBSETS[2] for t in subset
        )


# Rounds -------------------------------------------------------------------------------------------


def run_rounds(
    search: CandidateSearch, rounds: int, counter: Evaluator
) -> list[tuple[dict[str, Any], int]]:
    """Results of the rounds one after the other, each with the images that went through the
    tower.
    """
    found: list[tuple[dict[str, Any], int]] = []
    for number in range(1, rounds + 1):
        before = counter.images
        result = search.round(number, found[-1][0] if found else None)
        found.append((result, counter.images - before))
    return found


ASKED: tuple[dict[str, Any], ...] = (
    {},
    {"shares": [0.1, 0.5, 1.0]},
    {"shares": [1.0], "objective": "all"},
    {"coefficients": {"strategy": "grid", "points": 4}, "objective": "single"},
    {"coefficients": {"low": 0.05, "high": 0.3}, "lengths": "own"},
    {"coefficients": {"vector": "per-task", "trials": 3}, "lengths": "own"},
    {"coefficients": {"vector": "per-basis", "trials": 3}, "shares": [0.3, 0.6, 1.0]},
    {"coefficients": {"vector": "per-basis", "trials": 1}, "lengths": "own"},
)


@pytest.mark.parametrize("asked", ASKED, ids=[json.dumps(a) for a in ASKED])
def test_rounds_depend_on_the_candidate_alone(masked: Small, asked: dict[str, Any]) -> None:
    """A round after a restart, of an object that measured nothing yet, is that of one that went
    through all.
    """
    experiment = masked.asked(**asked)
    rounds = len(experiment.search.shares)
    vector = asked.get("coefficients", {}).get("vector")
    names = (
        ("ae-anchored-m2",)
        if vector
        else ("zero-shot", "ae-anchored-m2", "ae-anchored-m2-sum", "full-tsv-m")
    )
    for name in names:
        candidate, used = masked.candidates()[name], masked.evaluator()
        results = run_rounds(CandidateSearch(experiment, candidate, used), rounds, used)
        assert all(result["images"] == went for result, went in results)
        for number in range(1, rounds + 1):
            known = json.loads(json.dumps(results[number - 2][0])) if number > 1 else None
            disturbed = masked.evaluator()  # by what another candidate did in the same worker
            disturbed.merge(torch.ones(sum(map(math.prod, PARAMETERS.values()))), 1.0)
            fresh = CandidateSearch(experiment, candidate, disturbed).round(number, known)
            assert fresh == results[number - 1][0] == json.loads(json.dumps(fresh))
            assert fresh["share"] == experiment.search.shares[number - 1]
            assert ("vector" in fresh) == (number == rounds and vector is not None)


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        *((n, {}) for n in CANDIDATES),
        *(("full", a) for a in ASKED[1:-2]),
        *(("ae-anchored-m2", a) for a in ASKED[-3:]),
        ("random-lstsq-m2", ASKED[-1]),
        ("ae-anchored-m2-sum", ASKED[3]),
    ],
)
def test_what_a_round_says_is_what_a_direct_count_gives(
    masked: Small, name: str, asked: dict[str, Any]
) -> None:
    experiment, candidate = masked.asked(**asked), masked.candidates()[name]
    used = masked.evaluator()
    results = run_rounds(
        CandidateSearch(experiment, candidate, used), len(experiment.search.shares), used
    )
    limits, direct = (
        experiment.search.coefficients,
        Additions(experiment, candidate, masked.evaluator()),
    )
    sizes = [COUNT] if candidate.kind == "sum" else list(SUBSETS)
    for result, _ in results:
        assert all(
            list(result[k]) == list(map(str, sizes))
            for k in ("coefficient", "own_lengths", "accuracy")
        )
        assert result["evaluations"] == len(result["tried"]) and {
            t["size"] for t in result["tried"]
        } == set(sizes)
        for size in sizes:
            rows = [t for t in result["tried"] if t["size"] == size]
            tried = {(t["coefficient"], t["own_lengths"]): t for t in rows}
            setting = result["coefficient"][str(size)], result["own_lengths"][str(size)]
            assert result["accuracy"][str(size)] == tried[setting]["accuracy"] and len(
                tried
            ) == len(rows)
            assert name == "zero-shot" or all(limits.low <= a <= limits.high for a, _ in tried)
            assert {own for _, own in tried} <= set(lengths_to_try(experiment, candidate, size))
            for some, row in {s: tried[s] for s in (min(tried), setting)}.items():
                counts = [
                    c
                    for found in direct.counts(
                        candidate.subsets(SUBSETS)[size], *some, stop=result["share"]
                    )
                    for c in found.values()
                ]
                total = sum(counts, Count(0, 0))
                assert row["accuracy"] == mean([c.accuracy for c in counts])
                assert (row["correct"], row["total"]) == (total.correct, total.total)
        accuracy = list(result["accuracy"].values())
        assert (
            result["objective"]
            == {
                "subsets": math.fsum(accuracy) / len(accuracy),
                "all": accuracy[-1],
                "single": accuracy[0],
            }[experiment.search.objective]
        )
    last = results[-1][0]
    assert last["share"] == 1.0
    assert ("vector" in last) == (limits.vector != "none" and name in ("full", "ae-anchored-m2"))
    if "vector" in last:
        vector = last["vector"]
        assert vector["kind"] == limits.vector and vector["trials"] == limits.trials
        assert len(vector["weights"]) == (
            SIZE if limits.vector == "per-basis" and candidate.is_basis else COUNT
        )
        assert vector["images"] == limits.trials * sum(IMAGES.values())
        (counts,) = direct.weighted(
            torch.tensor(vector["weights"], dtype=torch.float64),
            per_basis=limits.vector == "per-basis",
        )
        assert vector["accuracy"] == mean([c.accuracy for c in counts.values()])
        start = direct.start_weights(
            last["coefficient"][str(COUNT)],
            own=last["own_lengths"][str(COUNT)],
            per_basis=limits.vector == "per-basis",
        )
        assert limits.trials > 1 or vector["weights"] == start.tolist()
        (counts,) = direct.weighted(start, per_basis=limits.vector == "per-basis")
        assert vector["accuracy"] >= mean([c.accuracy for c in counts.values()])


def test_the_zero_shot_candidate_is_measured_as_it_is(small: Small) -> None:
    used = small.evaluator()
    results = run_rounds(CandidateSearch(small.asked(), ZERO_SHOT, used), 2, used)
    expected = mean([used.zero_shot(n).accuracy for n in NAMES])
    assert all(
        set(r["coefficient"].values()) == {0.0} and len(r["tried"]) == len(SUBSETS)
        for r, _ in results
    )
    assert results[-1][0]["accuracy"]["1"] == results[-1][0]["accuracy"][str(COUNT)] == expected


def test_a_poor_search_on_the_first_share_measures_less_than_all_images(small: Small) -> None:
    used = small.evaluator()
    (first, _), (second, _) = run_rounds(CandidateSearch(small.asked(), FULL, used), 2, used)
    assert len(second["tried"]) < len(first["tried"])
    for size in map(str, SUBSETS):
        seen, again = (
            {(t["coefficient"], t["own_lengths"]) for t in r["tried"] if str(t["size"]) == size}
            for r in (first, second)
        )
        assert again <= seen


def test_the_first_round_of_a_grid_is_its_points(small: Small) -> None:
    asked = small.asked(coefficients={"strategy": "grid", "low": 0.1, "high": 0.9, "points": 5})
    used = small.evaluator()
    size_class = SizeClass(Additions(asked, FULL, used), SUBSETS[2], asked.search.shares)
    assert sorted(first_round(asked, size_class, 2)) == [(a, False) for a in even_grid(0.1, 0.9, 5)]
    assert sorted(first_round(asked, size_class, 2, (False, True))) == [
        (a, own) for a in even_grid(0.1, 0.9, 5) for own in (False, True)
    ]


@pytest.mark.parametrize("limits", [{}, {"low": 0.3, "high": 0.5}, {"high": 0.01}, {"low": 3.9}])
@pytest.mark.parametrize("addends", [1, 2, 5])
def test_the_first_round_of_a_line_search_stays_within_the_limits(
    masked: Small, limits: dict[str, float], addends: int
) -> None:
    asked = masked.asked(coefficients=limits)
    used = masked.evaluator()
    additions = Additions(asked, masked.candidates()["ae-anchored-m2"], used)
    size_class = SizeClass(additions, SUBSETS[addends], asked.search.shares)
    lengths: tuple[bool, ...] = (False, True) if addends == 2 else (addends == 1,)
    found: list[Setting] = first_round(asked, size_class, addends, lengths)
    low, high = asked.search.coefficients.low, asked.search.coefficients.high
    assert found and len(set(found)) == len(found) and {own for _, own in found} == set(lengths)
    assert all(low <= a <= high and a > 0.0 for a, _ in found)
    images = used.images
    assert all(0.0 <= size_class.value(s, 1) <= 1.0 for s in found)
    assert used.images == images  # they have been measured


def test_the_objective_is_of_the_size_classes_that_there_are(masked: Small) -> None:
    accuracy = {"1": 0.5, "2": 0.25, str(COUNT): 0.75}
    assert [
        objective(masked.asked(objective=o), accuracy) for o in ("subsets", "all", "single")
    ] == [0.5, 0.75, 0.5]
    assert [
        objective(masked.asked(objective=o), {str(COUNT): 0.4})
        for o in ("subsets", "all", "single")
    ] == [0.4] * 3


# Candidates ---------------------------------------------------------------------------------------


def test_each_merge_method_is_on_the_full_vectors_and_on_each_basis() -> None:
    asked = parse_experiment(
        {
            "store": "/s",
            "tasks": list(NAMES),
            "basis": {"method": ["svd", "ae"], "online": True},
            "search": {"sizes": [1, 4], "merges": list(MERGES)},
        }
    )
    bases, found = basis_candidates(asked), merge_candidates(asked)
    assert len(found) == len(MERGES) * (len(bases) + 1) and len(bases) == 2 * 2 * len(
        sizes_of(asked)
    )
    assert [c.name for c in found] == [
        f"{b}-{m}" for m in MERGES for b in ("full", *(c.name for c in bases))
    ]
    for c in found:
        assert (
            c.group is None and not c.is_basis and c.addends(5) == (1 if c.merge in UNSCALED else 5)
        )
        assert c.subsets(SUBSETS) == SUBSETS
    by_name = {c.name: c for c in (*found, *bases)}
    assert (
        by_name["ae-m4-online-ties"].basis == "ae-m4-online"
        and by_name["ae-m4-ties"].basis == "ae-m4"
    )
    assert by_name["full-ties"].kind == "full" and by_name["svd-m1-dare"].kind == "decoded"
    assert merge_candidates(parse_experiment({"store": "/s", "tasks": list(NAMES)})) == []


def test_bases_of_one_size_are_a_group_and_what_they_are_compared_with_is_in_none(
    masked: Small,
) -> None:
    asked = parse_experiment(
        {
            "store": "/s",
            "tasks": list(NAMES),
            "basis": {"method": ["svd", "ae"], "online": True},
            "search": {"sizes": [1, 4]},
        }
    )
    groups: dict[str | None, list[str]] = {}
    for c in (
        ZERO_SHOT,
        FULL,
        *basis_candidates(asked),
        *random_candidates(asked, masked.gram),
        Candidate("ae-m4-sum", "sum", "ae", 4),
    ):
        groups.setdefault(c.group, []).append(c.name)
    assert groups.pop(None) == [
        "zero-shot",
        "full",
        *(f"random-{k}-m{m}" for m in (1, 2, 4) for k in ("own", "lstsq")),
        "ae-m4-sum",
    ]
    assert groups == {
        f"m{m}{o}": [f"svd-m{m}{o}", f"ae-m{m}{o}"] for m in (1, 2, 4) for o in ("", "-online")
    }


def test_a_plain_sum_adds_as_many_vectors_as_the_basis_has_and_all_tasks_only() -> None:
    plain = Candidate("ae-m3-sum", "sum", "ae", 3)
    assert (
        plain.addends(5) == 3
        and plain.subsets(SUBSETS) == {COUNT: SUBSETS[COUNT]}
        and plain.basis == "ae-m3"
    )
    assert FULL.addends(5) == 5 and FULL.subsets(SUBSETS) == SUBSETS


def test_random_baselines_are_seeded_draws_at_every_size(masked: Small) -> None:
    asked = masked.asked(sizes=[1, 3, COUNT], random_subsets=4)
    found = random_candidates(asked, masked.gram)
    endings = [f"m{m}{d}" for m in (1, 2, 3) for d in ("", "-2", "-3", "-4")] + [f"m{COUNT}"]
    assert [c.name for c in found] == [f"random-{k}-{e}" for e in endings for k in ("own", "lstsq")]
    assert (
        found
        == random_candidates(asked, masked.gram)
        != random_candidates(
            parse_experiment({**asked.identity(), "store": "/s", "seed": 1}), masked.gram
        )
    )
    assert (
        found[:2] == random_candidates(masked.asked(sizes=[1, 3]), masked.gram)[:2]
    )  # of more draws the first
    for own, squares in zip(found[::2], found[1::2], strict=True):
        chosen = torch.tensor(own.table, dtype=torch.float64)
        keep = chosen.diagonal().bool()
        assert (
            torch.equal(chosen, keep.double().diag())
            and int(keep.sum()) == own.size == squares.size
        )
        table = torch.tensor(squares.table, dtype=torch.float64)
        expected = torch.zeros_like(table)
        expected[keep] = torch.linalg.lstsq(masked.V[:, keep], masked.V).solution
        torch.testing.assert_close(table, expected, rtol=1e-6, atol=1e-8)
    drawn = {tuple(map(tuple, c.table or ())) for c in found if c.name.startswith("random-own-m2")}
    assert len(drawn) > 1
