"""The training settings that a task has for itself: how they are read, and that training uses them.

The images are a few dozen of the embedded suite, so a fine-tune is a handful of steps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from experiments import copy_store, vector_bytes, write_images
from safetensors.torch import load
from torch import Tensor

from raytvb.data.preprocess import Preprocess
from raytvb.data.split_cache import cached_split
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment, parse_experiment
from raytvb.experiment.presets import CLIP_TASKS, PRESETS
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.experiment.sections.tasks import TRAINING, TaskConfig
from raytvb.finetuning.finetune_task import finetune_task
from raytvb.models.pretrained_model import store_base
from raytvb.storage.store import Store

SUITE = "glyphs/greek-blur"
OWN: dict[str, Any] = {
    "epochs": 3.0,
    "lr": 1e-2,
    "batch_size": 8,
    "weight_decay": 900.0,
    "label_smoothing": 0.5,
    "seed": 7,
    "accumulate": 2,
    "precision": "bf16",
}
"""Another value than the experiment's for each training setting."""

DUMP: dict[str, Any] = {
    "name": "own",
    "data": "/data",
    "root": None,
    "splits": {"train": None, "val": 0.1, "test": None, "seed": 0},
    "image_column": "image",
    "label_column": "label",
    "classes": None,
    "templates": ["a {}."],
    "epochs": None,
    "max_corrupt": 10,
}
"""A task as the records of the first version have it."""


def asked(*tasks: object, **fields: Any) -> Experiment:
    return parse_experiment({"store": "/store", "tasks": tasks, **fields}, "file.yaml")


def own(**fields: Any) -> dict[str, Any]:
    return {"name": "own", "data": "/data", **fields}


# How they are read --------------------------------------------------------------------------------


def test_a_task_without_settings_is_trained_as_the_section_says() -> None:
    experiment = asked(SUITE, finetune={"batch_size": 16, "lr": 1e-3}, seed=5)
    (task,) = experiment.tasks
    assert experiment.finetune_of(task) == experiment.finetune
    assert experiment.seed_of(task) == 5 and task.training() == {}


@pytest.mark.parametrize("name", TRAINING)
def test_one_setting_of_a_task_takes_the_place_of_the_sections(name: str) -> None:
    experiment = asked(own(**{name: OWN[name]}), SUITE, finetune={"clip": 2.0}, seed=5)
    task, other = experiment.tasks
    dumped = experiment.finetune.model_dump()
    if name == "seed":
        assert (experiment.seed_of(task), experiment.seed_of(other)) == (7, 5)
    else:
        dumped[name] = OWN[name]
        assert experiment.seed_of(task) == 5
    assert experiment.finetune_of(task).model_dump() == dumped
    assert experiment.finetune_of(other) == experiment.finetune


def test_all_settings_of_a_task_are_merged() -> None:
    experiment = asked(own(**OWN), finetune={"clip": 2.0})
    merged = {name: value for name, value in OWN.items() if name != "seed"}
    assert experiment.finetune_of(experiment.tasks[0]) == FinetuneConfig(clip=2.0, **merged)
    assert experiment.tasks[0].training() == OWN and tuple(OWN) == TRAINING


def test_zero_is_a_setting_and_not_a_default() -> None:
    fields = {"weight_decay": 0, "label_smoothing": 0.0, "seed": 0}
    experiment = asked(own(**fields), finetune={"label_smoothing": 0.1}, seed=5)
    (task,) = experiment.tasks
    merged = experiment.finetune_of(task)
    assert (merged.weight_decay, merged.label_smoothing, experiment.seed_of(task)) == (0, 0, 0)


def test_the_default_learning_rate_is_that_of_tasks_without_one() -> None:
    experiment = asked(SUITE, own(lr="3e-5"), talos={"density": 1.0})
    rates = [experiment.finetune_of(task).lr for task in experiment.tasks]
    assert rates == [3e-4, 3e-5]


def test_a_task_may_have_fewer_parts_than_the_section() -> None:
    experiment = asked(own(batch_size=4, accumulate=2), finetune={"accumulate": 8})
    merged = experiment.finetune_of(experiment.tasks[0])
    assert (merged.batch_size, merged.accumulate) == (4, 2)


def test_a_field_of_a_preset_is_that_of_all_its_tasks() -> None:
    experiment = asked({"preset": "clip8", "data": "s3://b/clip", "lr": 3e-5, "seed": 2}, SUITE)
    paper = {name: CLIP_TASKS[name].epochs for name in PRESETS["clip8"]}
    presets = {t.name: t.training() for t in experiment.tasks[:-1]}
    assert presets == {n: {"epochs": e, "lr": 3e-5, "seed": 2} for n, e in paper.items()}
    assert experiment.tasks[-1].training() == {}


def test_settings_are_read_from_yaml(tmp_path: Path) -> None:
    file = tmp_path / "experiment.yaml"
    file.write_text(
        "store: s\ntasks:\n- {name: own, data: /data, lr: 3e-5, batch_size: 64.0, precision: bf16}"
    )
    given = load_experiment(file).tasks[0].training()
    assert given == {"lr": 3e-5, "batch_size": 64, "precision": "bf16"}


# What is wrong ------------------------------------------------------------------------------------


ALLOWED = "file.yaml: tasks[0].{}; allowed: {}, or null"
FIELDS = ", ".join(TaskConfig.model_fields)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"lr": 0}, ALLOWED.format("lr: found 0", "a number above 0 and at most 3e+38")),
    (
        {"lr": "1"},
        ALLOWED.format("lr: found '1'", "a number above 0 and at most 3e+38")
        + "; write 1 without quotes",
    ),
    ({"lr": True}, ALLOWED.format("lr: found true", "a number above 0 and at most 3e+38")),
    (
        {"batch_size": 1.5},
        ALLOWED.format("batch_size: found 1.5", "a whole number from 1 to 1,000,000"),
    ),
    (
        {"accumulate": 0},
        ALLOWED.format("accumulate: found 0", "a whole number from 1 to 1,000,000"),
    ),
    (
        {"weight_decay": -1},
        ALLOWED.format("weight_decay: found -1", "a number from 0 to 1,000"),
    ),
    (
        {"label_smoothing": 1},
        ALLOWED.format("label_smoothing: found 1", "a number at least 0 and below 1"),
    ),
    (
        {"seed": -1},
        ALLOWED.format("seed: found -1", "a whole number at least 0 and below 2,147,483,648"),
    ),
    ({"precision": "fp16"}, ALLOWED.format("precision: found 'fp16'", "'fp32' or 'bf16'")),
    (
        {"learning_rate": 1e-3},
        f"file.yaml: tasks[0].learning_rate: unknown field; allowed: {FIELDS}",
    ),
    (
        {"batchsize": 8},
        f"file.yaml: tasks[0].batchsize: unknown field (did you mean batch_size?); allowed: "
        f"{FIELDS}",
    ),
    (
        {"accumulate": 64, "batch_size": 32},
        "file.yaml: tasks: own: accumulate = 64: at most 32, its batch_size",
    ),
    (
        {"accumulate": 64},
        "file.yaml: tasks: own: accumulate = 64: at most 16, finetune.batch_size",
    ),
    (
        {"batch_size": 3},
        "file.yaml: tasks: own: finetune.accumulate = 4: at most 3, its batch_size",
    ),
]


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_a_wrong_setting_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        asked(own(**fields), finetune={"batch_size": 16, "accumulate": 4})
    assert str(caught.value) == message


def test_the_bounds_are_those_of_the_section() -> None:
    """A value that one of the two refuses is refused by the other one as well."""
    values = (-1, 0, 0.5, 1, 1.5, 128, 1e3, 1e4, 1e7, 3e38, 3.1e38, "fp32", "fp64", True)
    for name in TRAINING:
        for value in values:
            section = {name: value} if name == "seed" else {"finetune": {name: value}}
            assert accepted(own(**{name: value})) == accepted(SUITE, **section), (name, value)


def accepted(task: object, **fields: Any) -> bool:
    try:
        asked(task, **fields)
    except UserError:
        return False
    return True


UNTRAINED: list[tuple[dict[str, Any], str]] = [
    (
        {"control": {"name": "pets", "data": "/pets", "lr": 1e-3, "seed": 1}},
        "evaluate.control: pets is not fine-tuned: leave out lr, seed",
    ),
    (
        {"control": {"preset": "imagenet", "batch_size": 8}},
        "evaluate.control: ImageNet is not fine-tuned: leave out batch_size",
    ),
    (
        {"control": own(lr=2e-3)},
        "evaluate.control: own is not fine-tuned: leave out lr",
    ),
    (
        {"unseen": ["glyphs/greek-fog", {"name": "pets", "data": "/pets", "precision": "bf16"}]},
        "evaluate.unseen.tasks: pets is not fine-tuned: leave out precision",
    ),
    (
        {"unseen": {"tasks": {"preset": "clip8", "weight_decay": 0.0}}},
        "evaluate.unseen.tasks: Cars is not fine-tuned: leave out weight_decay",
    ),
]


@pytest.mark.parametrize(("evaluate", "message"), UNTRAINED, ids=[u[1] for u in UNTRAINED])
def test_tasks_that_are_not_trained_have_no_settings(
    evaluate: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        asked(own(lr=1e-3), evaluate=evaluate)
    assert str(caught.value) == f"file.yaml: {message}"


@pytest.mark.parametrize(
    "evaluate",
    [
        {"control": {"name": "pets", "data": "/pets", "epochs": 3}},
        {"control": own(lr=1e-3)},  # one of the tasks
        {"control": own()},
        {"control": own(lr=2e-3), "negation": False},  # it is not used
        {"unseen": ["clip8"]},
        {"unseen": [{"name": "pets", "data": "/pets", "epochs": 3}]},
    ],
)
def test_tasks_that_are_not_trained_are_read_as_before(evaluate: dict[str, Any]) -> None:
    assert asked(own(lr=1e-3), evaluate=evaluate).tasks[0].lr == 1e-3


# How they are stored ------------------------------------------------------------------------------


def test_a_dump_of_a_task_without_settings_is_as_before() -> None:
    experiment = asked(own(splits={"val": 0.1}, templates=["a {}."]), own(name="b", epochs=3))
    expected = json.dumps(DUMP)
    assert json.dumps(experiment.tasks[0].model_dump(mode="json")) == expected
    assert experiment.tasks[0].model_dump_json() == expected.replace(", ", ",").replace(": ", ":")
    nested = experiment.identity()["tasks"]
    assert isinstance(nested, list) and json.dumps(nested[0]) == expected
    splits = {**DUMP["splits"], "val": None}
    assert nested[1] == {**DUMP, "name": "b", "epochs": 3, "templates": None, "splits": splits}


@pytest.mark.parametrize("name", TRAINING)
def test_a_dump_has_the_settings_that_are_given(name: str) -> None:
    task = TaskConfig.model_validate({**DUMP, name: OWN[name]})
    dump = task.model_dump(mode="json")
    assert dump == {**DUMP, name: OWN[name]}
    assert TaskConfig.model_validate(dump) == task
    assert TaskConfig.model_validate({**dict.fromkeys(TRAINING), **dump}) == task


def test_a_dump_may_be_restricted() -> None:
    bare, task = TaskConfig.model_validate(DUMP), TaskConfig.model_validate({**DUMP, "lr": 1e-3})
    without = {k: v for k, v in DUMP.items() if k not in ("epochs", "templates", "root")}
    excluded = {"epochs", "templates", "root"}
    assert bare.model_dump(mode="json", exclude=excluded) == without
    assert task.model_dump(mode="json", exclude={*excluded, "lr"}) == without
    assert task.model_dump(mode="json", exclude=excluded) == {**without, "lr": 1e-3}
    assert bare.model_dump(include={"name", "lr", "epochs"}) == {"name": "own", "epochs": None}
    assert task.model_dump(include={"name", "lr"}) == {"name": "own", "lr": 1e-3}
    experiment = asked(own(lr=1e-3), own(name="b"))
    nested = experiment.model_dump(include={"tasks": {"__all__": {"name", "lr"}}})
    assert nested == {"tasks": ({"name": "own", "lr": 1e-3}, {"name": "b"})}
    left = experiment.model_dump(exclude={"tasks": {0: {"lr"}}})["tasks"][0]
    assert left == experiment.tasks[0].model_copy(update={"lr": None}).model_dump()


def test_the_description_of_a_task_says_nothing_about_its_training() -> None:
    task = TaskConfig.model_validate({**DUMP, **OWN})
    assert json.dumps(task.described()) == json.dumps(
        {name: value for name, value in DUMP.items() if name != "epochs"}
    )


def test_a_dump_makes_no_warnings(recwarn: pytest.WarningsRecorder) -> None:
    asked(own(**OWN, templates=["a {}."])).model_dump()
    asked(own(**OWN, templates=["a {}."])).model_dump(mode="json")
    assert not recwarn.list


# That training uses them --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 40 images of a task of the suite, of which most are for training."""
    folder = tmp_path_factory.mktemp("images")
    write_images(folder, SUITE, "train", 40)
    return folder


def settings(store: str, images: Path, task: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {
        "store": store,
        "tasks": [{"name": "own", "data": str(images), **task}],
        "talos": {"density": 1.0},
        **fields,
    }


FINETUNE = {"epochs": 2, "batch_size": 16, "lr": 1e-3}


@pytest.fixture(scope="module")
def base(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, str]:
    """A store with the pretrained model only, and the model's fingerprint."""
    store = Store(str(tmp_path_factory.mktemp("base") / "store"))
    record = store_base(parse_experiment(settings(store.url, images, {})))
    return store, record.parents["fingerprint"]


class Trainer:
    """Fine-tunes the task with other settings, each time in a fresh store."""

    def __init__(self, base: tuple[Store, str], images: Path, folder: Path) -> None:
        self._base, self._images, self._folder = base, images, folder

    def store(self, task: dict[str, Any], **fields: Any) -> Store:
        """The store after the fine-tune."""
        number = len([*self._folder.iterdir()])
        store = copy_store(self._base[0], self._folder / f"store-{number}")
        values = settings(store.url, self._images, task, **fields)
        experiment = parse_experiment(values)
        finetune_task(experiment, self._base[1], experiment.tasks[0])
        return store

    def vector(self, task: dict[str, Any], **fields: Any) -> Tensor:
        """All values of the vector."""
        (data,) = vector_bytes(self.store(task, **fields).url).values()
        return torch.cat([tensor.flatten() for _, tensor in sorted(load(data).items())])


@pytest.fixture(scope="module")
def trainer(
    base: tuple[Store, str], images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trainer:
    return Trainer(base, images, tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="module")
def usual(trainer: Trainer) -> Tensor:
    """The vector of a task without settings of its own."""
    return trainer.vector({}, finetune=FINETUNE)


@pytest.mark.parametrize("name", TRAINING)
def test_a_setting_of_a_task_trains_as_the_sections_does(
    name: str, trainer: Trainer, usual: Tensor
) -> None:
    vector = trainer.vector({name: OWN[name]}, finetune=FINETUNE)
    elsewhere: dict[str, Any] = {"finetune": {**FINETUNE, name: OWN[name]}}
    if name == "seed":
        elsewhere = {"finetune": FINETUNE, "seed": OWN[name]}
    assert torch.equal(vector, trainer.vector({}, **elsewhere))
    distance = float((vector - usual).norm() / usual.norm())
    if name == "accumulate":
        assert distance < 1e-2
    else:
        assert distance > (1e-3 if name == "precision" else 1e-2)


def test_the_mask_of_a_task_is_made_with_the_experiments_seed(trainer: Trainer) -> None:
    talos = {"mask": "per-task", "density": 0.5, "images": 16, "rounds": 1, "draws": 1}
    masks = []
    for task in ({}, {"seed": 7, "lr": 1e-3, "batch_size": 8}):
        store = trainer.store(task, talos=talos, finetune=FINETUNE)
        (key,) = (key for key in store.keys("masks") if key.endswith("mask.safetensors"))
        masks.append(store.read(key))
    assert masks[0] == masks[1]
    other = trainer.store({}, talos=talos, finetune=FINETUNE, seed=7)
    assert other.read(key) != masks[0]


def test_how_a_task_is_trained_is_no_part_of_a_splits_identity(
    images: Path, tmp_path: Path
) -> None:
    store, preprocess = Store(str(tmp_path)), Preprocess(8, (0.5,) * 3, (0.5,) * 3, {"size": 8})
    fields = {"name": "own", "data": str(images), "templates": ["a {}."]}
    cached_split(store, TaskConfig.model_validate(fields), "val", preprocess)
    record = store.read("splits/val/own/record.json")
    described = {k: v for k, v in DUMP.items() if k not in ("epochs", "templates", "root")}
    described |= {"data": str(images), "splits": {**DUMP["splits"], "val": None}}
    assert json.loads(record)["identity"]["task"] == described
    cached_split(store, TaskConfig.model_validate({**fields, **OWN}), "val", preprocess)
    assert store.read("splits/val/own/record.json") == record
