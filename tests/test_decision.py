"""Decisions of a search from rounds in a store: outcomes, the choice, and that a choice is made
once.
"""

import io
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.search.candidates import FULL, ZERO_SHOT, Candidate, basis_candidates
from raytvb.search.choice import commit_decision, decide, halving_state, is_measured
from raytvb.search.identities import search_identity
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
        prefix = round_prefix(candidate, number)
        records.commit(store, prefix, identity=identity, metrics=result)


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
    decision = decide(store, asked(store), candidates, SIZES)
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
    experiment = asked(store)
    assert is_measured(store, experiment, candidates)
    assert find_choice(store, experiment, candidates) is None
    assert find_result(store, experiment, FULL) is None
    decision = decide(store, experiment, candidates, SIZES)
    assert commit_decision(store, experiment, candidates, decision)
    assert find_choice(store, experiment, candidates) == decision.choice
    for candidate in candidates:
        assert find_result(store, experiment, candidate) == decision.outcomes[candidate.name]
    before = {key: store.read(key) for key in store.keys()}
    again = decide(store, experiment, candidates, SIZES)
    assert again == decision and not commit_decision(store, experiment, candidates, again)
    assert {key: store.read(key) for key in store.keys()} == before


def test_records_say_what_earlier_versions_said(store: Store, candidates: list[Candidate]) -> None:
    """Earlier versions wrote such results. They are read, and nothing is searched again."""
    experiment = asked(store)
    commit_decision(store, experiment, candidates, decide(store, experiment, candidates, SIZES))
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
    experiment = asked(store)
    decision = decide(store, experiment, candidates, SIZES)
    commit_decision(store, experiment, candidates, decision)
    for key in ("search/full", "search/full/round-1", "search"):
        path = f"{key}/record.json"
        fields = unsealed(store.read(path), path)
        store.write(path, sealed({**fields, "metrics": {}}))
    problem = r"record\.json cannot be read: \w+: Field required"
    with pytest.raises(StoreError, match=f"{store.url}/search/full/{problem}"):
        find_result(store, experiment, FULL)
    with pytest.raises(StoreError, match=f"{store.url}/search/full/round-1/{problem}"):
        known_rounds(store, experiment, FULL)
    with pytest.raises(StoreError, match=f"{store.url}/search/{problem}"):
        find_choice(store, experiment, candidates)
    choice = decision.choice.to_json()
    for missing in choice:
        with pytest.raises(StoreError, match=f"cannot be read: {missing}: Field required"):
            Choice.from_json({n: v for n, v in choice.items() if n != missing}, "a record")


def test_the_tables_have_a_row_for_each_candidate_and_setting(
    store: Store, candidates: list[Candidate]
) -> None:
    experiment = asked(store)
    commit_decision(store, experiment, candidates, decide(store, experiment, candidates, SIZES))
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
    single, every = asked(store, objective="single"), asked(store, objective="all")
    full = decide(store, single, candidates, SIZES).outcomes["full"]
    assert isinstance(full, MeasuredOutcome) and full.objective == 0.9
    (first, _) = known_rounds(store, every, FULL)
    assert isinstance(first, Measured) and first.objective == 0.6
    state = halving_state(store, every, candidates)
    assert not state.missing and state.limits["svd-m2"] == 1


def test_without_a_basis_that_helps_the_choice_says_why(
    store: Store, candidates: list[Candidate]
) -> None:
    experiment = asked(store)
    put_rounds(store, experiment, ZERO_SHOT, measured(0.8, 0.8, 0.25), measured(0.8, 0.8))
    choice = decide(store, experiment, candidates, SIZES).choice
    assert choice.name is None and choice.best is None
    assert choice.reason == (
        "no basis is better on validation data than the pretrained model (80.0 %); "
        "the best one has 62.5 %"
    )
    assert choice.to_json()["reason"] == choice.reason


def test_rounds_that_are_missing_are_named(store: Store, candidates: list[Candidate]) -> None:
    experiment = asked(store)
    store.delete("search/ae-m2/round-2/record.json")
    assert halving_state(store, experiment, candidates).missing == {"ae-m2": 2}
    assert not is_measured(store, experiment, candidates)
    with pytest.raises(UserError, match="ae-m2: not searched yet"):
        decide(store, experiment, candidates, SIZES)
    other = asked(store, lengths="own")  # measures something else
    assert known_rounds(store, other, FULL) == [] and not is_measured(store, other, candidates)
