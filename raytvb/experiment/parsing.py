"""Reads YAML into an `Experiment`, with an error for each wrong field."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from raytvb.errors import UserError
from raytvb.experiment.config import Experiment, half, quarter
from raytvb.experiment.fields import TINY_MODEL
from raytvb.experiment.sections.evaluate import DisentanglementConfig, EvaluateConfig, UnseenConfig
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.experiment.sections.search import SearchConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.yaml_text import YamlTextError, parse_yaml
from raytvb.suite.task_names import CONTROL

Location = Sequence[int | str]
"""Where a field is: names of fields and positions in lists, from the top of the file."""


def load_experiment(path: str | Path, overrides: Mapping[str, object] | None = None) -> Experiment:
    """Read an experiment file. overrides: replace fields at the top of the file.

    Raises UserError if the file cannot be read or is wrong.
    """
    try:
        values = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the experiment file {path}: {error.strerror}") from None
    except (YamlTextError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if isinstance(values, dict):
        values = {**values, **(overrides or {})}
    return parse_experiment(values, str(path))


def parse_experiment(values: object, origin: str = "experiment") -> Experiment:
    """Validate plain values and fill in all defaults.

    origin: names the file in errors. Raises UserError that lists each wrong field, its value and
    what is allowed.
    """
    if not isinstance(values, dict):
        raise UserError(
            f"{origin}: expected fields like `store:` and `tasks:`, found {type(values).__name__}"
        )
    try:
        experiment = Experiment.model_validate(values)
        resolved = {
            "finetune": _resolved_finetune(experiment),
            "search": _resolved_search(experiment),
            "evaluate": _resolved_evaluate(experiment),
        }
        return Experiment.model_validate({**values, **resolved})
    except ValidationError as error:
        raise _explain(error, origin) from None


# Defaults that depend on other fields -------------------------------------------------------------


def _resolved_finetune(experiment: Experiment) -> FinetuneConfig:
    """The section with its learning rate filled in.

    The default is CLIP's 1e-5. The embedded model has tuned values, which are higher for sparse
    training.
    """
    if experiment.finetune.lr is not None:
        return experiment.finetune
    if experiment.model.name != TINY_MODEL:
        lr = 1e-5
    elif experiment.talos.density == 1.0:
        lr = 3e-4
    elif experiment.talos.mask == "shared":
        lr = 6e-3
    else:
        lr = 2e-2
    return experiment.finetune.model_copy(update={"lr": lr})


def _resolved_search(experiment: Experiment) -> SearchConfig:
    """The section with its sizes filled in, in rising order. A size above T becomes T."""
    count = len(experiment.tasks)
    sizes = experiment.search.sizes or (quarter(count), half(count))
    at_most_all = {min(size, count) for size in sizes}
    return experiment.search.model_copy(update={"sizes": tuple(sorted(at_most_all))})


def _resolved_evaluate(experiment: Experiment) -> EvaluateConfig:
    """The section with its control filled in, which only the embedded model has by default."""
    evaluate = experiment.evaluate
    if evaluate.control is not None or not evaluate.negation or experiment.model.name != TINY_MODEL:
        return evaluate
    return evaluate.model_copy(update={"control": TaskConfig(name=CONTROL)})


# Errors -------------------------------------------------------------------------------------------


def _explain(error: ValidationError, origin: str) -> UserError:
    problems = error.errors()
    lines = []
    for problem in problems:
        if not _is_consequence(problem, problems):
            lines.append(_line(problem))
    return UserError(f"{origin}: " + "\n  ".join(lines))


def _is_consequence(problem: ErrorDetails, problems: Sequence[ErrorDetails]) -> bool:
    """Whether the problem is that a list is too short only because its members are wrong."""
    location = problem["loc"]
    if problem["type"] != "too_short":
        return False
    inner = [p["loc"] for p in problems if p["loc"] != location]
    return any(other[: len(location)] == location for other in inner)


def _line(problem: ErrorDetails) -> str:
    """One line: the field, what is wrong with it and what is allowed."""
    location, path = problem["loc"], _path(problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            allowed = _allowed_fields(location)
            near = difflib.get_close_matches(str(location[-1]), allowed, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            return f"{path}: unknown field{hint}; allowed: {', '.join(allowed)}"
        case "missing":
            return f"{path}: this field is required"
        case "value_error":
            message = problem["msg"].removeprefix("Value error, ")
            return f"{path}: {message}" if location else message
        case _:
            return f"{path}: {problem['msg']} (given: {problem['input']!r})"


def _path(location: Location) -> str:
    """`tasks[1].name` for ("tasks", 1, "name")."""
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}"
    return path.lstrip(".") or "the file"


_SECTIONS: dict[str, type[BaseModel]] = {
    "tasks": TaskConfig,
    "control": TaskConfig,
    "unseen": UnseenConfig,
    "disentanglement": DisentanglementConfig,
}
"""The sections of those fields whose annotation is not the section's class itself."""


def _allowed_fields(location: Location) -> list[str]:
    """The names of the fields that are allowed at the location of an unknown field."""
    model: type[BaseModel] = Experiment
    for part in location[:-1]:
        if isinstance(part, str) and part in model.model_fields:
            section = _SECTIONS.get(part, model.model_fields[part].annotation)
            if isinstance(section, type) and issubclass(section, BaseModel):
                model = section
    return list(model.model_fields)
