"""The search benchmark on a finished store: its fields, its counts, and what both sides choose."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytvb.bench.our_search import choice
from raytvb.bench.published_search import COEFFICIENTS
from raytvb.bench.search import bench_search
from raytvb.bench.search_experiment import basis_sizes, stored_experiment, suite_experiment
from raytvb.cli.main import main
from raytvb.data.load_split import load_split
from raytvb.errors import UserError
from raytvb.evaluation.evaluators import make_evaluator
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.stored import existing_basis
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.masks import load_mask
from raytvb.models.evaluator import Evaluator
from raytvb.models.heads import load_head
from raytvb.models.pretrained_model import load_base
from raytvb.search.candidates import ZERO_SHOT, Candidate
from raytvb.search.results import Measured
from raytvb.search.trial import CandidateSearch
from raytvb.storage.store import Store

SIDE = {
    "algorithm",
    "seconds",
    "test_seconds",
    "candidates",
    "evaluations",
    "images",
    "test_images",
    "chosen",
    "validation_accuracy",
    "test_accuracy",
}
FEW = (0.0, 0.5, 1.0)


@pytest.fixture(scope="module")
def compared(finished: tuple[Path, Store]) -> Iterator[dict[str, Any]]:
    """A benchmark with few coefficients: its `result`, the `results` of our rounds, and our
    `evaluators`.
    """
    results, evaluators = list[Measured](), list[Evaluator]()

    class Watched(CandidateSearch):
        def round(self, number: int, before: Measured | None) -> Measured:
            results.append(super().round(number, before))
            return results[-1]

    def watched_evaluator(*arguments: Any) -> Evaluator:
        evaluators.append(make_evaluator(*arguments))
        return evaluators[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("raytvb.bench.published_search.COEFFICIENTS", FEW)
        patch.setattr("raytvb.bench.our_search.CandidateSearch", Watched)
        patch.setattr("raytvb.bench.our_search.make_evaluator", watched_evaluator)
        found = bench_search(sizes=[2, 1], method="svd", store=finished[1].url)
    yield {
        "result": found.to_json(),
        "results": results,
        "evaluators": evaluators,
        "store": finished[1],
    }


def evaluators(store: Store) -> tuple[Experiment, dict[str, Evaluator]]:
    """The experiment of the store, and an evaluator of each split, made step by step."""
    experiment = stored_experiment(store, "svd", [1, 2], "all")
    encoder = load_base(store.url, store.read_json("base/record.json")["parents"]["fingerprint"])
    heads = {t.name: load_head(TaskStore(experiment, t), encoder).weights for t in experiment.tasks}
    mask = load_mask(store, "masks/shared/mask.safetensors").tensors()
    tower: Any = encoder.model
    return experiment, {
        split: Evaluator(
            tower.visual,
            heads,
            {t.name: load_split(t, split, encoder.preprocess) for t in experiment.tasks},
            encoder.preprocess,
            mask=mask,
            device=torch.device("cpu"),
        )
        for split in ("val", "test")
    }


@pytest.mark.slow
def test_the_result_says_what_was_compared_and_how_it_went(compared: dict[str, Any]) -> None:
    found, threads = compared["result"], torch.get_num_threads()
    reference, ours = found["reference"], found["ours"]
    assert (found["benchmark"], found["tasks"], found["sizes"]) == ("search", 3, [1, 2])
    assert (found["method"], found["objective"], found["density"]) == ("svd", "all", 0.1)
    assert set(reference) == set(ours) == SIDE
    assert all(side["seconds"] > 0 < side["test_seconds"] for side in (reference, ours))
    assert found["ratio"] == pytest.approx(reference["seconds"] / ours["seconds"])
    assert found["images_ratio"] == pytest.approx(reference["images"] / ours["images"])
    assert found["accuracy_gap"] == pytest.approx(
        reference["test_accuracy"] - ours["test_accuracy"]
    )
    assert found["machine"]["threads"] == 1 and found["versions"]["torch"]
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_counts_are_those_of_what_was_done(compared: dict[str, Any]) -> None:
    reference, ours, results = (
        compared["result"]["reference"],
        compared["result"]["ours"],
        compared["results"],
    )
    experiment, by_split = evaluators(compared["store"])
    images = {
        split: sum(e.count(t).total for t in experiment.task_names) for split, e in by_split.items()
    }
    assert reference["candidates"] == reference["evaluations"] == 2 * len(FEW)
    assert reference["images"] == 2 * len(FEW) * images["val"]
    assert reference["test_images"] == ours["test_images"] == images["test"]
    rounds = len(experiment.search.shares)
    assert len(results) == 3 * rounds  # evaluations of zero-shot and two bases
    per_candidate = [results[k : k + rounds] for k in range(0, len(results), rounds)]
    looked_at = [{(t.size, t.coefficient) for r in own for t in r.tried} for own in per_candidate]
    assert ours["candidates"] == sum(map(len, looked_at))
    assert ours["evaluations"] == sum(len(r.tried) for r in results)
    validation, test = compared["evaluators"]
    assert (ours["images"], ours["test_images"]) == (validation.images, test.images)
    assert {size for pairs in looked_at for size, _ in pairs} == {3}


@pytest.mark.slow
def test_both_choose_the_best_that_they_looked_at(compared: dict[str, Any]) -> None:
    reference, ours, store = (
        compared["result"]["reference"],
        compared["result"]["ours"],
        compared["store"],
    )
    experiment, by_split = evaluators(store)

    def accuracy(split: str, size: int, alpha: float) -> float:
        basis = existing_basis(store, f"svd-m{size}")
        W = basis.coefficients()[1]
        (direction,) = basis.vectors().combinations(W.sum(1, keepdim=True))
        by_split[split].merge(direction, alpha)
        return sum(by_split[split].count(t).accuracy for t in experiment.task_names) / 3

    grid = {(size, alpha): accuracy("val", size, alpha) for size in (1, 2) for alpha in FEW}
    size, alpha = max(grid, key=lambda pair: grid[pair])  # the first of equal values
    assert reference["chosen"] == {"size": size, "coefficient": alpha}
    assert reference["validation_accuracy"] == pytest.approx(grid[size, alpha])
    assert reference["test_accuracy"] == pytest.approx(accuracy("test", size, alpha))
    best = max(r.objective for r in compared["results"] if r.share == 1.0)
    assert ours["validation_accuracy"] == best > grid[1, 0.0]
    chosen = ours["chosen"]
    assert best == pytest.approx(accuracy("val", chosen["size"], chosen["coefficient"]))
    assert ours["test_accuracy"] == pytest.approx(
        accuracy("test", chosen["size"], chosen["coefficient"])
    )


@pytest.mark.slow
def test_json_is_one_object_with_a_coefficient_for_each_number_of_tasks(
    compared: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("raytvb.bench.published_search.COEFFICIENTS", (0.0, 0.5))
    assert (
        main(
            [
                "bench",
                "search",
                "--store",
                compared["store"].url,
                "--method",
                "ae-anchored",
                "--size",
                "1",
                "--objective",
                "subsets",
                "--json",
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    reference, ours = found["reference"], found["ours"]
    assert (found["objective"], found["sizes"], found["method"]) == ("subsets", [1], "ae-anchored")
    assert reference["chosen"]["size"] == 1 and set(
        reference["chosen"]["coefficient"].values()
    ) <= {0.0, 0.5}
    assert (
        set(reference["chosen"]["coefficient"])
        == set(ours["chosen"]["coefficient"])
        == {"1", "2", "3"}
    )
    # Each task alone, every two of them, and all three: each class with its own coefficients.
    once = compared["result"]["reference"]["images"] // (2 * len(FEW))
    assert reference["images"] == 2 * 4 * once
    assert reference["candidates"] == reference["evaluations"] == 2 * 3


@pytest.mark.slow
def test_a_store_without_the_bases_is_told_what_it_lacks(
    finished: tuple[Path, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "search", "--store", finished[1].url, "--method", "ae", "--json"]) == 1
    out, error = capsys.readouterr()
    assert out == "" and error.startswith(
        f"error: {finished[1].url} lacks basis/ae-m1, basis/ae-m2 (its bases: "
    )
    assert "ae-anchored-m1, ae-anchored-m2, svd-m1, svd-m2" in error
    with pytest.raises(UserError, match="holds no experiment yet"):
        bench_search(store=str(tmp_path))
    with pytest.raises(UserError, match="leave out --tasks and --density"):
        bench_search(4, store=finished[1].url)
    with pytest.raises(ValueError, match="from 1 to 2 for 3 tasks, got 3"):
        bench_search(sizes=[1, 3], store=finished[1].url)


def test_nothing_is_chosen_that_is_not_better_than_the_pretrained_model(
    finished: tuple[Path, Store],
) -> None:
    experiment = stored_experiment(finished[1], "svd", [1, 2], "all")
    rounds = {"zero-shot": [0.4, 0.5], "svd-m1": [0.6, 0.5], "svd-m2": [0.3, 0.45]}
    assert choice_of(experiment, rounds) is ZERO_SHOT
    assert choice_of(experiment, rounds | {"svd-m2": [0.3, 0.51]}).name == "svd-m2"
    equals = rounds | {"svd-m1": [0.3, 0.6], "svd-m2": [0.7, 0.6]}
    assert choice_of(experiment, equals).name == "svd-m1"  # it is smaller


def choice_of(experiment: Experiment, objectives: dict[str, list[float]]) -> Candidate:
    """The choice after rounds with these objectives."""
    rounds = {}
    for name, values in objectives.items():
        rounds[name] = [measured(value) for value in values]
    return choice(experiment, rounds)


def measured(objective: float) -> Measured:
    return Measured(
        objective=objective,
        share=1.0,
        coefficient={3: 0.5},
        own_lengths={3: False},
        accuracy={3: objective},
        tried=(),
        images=0,
        evaluations=0,
    )


def test_without_a_store_it_is_the_embedded_suite() -> None:
    assert len(COEFFICIENTS) == 21
    assert COEFFICIENTS[1] == pytest.approx(0.05) and COEFFICIENTS[-1] == 1.0
    assert basis_sizes(16) == [2, 4, 6, 8, 12]
    assert basis_sizes(2) == [1] and basis_sizes(8, [4, 2, 4]) == [2, 4]
    experiment = suite_experiment("store", 16, "svd", [], "subsets", 1.0)
    same = parse_experiment({**experiment.model_dump(mode="json")})
    assert (
        same == experiment
        and len(experiment.tasks) == 16
        and experiment.search.sizes == (2, 4, 6, 8, 12)
    )
    assert (experiment.talos.density, experiment.basis.method, experiment.finetune.epochs) == (
        1.0,
        ("svd",),
        7.5,
    )


def test_what_cannot_be_made_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "raytvb.bench.search_experiment.SETUP", "print('no room')\nraise SystemExit(1)"
    )
    assert main(["bench", "search", "--tasks", "2", "--json"]) == 1
    out, error = capfd.readouterr()
    assert out == "" and "no room\nerror: the vectors and bases could not be made" in error
    with pytest.raises(ValueError, match="unknown basis method"):
        bench_search(2, method="odd")
