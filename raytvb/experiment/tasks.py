"""Tasks of an experiment file: where the images are, their classes and prompts."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import Field, model_validator

from raytvb.experiment.base import DEFAULT_TEMPLATES, Frozen, Positive
from raytvb.experiment.presets import PRESETS, expand
from raytvb.suite import glyphs


class SplitsConfig(Frozen):
    """Which images are train, val and test: a name that the data has, or (val, test) a share of
    train's images.
    """

    train: str | None = Field(None, description="default: train")
    val: str | float | None = Field(
        None, description="default: val, valid, validation or dev, else 0.1 of train"
    )
    test: str | float | None = Field(
        None, description="default: test; 0.2 of the data where no split has a name"
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="of the permutation that shares are taken from"
    )

    @model_validator(mode="after")
    def _disjoint(self) -> SplitsConfig:
        asked = [getattr(self, s) for s in ("train", "val", "test")]
        names = [a for a in asked if isinstance(a, str)]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two splits of the same name ({', '.join(names)}); use a share for one, as in `val: 0.1`"
            )
        shares = [a for a in asked if isinstance(a, float)]
        if any(not 0 < share < 1 for share in shares):
            raise ValueError(
                f"val and test are names, or shares of train's images between 0 and 1, not {shares}"
            )
        if sum(shares) >= 1:
            raise ValueError("the shares of val and test leave nothing for train")
        return self


class TaskConfig(Frozen):
    """One classification task. A name of the embedded suite needs nothing else; other data needs a
    URL.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    data: str | None = Field(
        None,
        description=(
            "URL of a folder (local, s3://, hf://datasets/…, any fsspec scheme) with Parquet files or a folder of images "
            "per class, or torchvision:NAME"
        ),
    )
    root: str | None = Field(
        None, description="folder of a torchvision data set (default: in the cache, downloaded)"
    )
    splits: SplitsConfig = SplitsConfig()
    image_column: str = "image"
    label_column: str = "label"
    classes: tuple[str, ...] | None = Field(None, description="class names; default: from the data")
    templates: tuple[str, ...] | None = Field(None, description="prompts with one {} each")
    epochs: Positive | None = Field(None, description="default: finetune.epochs")
    max_corrupt: int = Field(
        10, ge=0, description="images of a split that may be unreadable; they are skipped"
    )

    @model_validator(mode="after")
    def _known_or_with_data(self) -> TaskConfig:
        if self.root is not None and not (self.data or "").startswith("torchvision:"):
            raise ValueError("root: only with `data: torchvision:NAME`")
        if self.data is None and self.name not in (*glyphs.task_names(), glyphs.CONTROL):
            near = difflib.get_close_matches(self.name, glyphs.task_names(), 3, 0.5)
            hint = (
                f"did you mean {', '.join(near)}?"
                if near
                else f"for example {', '.join(glyphs.SHOWCASE[:3])};"
            )
            raise ValueError(
                f"unknown task {self.name!r}: not in the embedded suite ({hint} `raytvb tasks` lists "
                f"them all) and no preset ({', '.join(PRESETS)}), and no `data:` URL is given"
            )
        if self.classes is not None and (
            not self.classes or len(set(self.classes)) < len(self.classes)
        ):
            raise ValueError("classes: give at least one name, and each once")
        for template in self.templates or ():
            if template.count("{}") != 1:
                raise ValueError(
                    f"template {template!r} must have exactly one {{}} for the class name"
                )
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates that are used: the given ones or the default of the task's kind."""
        if self.templates:
            return self.templates
        return glyphs.TEMPLATES if self.data is None else DEFAULT_TEMPLATES


def expanded_tasks(task: Any) -> list[Any]:
    """A name of a task or preset, or the fields of either, as the fields of tasks."""
    if isinstance(task, str):
        task = {"preset": task} if task in PRESETS else {"name": task}
    if not (isinstance(task, dict) and "preset" in task):
        return [task]
    if task["preset"] not in PRESETS:
        raise ValueError(
            f"tasks: unknown preset {task['preset']!r}; there are {', '.join(PRESETS)}"
        )
    if "name" in task:
        raise ValueError(f"tasks: preset {task['preset']} names its tasks itself; leave `name` out")
    return list(expand(**task))
