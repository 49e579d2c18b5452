"""From YAML to an `Experiment`, with an error for each wrong field."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from raytvb.errors import UserError
from raytvb.experiment.base import TINY_MODEL
from raytvb.experiment.config import Experiment, half, quarter
from raytvb.experiment.searching import DisentanglementConfig, UnseenConfig
from raytvb.experiment.tasks import TaskConfig
from raytvb.suite import glyphs


def _resolve(values: dict[str, Any]) -> dict[str, Any]:
    """Fill in the defaults that depend on other fields."""
    experiment = Experiment.model_validate(values)
    tiny, dense = experiment.model.name == TINY_MODEL, experiment.talos.density == 1.0
    finetune, search, evaluate = {}, {}, {}
    if experiment.finetune.lr is None:
        rate = 3e-4 if dense else (6e-3 if experiment.talos.mask == "shared" else 2e-2)
        finetune["lr"] = rate if tiny else 1e-5
    count = len(experiment.tasks)
    sizes = experiment.search.sizes or (quarter(count), half(count))
    search["sizes"] = tuple(
        sorted({min(m, count) for m in sizes})
    )  # more vectors than tasks are those of the tasks
    if experiment.evaluate.control is None and experiment.evaluate.negation and tiny:
        evaluate["control"] = TaskConfig.model_validate({"name": glyphs.CONTROL})
    return {
        "finetune": experiment.finetune.model_copy(update=finetune),
        "search": experiment.search.model_copy(update=search),
        "evaluate": experiment.evaluate.model_copy(update=evaluate),
    }


def _field(location: Sequence[int | str]) -> str:
    return (
        "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".")
        or "the file"
    )


def _allowed(location: Sequence[int | str]) -> str:
    """Names of the fields that exist where an unknown one was given."""
    model: Any = Experiment
    for part in location[:-1]:
        if isinstance(part, str) and issubclass(model, BaseModel) and part in model.model_fields:
            nested = {
                "tasks": TaskConfig,
                "control": TaskConfig,
                "unseen": UnseenConfig,
                "disentanglement": DisentanglementConfig,
            }.get(part, model.model_fields[part].annotation)
            model = nested if isinstance(nested, type) and issubclass(nested, BaseModel) else model
    return ", ".join(model.model_fields)


def _explain(error: ValidationError, origin: str) -> UserError:
    lines, problems = [], error.errors()
    for problem in problems:
        place = problem["loc"]
        if problem["type"] == "too_short" and any(
            p["loc"][: len(place)] == place != p["loc"] for p in problems
        ):
            continue  # a list whose members are wrong counts as too short
        path = _field(problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(
                str(problem["loc"][-1]), _allowed(problem["loc"]).split(", "), 1
            )
            hint = f" (did you mean {near[0]}?)" if near else ""
            lines.append(f"{path}: unknown field{hint}; allowed: {_allowed(problem['loc'])}")
        elif problem["type"] == "missing":
            lines.append(f"{path}: this field is required")
        elif problem["type"] == "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{path}: {message}" if problem["loc"] else message)
        else:
            lines.append(f"{path}: {problem['msg']} (given: {problem['input']!r})")
    return UserError(f"{origin}: " + "\n  ".join(lines))


def parse_experiment(values: Any, origin: str = "experiment") -> Experiment:
    """Validate plain values. Raises UserError that lists each wrong field, its value and what is
    allowed.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{origin}: expected fields like `store:` and `tasks:`, found {type(values).__name__}"
        )
    try:
        return Experiment.model_validate({**values, **_resolve(values)})
    except ValidationError as error:
        raise _explain(error, origin) from None


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Read an experiment file; `overrides` replace top-level fields. Raises UserError for anything
    wrong with it.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the experiment file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if isinstance(values, dict):
        values = {**values, **(overrides or {})}
    return parse_experiment(values, str(path))
