"""Reads YAML into an `Experiment`, with an error for each wrong field."""

from __future__ import annotations

import errno
import os
import re
import select
import stat
from collections.abc import Mapping
from pathlib import Path

from pydantic import ValidationError

from raytvb.errors import UserError, shortened
from raytvb.experiment.config import Experiment, half, quarter
from raytvb.experiment.field_errors import explained
from raytvb.experiment.fields import TINY_MODEL
from raytvb.experiment.sections.evaluate import EvaluateConfig
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.experiment.sections.search import SearchConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.experiment.yaml_text import MOST_BYTES, Document, YamlTextError, parse_document
from raytvb.storage.store_errors import os_reason
from raytvb.suite.task_names import CONTROL

PIPE_S = 10.0
"""How long the program behind a pipe may pause while it writes an experiment."""


def load_experiment(path: str | Path, overrides: Mapping[str, object] | None = None) -> Experiment:
    """Read an experiment file. overrides: replace fields at the top of the file.

    Raises UserError if the file cannot be read or is wrong.
    """
    try:
        document = parse_document(_read(Path(path)))
    except OSError as error:
        reason = os_reason(error)
        if re.match(r"\w{2,}:/", str(path)):
            reason = "it must be a file of this machine: copy it here"
        raise UserError(f"cannot read the experiment file {path!s:.4000}: {reason}") from None
    except YamlTextError as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    values = document.values
    if isinstance(values, dict):
        values = {**values, **(overrides or {})}
    return parse_experiment(values, str(path), document)


def _read(path: Path) -> bytes:
    """The bytes of a file, or of what comes through a pipe: `raytvb plan <(envsubst < FILE)`.

    Stops one byte behind the largest size that is allowed.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # would wait for a pipe's other end
    with open(descriptor, "rb", buffering=0) as file:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return file.read(MOST_BYTES + 1)
        return _arrived(descriptor, path)


def _arrived(descriptor: int, path: Path) -> bytes:
    """What another program writes to a pipe, or somebody into a terminal, up to its end."""
    data = bytearray()
    while len(data) <= MOST_BYTES:
        if not select.select([descriptor], [], [], PIPE_S)[0]:
            raise UserError(
                f"{path} is no file, and nothing has come through it for {PIPE_S:g} s: name a file"
            )
        piece = os.read(descriptor, 2**16)
        if not piece:
            break
        data += piece
    return bytes(data)


def parse_experiment(
    values: object, origin: str = "experiment", document: Document | None = None
) -> Experiment:
    """Validate plain values and fill in all defaults.

    origin: names the file in errors. document: what the values were read from, if it was YAML.
    Raises UserError that lists each wrong field, its value and what is allowed.
    """
    if not isinstance(values, dict):
        found = "nothing" if values is None else shortened(values)
        raise UserError(f"{origin}: expected fields like `store:` and `tasks:`, found {found}")
    try:
        experiment = Experiment.model_validate(values)
        resolved = {
            "tasks": experiment.tasks,  # checked already
            "finetune": _resolved_finetune(experiment),
            "search": _resolved_search(experiment),
            "evaluate": _resolved_evaluate(experiment),
        }
        return Experiment.model_validate({**values, **resolved})
    except ValidationError as error:
        raise explained(error, origin, document) from None


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
