"""The tasks of an experiment file: where their images are, their classes and their prompts."""

from __future__ import annotations

import difflib
from typing import Annotated

from pydantic import BeforeValidator, Field, model_validator

from raytvb.experiment.fields import DEFAULT_TEMPLATES, Frozen, Positive, one_or_many
from raytvb.experiment.presets import PRESETS, preset_tasks
from raytvb.suite.task_names import CONTROL, SHOWCASE, TEMPLATES, task_names


class SplitsConfig(Frozen):
    """Which images are train, val and test.

    Each is the name of a split that the data have. val and test may also be a share of the images
    of train.
    """

    train: str | None = Field(None, description="Name of the training split. Default: train.")
    val: str | float | None = Field(
        None,
        description=(
            "Name of the validation split, or a share of train's images. Default: val, valid, "
            "validation or dev, whichever the data have; otherwise 0.1."
        ),
    )
    test: str | float | None = Field(
        None,
        description=(
            "Name of the test split, or a share of train's images. Default: test; 0.2 if the data "
            "have no named splits."
        ),
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of the random order that shares are taken from."
    )

    @model_validator(mode="after")
    def _disjoint(self) -> SplitsConfig:
        splits = (self.train, self.val, self.test)
        names = [split for split in splits if isinstance(split, str)]
        shares = [split for split in splits if isinstance(split, float)]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two splits of the same name ({', '.join(names)}); use a share for one, as in "
                f"`val: 0.1`"
            )
        for share in shares:
            if not 0 < share < 1:
                raise ValueError(
                    f"val and test are names, or shares of train's images between 0 and 1, not "
                    f"{shares}"
                )
        if sum(shares) >= 1:
            raise ValueError("the shares of val and test leave nothing for train")
        return self


class TaskConfig(Frozen):
    """One classification task.

    A task of the embedded suite needs only a name. Any other task needs `data`.
    """

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$",
        description="Name of the task in the store and in every report.",
    )
    data: str | None = Field(
        None,
        description=(
            "Where the images are: the URL of a folder (local, s3://, hf://datasets/…, any fsspec "
            "scheme) with Parquet files or a folder of images for each class; or torchvision:NAME. "
            "Leave it out for tasks of the embedded suite."
        ),
    )
    root: str | None = Field(
        None,
        description=(
            "Folder of a torchvision data set. Default: one in the cache, into which it is "
            "downloaded."
        ),
    )
    splits: SplitsConfig = Field(
        SplitsConfig(), description="Which images are train, val and test."
    )
    image_column: str = Field("image", description="Parquet column of the images.")
    label_column: str = Field("label", description="Parquet column of the labels.")
    classes: tuple[str, ...] | None = Field(
        None, description="Class names in the order of the labels. Default: those of the data."
    )
    templates: tuple[str, ...] | None = Field(
        None, description="Prompts, each with one {} for the class name. Default: three of CLIP's."
    )
    epochs: Positive | None = Field(
        None, description="Epochs of fine-tuning. Default: finetune.epochs."
    )
    max_corrupt: int = Field(
        10,
        ge=0,
        description=(
            "How many images of a split may be unreadable. These are skipped. More are an error."
        ),
    )

    @model_validator(mode="after")
    def _known_or_with_data(self) -> TaskConfig:
        if self.data is None and self.name != CONTROL and self.name not in task_names():
            raise ValueError(_unknown_task(self.name))
        if self.root is not None and not (self.data or "").startswith("torchvision:"):
            raise ValueError("root: only with `data: torchvision:NAME`")
        return self

    @model_validator(mode="after")
    def _sound_prompts(self) -> TaskConfig:
        classes = self.classes
        if classes is not None and (not classes or len(set(classes)) < len(classes)):
            raise ValueError("classes: give at least one name, and each name once")
        for template in self.templates or ():
            if template.count("{}") != 1:
                raise ValueError(
                    f"template {template!r} must have exactly one {{}} for the class name"
                )
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates of the task, or else the defaults for its kind of task."""
        if self.templates:
            return self.templates
        return TEMPLATES if self.data is None else DEFAULT_TEMPLATES


def _unknown_task(name: str) -> str:
    near = difflib.get_close_matches(name, task_names(), 3, 0.5)
    examples = f"for example {', '.join(SHOWCASE[:3])};"
    hint = f"did you mean {', '.join(near)}?" if near else examples
    return (
        f"unknown task {name!r}: not in the embedded suite ({hint} `raytvb tasks` lists them all) "
        f"and no preset ({', '.join(PRESETS)}), and no `data:` URL is given"
    )


def expanded_tasks(given: object) -> object:
    """The tasks of an experiment file as lists of fields.

    given: a list of names of tasks, names of presets, and fields; or one of these alone. Anything
    else is returned as it is, and pydantic then refuses it. Raises ValueError for a preset that is
    unknown or wrongly used.
    """
    tasks = one_or_many(given)
    if not isinstance(tasks, list | tuple):
        return given
    expanded: list[object] = []
    for task in tasks:
        if isinstance(task, str):
            task = {"preset": task} if task in PRESETS else {"name": task}
        if isinstance(task, dict) and "preset" in task:
            expanded += _tasks_of_preset(task)
        else:
            expanded.append(task)
    return expanded


def _tasks_of_preset(given: dict[str, object]) -> list[dict[str, object]]:
    fields = dict(given)
    preset, data = fields.pop("preset"), fields.pop("data", None)
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; there are {', '.join(PRESETS)}")
    if "name" in fields:
        raise ValueError(f"preset {preset} names its tasks itself; leave `name` out")
    if data is not None and not isinstance(data, str):
        raise ValueError(f"preset {preset}: data is a URL, not {data!r}")
    return preset_tasks(preset, data, fields)


Tasks = Annotated[tuple[TaskConfig, ...], Field(min_length=1), BeforeValidator(expanded_tasks)]
"""At least one task: a list of names, presets and fields, or one of these alone."""
