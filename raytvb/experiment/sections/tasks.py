"""The tasks of an experiment file: where their images are, their classes and their prompts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

from raytvb.errors import shortened
from raytvb.experiment.fields import (
    DEFAULT_TEMPLATES,
    LONGEST_NAME,
    Count,
    Epochs,
    Frozen,
    Name,
    Place,
    Precision,
    Rate,
    Real,
    Seed,
    Smoothing,
    WeightDecay,
    Whole,
    Words,
    exponent_number,
    one_or_many,
)
from raytvb.experiment.presets import PRESETS, preset_tasks
from raytvb.storage.addresses import check_shared, parse_url
from raytvb.storage.contract import JsonObject
from raytvb.storage.store_errors import StoreError
from raytvb.suite.task_names import CONTROL, SHOWCASE, TEMPLATES, task_names

TORCHVISION = "torchvision:"
"""How `data` begins for a torchvision data set."""

TRAINING = (
    "epochs",
    "lr",
    "batch_size",
    "weight_decay",
    "label_smoothing",
    "seed",
    "accumulate",
    "precision",
)
"""The fields of a task that say how it is trained. None stands for the experiment's value."""

_LEFT_OUT = tuple(name for name in TRAINING if name != "epochs")
"""Fields that a dump has only if they are given, as older stores do not know them."""

UNKNOWN_TASK = "unknown_task"
"""Type of the error about a name of the embedded suite that it does not have."""

Share = Annotated[Real | Name | None, BeforeValidator(exponent_number)]
"""Name of a split, or a share of train's images."""
_NUMBER = re.compile(r"[0-9.,]+\s*%?")

_BRACES = {"{", "}"}


def _data_place(url: str) -> str:
    """A URL of images. Raises ValueError if workers could not read it, whatever it holds."""
    if url.startswith(TORCHVISION):
        return url
    if url.lower().startswith(TORCHVISION):
        raise ValueError(f"{shortened(url)}: write {TORCHVISION} in lower case")
    try:
        check_shared(url)
    except StoreError as error:
        raise ValueError(str(error)) from None
    return url


def _folder_place(path: str) -> str:
    """A folder of this machine. Raises ValueError for anything else."""
    try:
        scheme = parse_url(path)[1]
    except StoreError as error:
        raise ValueError(str(error)) from None
    if scheme != "file" or "://" in path:
        raise ValueError(f"{shortened(path)} is a URL: name a folder of this machine")
    return path


class SplitsConfig(Frozen):
    """Which images are train, val and test.

    Each is the name of a split that the data have. val and test may also be a share of the images
    of train.
    """

    train: Name | None = Field(None, description="Name of the training split. Default: train.")
    val: Share = Field(
        None,
        description=(
            "Name of the validation split, or a share of train's images. Default: val, valid, "
            "validation or dev, whichever the data have; otherwise 0.1."
        ),
    )
    test: Share = Field(
        None,
        description=(
            "Name of the test split, or a share of train's images. Default: test; 0.2 if the data "
            "have no named splits."
        ),
    )
    seed: Seed = Field(0, description="Seed of the random order that shares are taken from.")

    @model_validator(mode="after")
    def _disjoint(self) -> SplitsConfig:
        splits = (self.train, self.val, self.test)
        names = [split for split in splits if isinstance(split, str)]
        for name in names:
            if _NUMBER.fullmatch(name):
                raise ValueError(
                    f"{shortened(name)} is the name of a split: write a share as a number without "
                    f"quotes, as in `val: 0.1`"
                )
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
                    f"{shortened(shares)}"
                )
        if sum(shares) >= 1:
            raise ValueError("the shares of val and test leave nothing for train")
        return self


class TaskConfig(Frozen):
    """One classification task.

    A task of the embedded suite needs only a name. Any other task needs `data`.
    """

    name: Annotated[
        str,
        Field(
            pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$",
            max_length=LONGEST_NAME,
        ),
        Words(
            f"a name of at most {LONGEST_NAME} letters a-z, digits, '.', '_' and '-', with '/' "
            f"between its parts, each of which begins with a letter or digit"
        ),
    ] = Field(description="Name of the task in the store and in every report.")
    data: (
        Annotated[
            Place,
            AfterValidator(_data_place),
            Words("a folder, a URL like s3://bucket/prefix, or torchvision:NAME"),
        ]
        | None
    ) = Field(
        None,
        description=(
            "Where the images are: the URL of a folder (local, s3://, hf://datasets/…, any fsspec "
            "scheme) with Parquet files or a folder of images for each class; or torchvision:NAME. "
            "Leave it out for tasks of the embedded suite."
        ),
    )
    root: Annotated[Place, AfterValidator(_folder_place)] | None = Field(
        None,
        description=(
            "Folder of a torchvision data set. Default: one in the cache, into which it is "
            "downloaded."
        ),
    )
    splits: SplitsConfig = Field(
        SplitsConfig(), description="Which images are train, val and test."
    )
    image_column: Name = Field("image", description="Parquet column of the images.")
    label_column: Name = Field("label", description="Parquet column of the labels.")
    classes: tuple[Annotated[str, Field(max_length=1000)], ...] | None = Field(
        None, description="Class names in the order of the labels. Default: those of the data."
    )
    templates: tuple[Annotated[str, Field(max_length=1000)], ...] | None = Field(
        None, description="Prompts, each with one {} for the class name. Default: three of CLIP's."
    )
    epochs: Epochs | None = Field(
        None, description="Epochs of fine-tuning. Default: finetune.epochs."
    )
    lr: Rate | None = Field(None, description="Learning rate. Default: finetune.lr.")
    batch_size: Count | None = Field(
        None, description="Images in each step. Default: finetune.batch_size."
    )
    weight_decay: WeightDecay | None = Field(
        None, description="Decoupled weight decay. Default: finetune.weight_decay."
    )
    label_smoothing: Smoothing | None = Field(
        None, description="For the cross entropy. Default: finetune.label_smoothing."
    )
    seed: Seed | None = Field(
        None,
        description=(
            "Seed of the training. Default: the experiment's, from which masks and prepared twins "
            "are always made."
        ),
    )
    accumulate: Count | None = Field(
        None, description="In how many parts a batch is computed. Default: finetune.accumulate."
    )
    precision: Precision | None = Field(
        None, description="Number format of training. Default: finetune.precision."
    )
    max_corrupt: Whole = Field(
        10,
        ge=0,
        le=1_000_000_000,
        description=(
            "How many images of a split may be unreadable. These are skipped. More are an error."
        ),
    )

    @model_validator(mode="after")
    def _known_or_with_data(self) -> TaskConfig:
        if self.data is None and self.name != CONTROL and self.name not in task_names():
            raise PydanticCustomError(UNKNOWN_TASK, "unknown task")
        if self.root is not None and not (self.data or "").startswith(TORCHVISION):
            raise ValueError("root: only with `data: torchvision:NAME`")
        return self

    @model_validator(mode="after")
    def _sound_prompts(self) -> TaskConfig:
        if self.classes is not None:
            _check_classes(self.classes)
        if self.templates == ():
            raise ValueError("templates: give at least one prompt, or leave the field out")
        for template in self.templates or ():
            if template.count("{}") != 1 or _BRACES & set(template.replace("{}", "")):
                raise ValueError(
                    f"templates: {shortened(template)} must have exactly one {{}} for the class "
                    f"name, and no other braces"
                )
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """The dump without newer fields that are None, so that identities stay as in old stores."""
        fields: dict[str, object] = dump(self)
        return {k: v for k, v in fields.items() if v is not None or k not in _LEFT_OUT}

    def training(self) -> dict[str, float | int | str]:
        """The training fields that the task gives itself, by name."""
        given = {name: getattr(self, name) for name in TRAINING}
        return {name: value for name, value in given.items() if value is not None}

    def described(self) -> JsonObject:
        """The task without its training: which images, classes and prompts it has."""
        description: JsonObject = self.model_dump(mode="json", exclude=set(TRAINING))
        return description

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates of the task, or else the defaults for its kind of task."""
        if self.templates:
            return self.templates
        return TEMPLATES if self.data is None else DEFAULT_TEMPLATES


def _check_classes(classes: Sequence[str]) -> None:
    """Raise ValueError unless there are classes, and each has a name of its own."""
    if not classes or len(set(classes)) < len(classes):
        raise ValueError("classes: give at least one name, and each name once")
    known: dict[str, str] = {}
    for name in classes:
        words = " ".join(name.replace("\u200b", "").replace("\ufeff", "").split())
        if not words:
            raise ValueError("classes: a name is blank: give each class a name")
        twin = known.setdefault(words, name)
        if twin != name:
            raise ValueError(
                f"classes: {shortened(twin)} and {shortened(name)} differ only in white "
                f"space: rename one"
            )


def unknown_task(name: str) -> str:
    """Why a name alone is no task, with the names that are near it."""
    known = (*task_names(), *PRESETS)
    near = difflib.get_close_matches(name[:LONGEST_NAME].lower(), known, 3, 0.5)
    examples = f"for example {', '.join(SHOWCASE[:3])};"
    hint = f"did you mean {', '.join(near)}?" if near else examples
    return (
        f"unknown task {shortened(name)}: not in the embedded suite ({hint} `raytvb tasks` lists "
        f"them all) and no preset ({', '.join(PRESETS)}), and no `data:` URL is given"
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
        raise ValueError(f"unknown preset {shortened(preset)}; there are {', '.join(PRESETS)}")
    if "name" in fields:
        raise ValueError(f"preset {preset} names its tasks itself; leave `name` out")
    if data is not None and not isinstance(data, str):
        raise ValueError(f"preset {preset}: data is a URL, not {shortened(data)}")
    if data is not None:
        _data_place(data)
    return preset_tasks(preset, data, fields)


Task = Annotated[
    TaskConfig,
    Words("the name of a task or of a preset, or fields like `name:` and `data:`"),
]

Tasks = Annotated[
    tuple[Task, ...], Field(min_length=1, max_length=100_000), BeforeValidator(expanded_tasks)
]
"""At least one task: a list of names, presets and fields, or one of these alone."""
