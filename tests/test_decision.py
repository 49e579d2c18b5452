"""Decisions of a search from rounds in a store: outcomes, the choice, and that a choice is made
once.
"""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.present_versions import PresentVersions
from raytvb.search.candidates import FULL, ZERO_SHOT, Candidate, basis_candidates
from raytvb.search.choice import commit_decision, decide, halving_state, is_measured
from raytvb.search.identities import search_identity, search_parents
from raytvb.search.results import (
    Choice,
    Invalid,
    InvalidOutcome,
    Measured,
    MeasuredOutcome,
    RoundResult,
    Tried,
    parse_outcome,
)
from raytvb.search.rounds import find_choice, find_result, known_rounds, round_prefix
from raytvb.storage import records
from raytvb.storage.contract import JsonObject
from raytvb.storage.sealed_json import sealed, unsealed
from raytvb.storage.store import Store
from raytvb.storage.store_errors import StoreError
from raytvb.suite.task_names import task_names

TASKS = list(task_names()[:4])
METHODS = ["ae", "ae-anchored", "svd", "kmeans"]


def asked(store: Store, **search: Any) -> Experiment:
    return parse_experiment(
        {
            "store": store.url,
            "tasks": TASKS,
            "basis": {"method": METHODS},
            "search": {"sizes": [2], **search},
        }
    )


def present_of(store: Store) -> PresentVersions:
    """Versions that stand for those of the vectors, bases and images."""
    vectors = {task: f"vector of {task}" for task in TASKS}
    bases = {candidate.basis: candidate.name for candidate in basis_candidates(asked(store))}
    images = {task: "images" for task in TASKS}
    return PresentVersions(vectors, vectors, bases, images, dated=False)


def measured(single: float, every: float, share: float = 1.0) -> Measured:
    """A round in which additions of one and of all four tasks have these accuracies."""
    row = Tried(
        size=1,
        coefficient=0.5,
        own_lengths=True,
        accuracy=single,
        expected=single,
        correct=1,
        total=2,
    )
    return Measured(
        objective=-7.0,  # from another experiment: only the accuracies matter
        share=share,
        coefficient={1: 0.5, 4: 0.25},
        own_lengths={1: True, 4: False},
        accuracy={1: single, 4: every},
        tried=(row, row.model_copy(update={"size": 4})),
        images=10,
        evaluations=2,
    )


def put_rounds(
    store: Store, experiment: Experiment, candidate: Candidate, *rounds: RoundResult
) -> None:
    for number, result in enumerate(rounds, 1):
        identity = search_identity(experiment, candidate)
        parents = search_parents(present_of(store), candidate)
        prefix = round_prefix(candidate, number)
        records.commit(store, prefix, identity=identity, parents=parents, metrics=result)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.fixture
def candidates(store: Store) -> list[Candidate]:
    """A search with rounds in the store. svd is the poorest of its size and ends early; the values
    of kmeans are not finite.
    """
    experiment = asked(store)
    bases = {c.method: c for c in basis_candidates(experiment)}
    every = [ZERO_SHOT, FULL, *bases.values()]
    put_rounds(store, experiment, ZERO_SHOT, measured(0.3, 0.3, 0.25), measured(0.3, 0.3))
    put_rounds(store, experiment, FULL, measured(0.9, 0.6, 0.25), measured(0.9, 0.6))
    put_rounds(store, experiment, bases["ae"], measured(0.6, 0.6, 0.25), measured(0.75, 0.5))
    put_rounds(
        store, experiment, bases["ae-anchored"], measured(0.5, 0.75, 0.25), measured(0.5, 0.25)
    )
    put_rounds(store, experiment, bases["svd"], measured(0.25, 0.5, 0.25))
    put_rounds(store, experiment, bases["kmeans"], Invalid(invalid="its vectors are NaN"))
    return every


SIZES = {
    "zero-shot": 0,
    "full": 400,
    "ae-m2": 200,
    "ae-anchored-m2": 200,
    "svd-m2": 200,
    "kmeans-m2": 200,
}


def test_outcomes_and_the_choice_follow_from_the_rounds(
    store: Store, candidates: list[Candidate]
) -> None:
    present = present_of(store)
    decision = decide(store, asked(store), candidates, SIZES, present)
    choice, outcomes = decision.choice, decision.outcomes
    assert (choice.name, choice.reason, choice.best) == ("ae-m2", None, "ae-m2")
    assert choice.front == ("ae-m2", "full") and choice.stopped == ("svd-m2",)
    assert choice.invalid == {"kmeans-m2": "its vectors are NaN"}
    assert (choice.candidates, choice.images, choice.evaluations) == (6, 90, 18)
    assert choice.zero_shot == 0.3
    assert outcomes["kmeans-m2"] == InvalidOutcome(
        invalid="its vectors are NaN", objectives=(None,), evaluations=0, images=0, stored_bytes=200
    )
    measured = {n: o for n, o in outcomes.items() if isinstance(o, MeasuredOutcome)}
    svd = measured["svd-m2"]
    assert (svd.stopped, svd.share, svd.objectives, svd.images) == (True, 0.25, (0.375,), 10)
    ae = measured["ae-m2"]
    assert ae.chosen and ae.front and not ae.stopped and ae.stored_bytes == 200
    assert ae.objectives == (0.6, 0.625) and ae.objective == 0.625
    assert ae.setting(1).own_lengths and ae.setting(4).coefficient == 0.25
    assert [name for name, outcome in measured.items() if outcome.chosen] == ["ae-m2"]


def test_a_decision_is_written_once(store: Store, candidates: list[Candidate]) -> None:
    present = present_of(store)
    experiment = asked(store)
    assert is_measured(store, experiment, candidates, present)
    assert find_choice(store, experiment, candidates, present) is None
    assert find_result(store, experiment, FULL, present) is None
    decision = decide(store, experiment, candidates, SIZES, present)
    assert commit_decision(store, experiment, candidates, decision, present)
    assert find_choice(store, experiment, candidates, present) == decision.choice
    for candidate in candidates:
        assert (
            find_result(store, experiment, candidate, present) == decision.outcomes[candidate.name]
        )
    before = {key: store.read(key) for key in store.keys()}
    again = decide(store, experiment, candidates, SIZES, present)
    assert again == decision and not commit_decision(store, experiment, candidates, again, present)
    assert {key: store.read(key) for key in store.keys()} == before


def test_records_say_what_earlier_versions_said(store: Store, candidates: list[Candidate]) -> None:
    """Earlier versions wrote such results. They are read, and nothing is searched again."""
    present = present_of(store)
    experiment = asked(store)
    commit_decision(
        store,
        experiment,
        candidates,
        decide(store, experiment, candidates, SIZES, present),
        present,
    )
    choice = store.read_json("search/record.json")["metrics"]
    assert "reason" not in choice and choice["tolerance"] is None
    outcome = store.read_json("search/ae-m2/record.json")["metrics"]
    assert outcome["accuracy"] == {"1": 0.75, "4": 0.5} and outcome["vector"] is None
    invalid = store.read_json("search/kmeans-m2/record.json")["metrics"]
    assert (invalid["objective"], invalid["objectives"], invalid["share"]) == (None, [None], None)
    first = store.read_json("search/kmeans-m2/round-1/record.json")["metrics"]
    assert first == {"invalid": "its vectors are NaN", "objective": None, "accuracy": {}}
    assert "vector" not in store.read_json("search/ae-m2/round-2/record.json")["metrics"]


OLD_MEASURED: JsonObject = {
    "invalid": None,
    "stopped": False,
    "objective": 0.5,
    "objectives": [0.25, 0.5],
    "share": 1.0,
    "coefficient": {"1": 1.0, "4": 0.25},
    "own_lengths": {"1": False, "4": True},
    "accuracy": {"1": 0.75, "4": 0.25},
    "vector": None,
    "evaluations": 4,
    "images": 20,
    "chosen": True,
    "front": True,
    "stored_bytes": 200,
}
OLD_INVALID: JsonObject = {
    "invalid": "its vectors are NaN",
    "stopped": False,
    "objective": None,
    "objectives": [0.25, None],
    "share": None,
    "coefficient": {},
    "own_lengths": {},
    "accuracy": {},
    "vector": None,
    "evaluations": 2,
    "images": 10,
    "chosen": False,
    "front": False,
    "stored_bytes": 200,
}


def test_outcomes_are_written_as_they_are_read() -> None:
    assert isinstance(parse_outcome(OLD_MEASURED, "a record"), MeasuredOutcome)
    assert isinstance(parse_outcome(OLD_INVALID, "a record"), InvalidOutcome)
    for fields in (OLD_MEASURED, OLD_INVALID):
        assert parse_outcome(fields, "a record").to_json() == fields


@pytest.mark.parametrize("missing", sorted(OLD_MEASURED.keys() - {"invalid"}))
def test_an_outcome_without_a_field_is_an_error_that_names_it(missing: str) -> None:
    fields = {name: value for name, value in OLD_MEASURED.items() if name != missing}
    with pytest.raises(StoreError, match=rf"a/record\.json cannot be read: {missing}: "):
        parse_outcome(fields, "a/record.json")


@pytest.mark.parametrize(
    ("damage", "field"),
    [
        ({"coefficient": {}}, "coefficient"),
        ({"own_lengths": {"1": False}}, "own_lengths"),
        ({"accuracy": {}}, "accuracy"),
        ({"objectives": [0.25, None]}, r"objectives\.1"),
        ({"objective": None}, "objective"),
    ],
)
def test_a_measured_outcome_has_every_number(damage: JsonObject, field: str) -> None:
    with pytest.raises(StoreError, match=f"cannot be read: {field}: "):
        parse_outcome({**OLD_MEASURED, **damage}, "a record")


def test_errors_of_a_search_name_the_record(store: Store, candidates: list[Candidate]) -> None:
    present = present_of(store)
    experiment = asked(store)
    decision = decide(store, experiment, candidates, SIZES, present)
    commit_decision(store, experiment, candidates, decision, present)
    for key in ("search/full", "search/full/round-1", "search"):
        path = f"{key}/record.json"
        fields = unsealed(store.read(path), path)
        store.write(path, sealed({**fields, "metrics": {}}))
    problem = r"record\.json cannot be read: \w+: Field required"
    with pytest.raises(StoreError, match=f"{store.url}/search/full/{problem}"):
        find_result(store, experiment, FULL, present)
    with pytest.raises(StoreError, match=f"{store.url}/search/full/round-1/{problem}"):
        known_rounds(store, experiment, FULL, present)
    with pytest.raises(StoreError, match=f"{store.url}/search/{problem}"):
        find_choice(store, experiment, candidates, present)
    choice = decision.choice.to_json()
    for missing in choice:
        with pytest.raises(StoreError, match=f"cannot be read: {missing}: Field required"):
            Choice.from_json({n: v for n, v in choice.items() if n != missing}, "a record")


def test_the_tables_have_a_row_for_each_candidate_and_setting(
    store: Store, candidates: list[Candidate]
) -> None:
    present = present_of(store)
    experiment = asked(store)
    commit_decision(
        store,
        experiment,
        candidates,
        decide(store, experiment, candidates, SIZES, present),
        present,
    )
    results = pq.read_table(io.BytesIO(store.read("search/results.parquet"))).to_pylist()
    assert [row["candidate"] for row in results] == [c.name for c in candidates]
    by_name = {row["candidate"]: row for row in results}
    assert by_name["ae-m2"]["accuracy_1"] == 0.75 and by_name["ae-m2"]["own_lengths_1"] is True
    assert by_name["kmeans-m2"]["accuracy_1"] is None
    assert by_name["kmeans-m2"]["invalid"] == "its vectors are NaN"
    tried = pq.read_table(io.BytesIO(store.read("search/tried.parquet"))).to_pylist()
    assert len(tried) == 2 * 9  # two settings in each of nine measured rounds
    assert {row["candidate"] for row in tried} == set(SIZES) - {"kmeans-m2"}
    assert all(row["low"] <= row["correct"] / row["total"] <= row["high"] for row in tried)


def test_another_objective_chooses_anew_from_the_same_rounds(
    store: Store, candidates: list[Candidate]
) -> None:
    present = present_of(store)
    single, every = asked(store, objective="single"), asked(store, objective="all")
    full = decide(store, single, candidates, SIZES, present).outcomes["full"]
    assert isinstance(full, MeasuredOutcome) and full.objective == 0.9
    (first, _) = known_rounds(store, every, FULL, present)
    assert isinstance(first, Measured) and first.objective == 0.6
    state = halving_state(store, every, candidates, present)
    assert not state.missing and state.limits["svd-m2"] == 1


def test_without_a_basis_that_helps_the_choice_says_why(
    store: Store, candidates: list[Candidate]
) -> None:
    present = present_of(store)
    experiment = asked(store)
    put_rounds(store, experiment, ZERO_SHOT, measured(0.8, 0.8, 0.25), measured(0.8, 0.8))
    choice = decide(store, experiment, candidates, SIZES, present).choice
    assert choice.name is None and choice.best is None
    assert choice.reason == (
        "no basis is better on validation data than the pretrained model (80.0 %); "
        "the best one has 62.5 %"
    )
    assert choice.to_json()["reason"] == choice.reason


def test_rounds_that_are_missing_are_named(store: Store, candidates: list[Candidate]) -> None:
    present = present_of(store)
    experiment = asked(store)
    store.delete("search/ae-m2/round-2/record.json")
    assert halving_state(store, experiment, candidates, present).missing == {"ae-m2": 2}
    assert not is_measured(store, experiment, candidates, present)
    with pytest.raises(UserError, match="ae-m2: not searched yet"):
        decide(store, experiment, candidates, SIZES, present)
    other = asked(store, lengths="own")  # measures something else
    assert known_rounds(store, other, FULL, present) == []
    assert not is_measured(store, other, candidates, present)


# Versions -----------------------------------------------------------------------------------------


def rounds_that_count(store: Store, present: PresentVersions) -> set[str]:
    """The candidates that have rounds which count."""
    experiment = asked(store)
    names = set()
    for candidate in [ZERO_SHOT, FULL, *basis_candidates(experiment)]:
        if known_rounds(store, experiment, candidate, present):
            names.add(candidate.name)
    return names


def test_a_basis_that_was_made_again_is_measured_again_and_nothing_else(
    store: Store, candidates: list[Candidate]
) -> None:
    experiment, present = asked(store), present_of(store)
    decision = decide(store, experiment, candidates, SIZES, present)
    commit_decision(store, experiment, candidates, decision, present)
    assert rounds_that_count(store, present) == {c.name for c in candidates}
    other = replace(present, bases={**present.bases, "ae-m2": "made again"})
    assert rounds_that_count(store, other) == {c.name for c in candidates} - {"ae-m2"}
    for candidate in candidates:
        is_there = find_result(store, experiment, candidate, other) is not None
        assert is_there == (candidate.name != "ae-m2")
    # How many rounds it needs depends on how it does in the first one.
    assert halving_state(store, experiment, candidates, other).missing["ae-m2"] >= 1
    with pytest.raises(UserError, match="ae-m2: not searched yet"):
        decide(store, experiment, candidates, SIZES, other)


def test_nothing_counts_that_was_measured_on_other_vectors(
    store: Store, candidates: list[Candidate]
) -> None:
    experiment, present = asked(store), present_of(store)
    decision = decide(store, experiment, candidates, SIZES, present)
    commit_decision(store, experiment, candidates, decision, present)
    vectors = {**present.vectors, TASKS[2]: "made again"}
    images = {**present.images, TASKS[2]: "other images"}
    for other in (replace(present, vectors=vectors), replace(present, images=images)):
        assert rounds_that_count(store, other) == set()
        assert find_choice(store, experiment, candidates, other) is None
        assert all(find_result(store, experiment, c, other) is None for c in candidates)


def test_a_basis_that_is_not_there_is_an_error(store: Store, candidates: list[Candidate]) -> None:
    experiment, present = asked(store), present_of(store)
    bases = {name: sha for name, sha in present.bases.items() if name != "ae-m2"}
    with pytest.raises(UserError, match=r"bases are missing \(ae-m2\): run `raytvb basis` first"):
        halving_state(store, experiment, candidates, replace(present, bases=bases))


@pytest.mark.parametrize("dated", [False, True])
def test_results_without_parents_count_until_the_store_grows(
    store: Store, candidates: list[Candidate], dated: bool
) -> None:
    """Stores of earlier formats have such results."""
    experiment, present = asked(store), present_of(store)
    decision = decide(store, experiment, candidates, SIZES, present)
    commit_decision(store, experiment, candidates, decision, present)
    for prefix, record in records.find_all(store, "search").items():
        fields = {**record.to_json(), "parents": {}, "format": 1}
        store.write_json(f"{prefix}/record.json", fields)
    present = replace(present, dated=dated)
    expected = set() if dated else {c.name for c in candidates}
    assert rounds_that_count(store, present) == expected
    assert (find_choice(store, experiment, candidates, present) is None) == dated
    assert (find_result(store, experiment, FULL, present) is None) == dated


def test_results_of_this_format_without_parents_never_count(
    store: Store, candidates: list[Candidate]
) -> None:
    for prefix, record in records.find_all(store, "search").items():
        records.commit(store, prefix, identity=record.identity)
    assert rounds_that_count(store, present_of(store)) == set()
