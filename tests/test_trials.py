"""The rounds of a candidate on a small store: each measurement is made once, and depends only on
the candidate.
"""

import itertools
import json
import math
import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from vector_files import flat, put_vector, record_vector, values_of

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.errors import UserError
from raytvb.experiment.basis_specs import BasisSpec, sizes_of
from raytvb.experiment.config import Experiment
from raytvb.experiment.identities import basis_identity
from raytvb.experiment.metrics import BasisMetrics
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_versions import basis_parents, present_versions
from raytvb.experiment.stored import BasisVersion, existing_basis, write_coefficients
from raytvb.experiment.stored_vectors import vectors_of
from raytvb.maths.basis_fit import fit_basis
from raytvb.maths.counts import Count, even_grid, mean
from raytvb.maths.merge_registry import MERGE_METHODS, compared_merges
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
from raytvb.search.merged_vectors import method_direction
from raytvb.search.results import Invalid, Measured, Setting, TunedWeights, parse_round
from raytvb.search.size_class import SizeClass, first_round, lengths_to_try
from raytvb.search.trial import CandidateSearch, objective
from raytvb.storage import records
from raytvb.storage.basis_writer import write_combinations
from raytvb.storage.contract import JsonObject
from raytvb.storage.gram_state import GramState, GramWriter
from raytvb.storage.masks import Mask
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.suite.task_names import task_names

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
    """A store with the vectors of five tasks and a basis of two vectors, and the reference V (D or
    kept, T) float64.
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
        decoded = self.V @ self.fit.B @ self.fit.W
        self.ratios = self.V.norm(dim=0) / decoded.norm(dim=0)
        for name in NAMES:
            record_vector(self.store, name)
        vectors = vectors_of(self.asked(), NAMES)
        table = write_coefficients(self.fit.B, self.fit.W, self.ratios)
        records.commit(
            self.store,
            prefix,
            identity=basis_identity(self.asked(), BasisSpec("ae-anchored", SIZE)),
            written=records.read_record(self.store, f"{prefix}/record.json").files,
            files={"coefficients.safetensors": table},
            parents=basis_parents(self.asked(), vectors),
            metrics=BasisMetrics(
                tasks=tuple(NAMES),
                vectors=SIZE,
                convex=True,
                relative_error=self.fit.loss,
                floor=self.fit.floor,
                condition=self.fit.condition,
            ),
        )
        rows = [(name, vectors[name].checksum) for name in NAMES]
        GramWriter(self.store).append(GramState(), rows, self.gram, [])
        self.present = present_versions(self.asked())
        assert len(self.present.bases) == 1

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
            Candidate.basis_sum(BasisSpec("ae-anchored", SIZE)),
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
    made: Small = request.getfixturevalue(request.param)
    return made


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
    """Some subsets that the candidate can add."""
    return list(candidate.subsets({2: SUBSETS[2], COUNT: SUBSETS[COUNT]})[COUNT]) + (
        [] if candidate.kind == "basis-sum" else SUBSETS[2]
    )


def expected_direction(
    small: Small, candidate: Candidate, subset: Sequence[int], own: bool = False
) -> Tensor | None:
    """The merged direction of a subset, from whole vectors in memory; for other merges than the sum
    by `method_direction`.
    """
    if candidate.kind == "zero-shot":
        return None
    V, table = small.V, torch.eye(COUNT, dtype=torch.float64)
    if candidate.kind == "decoded":
        table = small.fit.B @ small.fit.W * (small.ratios if own else 1.0)
    elif candidate.kind == "basis-sum":
        return V @ small.fit.B.sum(dim=1)
    elif candidate.table is not None:
        table = torch.tensor(candidate.table, dtype=torch.float64)
    if candidate.adds:
        return V @ table[:, list(subset)].sum(dim=1)
    vectors, stored = candidate.open(small.asked(), small.present)
    return method_direction(
        vectors, stored[:, list(subset)], candidate.merge_method, seed=0
    ).double()


# Additions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CANDIDATES)
def test_directions_are_what_subsets_add_up_to(small: Small, name: str) -> None:
    candidate = small.candidates()[name]
    additions, subsets = (
        Additions(small.asked(), candidate, small.evaluator(), small.present),
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
    every = small.mask is not None and MERGE_METHODS[candidate.merge_method].matrices
    if found[0] is not None:
        assert len(found[0]) == (
            sum(map(math.prod, PARAMETERS.values())) if every else len(small.V)
        )


def test_decoded_vectors_may_have_the_lengths_of_the_task_vectors(small: Small) -> None:
    candidate = small.candidates()["ae-anchored-m2"]
    additions, subsets = (
        Additions(small.asked(), candidate, small.evaluator(), small.present),
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


def test_length_ratios_are_in_the_table_or_follow_from_the_gram_matrix(tmp_path: Path) -> None:
    """Tables of earlier formats have none."""
    small, name = Small(tmp_path, True), f"ae-anchored-m{SIZE}"
    version = existing_basis(small.store, name)
    assert torch.equal(version.ratios(), small.ratios)
    tables = {"B": small.fit.B, "W": small.fit.W}
    data = save({n: table.contiguous().clone() for n, table in tables.items()})
    record = records.commit(
        small.store,
        version.prefix,
        identity=version.record.identity,
        files={"coefficients.safetensors": data},
        parents=version.record.parents,
        metrics=version.metrics,
    )
    older = BasisVersion(small.store, name, record)
    torch.testing.assert_close(older.ratios(), small.ratios, rtol=1e-6, atol=0)
    put_vector(small.store, NAMES[1], values_of(PARAMETERS, 99), small.mask)
    record_vector(small.store, NAMES[1])
    checksum = vectors_of(small.asked(), NAMES)[NAMES[1]].checksum
    GramWriter(small.store).append(GramState(), [(n, checksum) for n in NAMES], small.gram, [])
    with pytest.raises(UserError, match="was made of other vectors than those that are there now"):
        older.ratios()


@pytest.mark.parametrize("name", CANDIDATES)
def test_only_decoded_vectors_have_two_lengths(masked: Small, name: str) -> None:
    candidate, two = masked.candidates()[name], name == "ae-anchored-m2"
    for lengths, expected in (("projected", (False,)), ("own", (True,)), ("auto", (False, True))):
        asked = masked.asked(lengths=lengths)
        assert lengths_to_try(asked, candidate, 2) == (expected if two else (False,))
        full = lengths_to_try(asked, candidate, COUNT)
        assert full == ((lengths == "own",) if two else (False,))


def test_directions_of_other_subsets_are_not_those_that_are_held(small: Small) -> None:
    additions = Additions(small.asked(), FULL, small.evaluator(), small.present)
    rng = random.Random(0)
    for _ in range(20):
        subsets = [
            tuple(sorted(rng.sample(range(COUNT), rng.randrange(1, COUNT))))
            for _ in range(rng.randrange(1, 4))
        ]
        found = additions.directions(subsets)
        if rng.random() < 0.3:
            next(found)  # and no further: nothing beyond this may be in memory
            continue
        for direction, subset in zip(found, subsets, strict=True):
            expected = small.V[:, list(subset)].sum(dim=1)
            assert direction is not None
            torch.testing.assert_close(direction.double(), expected, rtol=1e-4, atol=1e-5)


def tensors(directions: Iterable[Tensor | None]) -> list[Tensor]:
    """All directions; none is missing."""
    present = [direction for direction in directions if direction is not None]
    assert present
    return present


def test_directions_that_are_too_large_to_hold_are_made_again(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raytvb.search.additions.COMBINED_BYTES", 4 * 2 * len(small.V))
    additions = Additions(small.asked(), FULL, small.evaluator(), small.present)
    for subsets, held in ((SUBSETS[1], False), (SUBSETS[1][:2], True), (SUBSETS[1][:3], False)):
        first, second, third = (tensors(additions.directions(subsets)) for _ in range(3))
        assert len(first) == len(subsets)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for a, b in zip(second, third, strict=True):
            assert (a.data_ptr() == b.data_ptr()) == held


def fresh_count(small: Small, direction: Tensor | None, alpha: float, task: int) -> Count:
    """The same measurement on a fresh tower, into which nothing was merged before."""
    fresh = small.evaluator()
    fresh.merge(direction, alpha)
    return fresh.count(NAMES[task])


@pytest.mark.parametrize("name", CANDIDATES)
def test_counts_are_those_of_a_fresh_tower(small: Small, name: str) -> None:
    candidate, used = small.candidates()[name], small.evaluator()
    additions, subsets = (
        Additions(small.asked(), candidate, used, small.present),
        subsets_of(small, candidate),
    )
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
    record_vector(small.store, NAMES[1])
    record_vector(small.store, NAMES[2])
    with pytest.raises(UserError, match=f"{NAMES[1]} has been made again by another run meanwhile"):
        Additions(small.asked(), FULL, small.evaluator(), small.present)
    present = present_versions(small.asked())
    assert not present.bases  # the basis was made of other vectors
    additions = Additions(small.asked(), FULL, small.evaluator(), present)
    assert len(list(additions.directions([(0,), (1,), (2, 3)]))) == 3
    with pytest.raises(ValueError, match="full: its vectors add up to NaN or infinite values"):
        list(additions.directions([(0,), (1, 2)]))


@pytest.mark.parametrize("per_basis", [False, True])
def test_equal_weights_say_the_same_as_one_coefficient(small: Small, per_basis: bool) -> None:
    for name, length in (("full", COUNT), ("ae-anchored-m2", SIZE)):
        additions = Additions(
            small.asked(), small.candidates()[name], small.evaluator(), small.present
        )
        for alpha in (0.2, 0.7):
            own = alpha > 0.5 and name != "full"
            weights = additions.start_weights(Setting(alpha, own), per_basis=per_basis)
            assert weights.shape == (length if per_basis else COUNT,)
            weighted = additions.weighted(weights, per_basis=per_basis)
            (one,) = additions.counts(SUBSETS[COUNT], alpha, own)
            for task in NAMES:
                assert (
                    abs(weighted[task].correct - one[task].correct) <= 1
                )  # sums of floats in another order
                assert weighted[task].expected == pytest.approx(one[task].expected, rel=1e-4)


def test_weights_are_of_the_tasks_or_of_the_stored_vectors(small: Small) -> None:
    generator = torch.Generator().manual_seed(3)
    additions = Additions(
        small.asked(), small.candidates()["ae-anchored-m2"], small.evaluator(), small.present
    )
    for per_basis, length in ((False, COUNT), (True, SIZE)):
        weights = torch.randn(length, generator=generator, dtype=torch.float64)
        direction = small.V @ small.fit.B @ (weights if per_basis else small.fit.W @ weights)
        found = additions.weighted(weights, per_basis=per_basis)
        for t, task in enumerate(NAMES):
            expected = fresh_count(small, direction.float(), 1.0, t)
            assert (
                abs(found[task].correct - expected.correct) <= 1
                and found[task].total == expected.total
            )
            assert found[task].expected == pytest.approx(expected.expected, rel=1e-4)


# Size classes -------------------------------------------------------------------------------------

SHARES = ((0.25, 1.0), (0.1, 0.3, 0.7, 1.0), (1.0,))


def counts_of(
    additions: Additions,
    subsets: Sequence[Sequence[int]],
    setting: Setting,
    start: float = 0.0,
    stop: float = 1.0,
) -> list[Count]:
    """Counts for each task of each subset."""
    every: list[Count] = []
    for counts in additions.counts(subsets, setting.coefficient, setting.own_lengths, start, stop):
        every += counts.values()
    return every


@pytest.mark.parametrize("shares", SHARES)
def test_a_value_does_not_depend_on_what_was_measured_when(
    small: Small, shares: tuple[float, ...]
) -> None:
    """On the last share the accuracy is that of a direct count of all images. No image goes through
    the tower twice.
    """
    rng = random.Random(len(shares))
    settings = [Setting(0.1, False), Setting(0.4, True), Setting(0.4, False)]
    candidate = small.candidates()["ae-anchored-m2"]
    direct: dict[tuple[int, Setting], list[Count]] = {}
    for size, setting in itertools.product((2, COUNT), settings):
        additions = Additions(small.asked(), candidate, small.evaluator(), small.present)
        direct[size, setting] = counts_of(additions, SUBSETS[size], setting)
    before: dict[Any, tuple[float, float]] = {}
    for _ in range(2):
        used = small.evaluator()
        additions = Additions(small.asked(), candidate, used, small.present)
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
            row = classes[size].row(setting, len(shares))
            total = sum(counts, Count(0, 0))
            assert (
                row.accuracy
                == classes[size].value(setting, len(shares))
                == mean([c.accuracy for c in counts])
            )
            assert row.expected == pytest.approx(
                mean([c.expected / c.total for c in counts]), rel=1e-5
            )
            assert (row.correct, row.total) == (total.correct, total.total)
            assert (row.size, row.setting) == (size, setting)
    assert len({before[COUNT, Setting(0.4, own), len(shares)] for own in (False, True)}) == 2


def test_a_value_of_a_share_is_the_mean_over_tasks_of_the_images_so_far(small: Small) -> None:
    used = small.evaluator()
    size_class = SizeClass(
        Additions(small.asked(), FULL, used, small.present), SUBSETS[2], (0.3, 1.0)
    )
    direct = Additions(small.asked(), FULL, small.evaluator(), small.present)
    for alpha, (number, share) in itertools.product((0.3, 0.6), enumerate((0.3, 1.0), 1)):
        every = counts_of(direct, SUBSETS[2], Setting(alpha), stop=share)
        assert size_class.value(Setting(alpha), number) == math.fsum(
            c.correct / c.total for c in every
        ) / len(every)
        assert size_class.expected(Setting(alpha), number) == pytest.approx(
            math.fsum(c.expected / c.total for c in every) / len(every), rel=1e-5
        )
        assert sum(c.total for c in every) == sum(
            edge(share, IMAGES[NAMES[t]]) for subset in SUBSETS[2] for t in subset
        )


# Rounds -------------------------------------------------------------------------------------------


def run_rounds(
    search: CandidateSearch, rounds: int, counter: Evaluator
) -> list[tuple[Measured, int]]:
    """Results of the rounds one after the other, each with the images that went through the
    tower.
    """
    found: list[tuple[Measured, int]] = []
    for number in range(1, rounds + 1):
        before = counter.images
        result = search.round(number, found[-1][0] if found else None)
        found.append((result, counter.images - before))
    return found


def stored(result: Measured) -> Measured:
    """The result as it is read back from a record."""
    read = parse_round(json.loads(json.dumps(result.to_json())), "a record")
    assert isinstance(read, Measured)
    return read


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
    """After a restart, an object that has measured nothing yet gives the same round as one that
    went through all rounds.
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
        results = run_rounds(
            CandidateSearch(experiment, candidate, used, masked.present), rounds, used
        )
        assert all(result.images == went for result, went in results)
        for number in range(1, rounds + 1):
            known = stored(results[number - 2][0]) if number > 1 else None
            disturbed = masked.evaluator()  # by the work of another candidate in the same worker
            disturbed.merge(torch.ones(sum(map(math.prod, PARAMETERS.values()))), 1.0)
            fresh = CandidateSearch(experiment, candidate, disturbed, masked.present).round(
                number, known
            )
            assert fresh == results[number - 1][0] == stored(fresh)
            assert fresh.share == experiment.search.shares[number - 1]
            assert (fresh.vector is not None) == (number == rounds and vector is not None)


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
        CandidateSearch(experiment, candidate, used, masked.present),
        len(experiment.search.shares),
        used,
    )
    limits, direct = (
        experiment.search.coefficients,
        Additions(experiment, candidate, masked.evaluator(), masked.present),
    )
    sizes = [COUNT] if candidate.kind == "basis-sum" else list(SUBSETS)
    for result, _ in results:
        for by_size in (result.coefficient, result.own_lengths, result.accuracy):
            assert set(by_size) == set(sizes)
        assert result.evaluations == len(result.tried)
        assert {row.size for row in result.tried} == set(sizes)
        for size in sizes:
            rows = result.tried_of(size)
            tried = {row.setting: row for row in rows}
            setting = result.setting(size)
            assert result.accuracy[size] == tried[setting].accuracy and len(tried) == len(rows)
            for each in tried:
                assert name == "zero-shot" or limits.low <= each.coefficient <= limits.high
                assert each.own_lengths in lengths_to_try(experiment, candidate, size)
            for each in {min(tried), setting}:
                subsets = candidate.subsets(SUBSETS)[size]
                counts = counts_of(direct, subsets, each, stop=result.share)
                total = sum(counts, Count(0, 0))
                assert tried[each].accuracy == mean([c.accuracy for c in counts])
                assert (tried[each].correct, tried[each].total) == (total.correct, total.total)
        accuracy = list(result.accuracy.values())
        expected = {
            "subsets": math.fsum(accuracy) / len(accuracy),
            "all": result.accuracy[COUNT],
            "single": result.accuracy[min(sizes)],
        }
        assert result.objective == expected[experiment.search.objective]
    last = results[-1][0]
    assert last.share == 1.0
    has_vector = limits.vector != "none" and name in ("full", "ae-anchored-m2")
    assert (last.vector is not None) == has_vector
    if last.vector is not None:
        check_weights(direct, last, last.vector, experiment)


def check_weights(
    direct: Additions, last: Measured, vector: TunedWeights, experiment: Experiment
) -> None:
    """Tuned weights have the accuracy that a direct count gives, and it is not below that of the
    start.
    """
    limits = experiment.search.coefficients
    per_basis = limits.vector == "per-basis"
    assert (vector.kind, vector.per_basis, vector.trials) == (
        limits.vector,
        per_basis,
        limits.trials,
    )
    assert len(vector.weights) == (SIZE if per_basis and direct.candidate.is_basis else COUNT)
    assert vector.images == limits.trials * sum(IMAGES.values())
    weights = torch.tensor(vector.weights, dtype=torch.float64)
    counts = direct.weighted(weights, per_basis=per_basis)
    assert vector.accuracy == mean([c.accuracy for c in counts.values()])
    start = direct.start_weights(last.setting(COUNT), per_basis=per_basis)
    assert limits.trials > 1 or list(vector.weights) == start.tolist()
    counts = direct.weighted(start, per_basis=per_basis)
    assert vector.accuracy >= mean([c.accuracy for c in counts.values()])


def test_the_zero_shot_candidate_is_measured_as_it_is(small: Small) -> None:
    used = small.evaluator()
    results = run_rounds(CandidateSearch(small.asked(), ZERO_SHOT, used, small.present), 2, used)
    expected = mean([used.zero_shot(n).accuracy for n in NAMES])
    for result, _ in results:
        assert set(result.coefficient.values()) == {0.0} and len(result.tried) == len(SUBSETS)
    assert results[-1][0].accuracy[1] == results[-1][0].accuracy[COUNT] == expected


def test_without_anything_added_the_images_of_a_task_pass_once_for_all_subsets(
    small: Small,
) -> None:
    asked, used = small.asked(shares=[0.25, 0.5, 1.0]), small.evaluator()
    edges = itertools.pairwise((0.0, *asked.search.shares))
    results = run_rounds(CandidateSearch(asked, ZERO_SHOT, used, small.present), 3, used)
    for (result, images), (start, stop) in zip(results, edges, strict=True):
        new = sum(edge(stop, n) - edge(start, n) for n in IMAGES.values())
        assert result.images == images == new
    assert used.images == sum(IMAGES.values())
    # In the rows each subset still has the images of all its tasks.
    for row in results[-1][0].tried:
        assert row.total == sum(IMAGES[NAMES[t]] for s in SUBSETS[row.size] for t in s)
    one_size = small.evaluator()
    (result, images), *_ = run_rounds(
        CandidateSearch(asked, ZERO_SHOT, one_size, small.present, [2]), 1, one_size
    )
    reached = {t for subset in SUBSETS[2] for t in subset}
    assert result.images == images == sum(edge(0.25, IMAGES[NAMES[t]]) for t in reached)


def test_a_poor_search_on_the_first_share_measures_less_than_all_images(small: Small) -> None:
    used = small.evaluator()
    (first, _), (second, _) = run_rounds(
        CandidateSearch(small.asked(), FULL, used, small.present), 2, used
    )
    assert len(second.tried) < len(first.tried)
    for size in SUBSETS:
        seen = {row.setting for row in first.tried_of(size)}
        assert {row.setting for row in second.tried_of(size)} <= seen


def test_rounds_are_read_as_they_are_written() -> None:
    """In JSON, numbers of tasks are strings, and a measured round without a vector has no field for
    it. Earlier versions wrote the same.
    """
    fields: JsonObject = {
        "objective": 0.5,
        "share": 0.25,
        "coefficient": {"1": 1.0, "16": 0.25},
        "own_lengths": {"1": False, "16": True},
        "accuracy": {"1": 0.75, "16": 0.25},
        "tried": [
            {
                "size": 16,
                "coefficient": 0.25,
                "own_lengths": True,
                "accuracy": 0.25,
                "expected": 0.2,
                "correct": 1,
                "total": 4,
            }
        ],
        "images": 8,
        "evaluations": 1,
    }
    measured = parse_round(fields, "a record")
    assert isinstance(measured, Measured) and measured.to_json() == fields
    assert measured.setting(16) == Setting(0.25, True) and measured.tried_of(1) == []
    assert measured.tried_of(16)[0].setting == Setting(0.25, True)
    reason: JsonObject = {"invalid": "no finite values", "objective": None, "accuracy": {}}
    invalid = parse_round(reason, "a record")
    assert isinstance(invalid, Invalid) and invalid.to_json() == reason
    with pytest.raises(StoreError, match="a record cannot be read: share"):
        parse_round({k: v for k, v in fields.items() if k != "share"}, "a record")


def test_the_first_round_of_a_grid_is_its_points(small: Small) -> None:
    asked = small.asked(coefficients={"strategy": "grid", "low": 0.1, "high": 0.9, "points": 5})
    used = small.evaluator()
    size_class = SizeClass(
        Additions(asked, FULL, used, small.present), SUBSETS[2], asked.search.shares
    )
    points = even_grid(0.1, 0.9, 5)
    assert sorted(first_round(asked, size_class, 2)) == [Setting(point) for point in points]
    assert sorted(first_round(asked, size_class, 2, (False, True))) == [
        Setting(*both) for both in itertools.product(points, (False, True))
    ]


@pytest.mark.parametrize("limits", [{}, {"low": 0.3, "high": 0.5}, {"high": 0.01}, {"low": 3.9}])
@pytest.mark.parametrize("addends", [1, 2, 5])
def test_the_first_round_of_a_line_search_stays_within_the_limits(
    masked: Small, limits: dict[str, float], addends: int
) -> None:
    asked = masked.asked(coefficients=limits)
    used = masked.evaluator()
    additions = Additions(asked, masked.candidates()["ae-anchored-m2"], used, masked.present)
    size_class = SizeClass(additions, SUBSETS[addends], asked.search.shares)
    lengths: tuple[bool, ...] = (False, True) if addends == 2 else (addends == 1,)
    found = first_round(asked, size_class, addends, lengths)
    low, high = asked.search.coefficients.low, asked.search.coefficients.high
    assert found and len(set(found)) == len(found)
    assert {setting.own_lengths for setting in found} == set(lengths)
    assert all(low <= s.coefficient <= high and s.coefficient > 0.0 for s in found)
    images = used.images
    assert all(0.0 <= size_class.value(s, 1) <= 1.0 for s in found)
    assert used.images == images  # they have been measured


def test_the_objective_is_of_the_size_classes_that_there_are(masked: Small) -> None:
    accuracy = {1: 0.5, 2: 0.25, COUNT: 0.75}
    assert [
        objective(masked.asked(objective=o), accuracy) for o in ("subsets", "all", "single")
    ] == [0.5, 0.75, 0.5]
    assert [
        objective(masked.asked(objective=o), {COUNT: 0.4}) for o in ("subsets", "all", "single")
    ] == [0.4] * 3


# Candidates ---------------------------------------------------------------------------------------


def test_each_merge_method_is_on_the_full_vectors_and_on_each_basis() -> None:
    asked = parse_experiment(
        {
            "store": "/s",
            "tasks": list(NAMES),
            "basis": {"method": ["svd", "ae"], "online": True},
            "search": {"sizes": [1, 4], "merges": compared_merges()},
        }
    )
    bases, found = basis_candidates(asked), merge_candidates(asked)
    assert len(found) == len(compared_merges()) * (len(bases) + 1) and len(bases) == 2 * 2 * len(
        sizes_of(asked)
    )
    assert [c.name for c in found] == [
        f"{b}-{m}" for m in compared_merges() for b in ("full", *(c.name for c in bases))
    ]
    for c in found:
        assert (
            c.group is None
            and not c.is_basis
            and c.addends(5) == (1 if MERGE_METHODS[c.merge_method].coefficient == "one" else 5)
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
        Candidate.basis_sum(BasisSpec("ae", 4)),
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
    plain = Candidate.basis_sum(BasisSpec("ae", 3))
    assert plain.name == "ae-m3-sum"
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
    )  # the first of more draws
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
