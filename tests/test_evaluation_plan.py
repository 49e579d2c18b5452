"""The evaluations after a search, and what each of them depends on."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from raytvb.evaluation.evaluation import Evaluation
from raytvb.evaluation.plan import evaluations, is_tested, subjects
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.search.candidates import FULL, ZERO_SHOT, Candidate, basis_candidates
from raytvb.search.results import Choice, InvalidOutcome, MeasuredOutcome, Outcome, TunedWeights
from raytvb.suite.task_names import task_names

FIRST, SECOND, UNSEEN = task_names()[:3]
CHOICE = Choice(
    name="svd-m1",
    best="svd-m1",
    objective_of="subsets",
    tolerance=None,
    zero_shot=0.1,
    front=("svd-m1",),
    stopped=(),
    invalid={},
    candidates=4,
    evaluations=1,
    images=1,
    selection="validation split only",
    test="once",
)
OUTCOME = MeasuredOutcome(
    objective=0.5,
    objectives=(0.5,),
    share=1.0,
    coefficient={1: 1.0, 2: 0.75, 16: 0.1},
    own_lengths={1: True, 2: False, 16: False},
    accuracy={1: 0.5, 2: 0.5, 16: 0.5},
    stopped=False,
    vector=None,
    evaluations=1,
    images=1,
    chosen=False,
    front=False,
    stored_bytes=1,
)
INVALID = InvalidOutcome(
    invalid="its vectors are NaN", objectives=(None,), evaluations=0, images=0, stored_bytes=1
)


def asked(**evaluate: Any) -> Experiment:
    return parse_experiment(
        {
            "store": "/s",
            "tasks": [FIRST, SECOND],
            "basis": {"method": "svd", "online": True},
            "search": {"sizes": [1]},
            "evaluate": {"control": "none", **evaluate},
        }
    )


def planned(
    experiment: Experiment,
    choice: Choice = CHOICE,
    others: Mapping[str, Outcome] = MappingProxyType({}),
) -> dict[str, Evaluation]:
    """By name; `others` are outcomes that differ, by candidate."""
    candidates = [ZERO_SHOT, FULL, *basis_candidates(experiment)]
    outcomes = {c.name: others.get(c.name, OUTCOME) for c in candidates}
    plan = evaluations(experiment, candidates, outcomes, choice, "fp32")
    assert len({evaluation.name for evaluation in plan}) == len(plan)
    return {evaluation.name: evaluation for evaluation in plan}


def test_every_evaluation_has_the_identity_that_earlier_versions_wrote() -> None:
    experiment = asked(
        control=None,
        negation=True,
        additions=[[FIRST, SECOND]],
        disentanglement={"points": 3},
        unseen={"tasks": [UNSEEN], "shots": 2},
    )
    plan = planned(experiment)
    pair = f"{FIRST}+{SECOND}".replace("/", "-")
    assert {name for name in plan if not name.startswith("negation")} == {
        "models",
        "full",
        "svd-m1",
        "svd-m1-online",
        "online/svd-m1-online",
        "additions/full",
        "additions/svd-m1",
        f"disentanglement/full/{pair}",
        f"disentanglement/svd-m1/{pair}",
        f"unseen/{UNSEEN}",
    }
    texts = {name: json.dumps(e.identity, sort_keys=True) for name, e in plan.items()}
    assert texts["models"] == '{"precision": "fp32"}'
    # Numbers of tasks are strings, in the order of strings.
    settings = (
        '"coefficient": {"1": 1.0, "16": 0.1, "2": 0.75}, '
        '"own_lengths": {"1": true, "16": false, "2": false}'
    )
    assert texts["full"] == f'{{{settings}, "precision": "fp32", "vector": null}}'
    each = f"{{{settings}}}"
    assert texts["online/svd-m1-online"] == (
        f'{{"full": {each}, "offline": {each}, "online": {each}, "precision": "fp32"}}'
    )
    assert texts["additions/full"].startswith(
        f'{{"additions": [["{FIRST}", "{SECOND}"]], "coefficients": {{"high": 4.0, "low": 0.0, '
    )
    assert texts[f"disentanglement/full/{pair}"] == (
        '{"grid": {"high": 2.0, "low": -1.0, "points": 3}, "precision": "fp32"}'
    )
    unseen = json.loads(texts[f"unseen/{UNSEEN}"])
    assert unseen["basis"] == "svd-m1" and unseen["task"]["name"] == UNSEEN
    assert unseen["learning"] == {"shots": 2, "steps": 30, "lr": 0.02, "batch_size": 64}


def test_tuned_weights_are_a_part_of_the_identity() -> None:
    weights = TunedWeights(kind="per-basis", weights=(0.25, 0.5), accuracy=0.5, trials=3, images=6)
    plan = planned(asked(), others={"full": OUTCOME.model_copy(update={"vector": weights})})
    assert plan["full"].identity["vector"] == {
        "kind": "per-basis",
        "weights": [0.25, 0.5],
        "accuracy": 0.5,
        "trials": 3,
        "images": 6,
    }


def test_negations_are_of_every_task_from_the_full_vectors_and_the_chosen_basis() -> None:
    control = {"name": "control", "data": "/data"}
    plan = planned(asked(control=control, keep=0.9))
    negations = {name: e for name, e in plan.items() if name.startswith("negation")}
    assert set(negations) == {
        f"negation-{c}/{t}" for c in ("full", "svd-m1") for t in (FIRST, SECOND)
    }
    for evaluation in negations.values():
        assert set(evaluation.splits) == {"val", "test"} and evaluation.identity["keep"] == 0.9
        assert set(evaluation.identity) == {"control", "keep", "precision"}


def test_without_a_chosen_basis_operations_are_on_the_full_vectors_alone() -> None:
    experiment = asked(disentanglement=True, unseen={"tasks": [UNSEEN]})
    plan = planned(experiment, CHOICE.model_copy(update={"name": None}))
    assert not any(name.startswith(("unseen", "disentanglement/svd")) for name in plan)
    candidates: list[Candidate] = [FULL, *basis_candidates(experiment)]
    assert [c.name for c in subjects(candidates, CHOICE)] == ["full", "svd-m1"]


def test_arrivals_need_all_that_they_are_compared_with() -> None:
    assert "online/svd-m1-online" in planned(asked())
    for name in ("full", "svd-m1", "svd-m1-online"):
        assert "online/svd-m1-online" not in planned(asked(), others={name: INVALID})


def test_the_test_split_is_read_for_what_finished_and_for_half_the_tasks() -> None:
    experiment = parse_experiment(
        {"store": "/s", "tasks": list(task_names()[:4]), "search": {"sizes": [1]}}
    )
    by_size = {c.size: c for c in basis_candidates(experiment)}
    stopped = OUTCOME.model_copy(update={"stopped": True})
    assert not is_tested(experiment, ZERO_SHOT, OUTCOME)
    assert is_tested(experiment, by_size[1], OUTCOME)
    assert not is_tested(experiment, by_size[1], stopped)
    assert is_tested(experiment, by_size[2], stopped)
    assert not is_tested(experiment, by_size[2], INVALID)
