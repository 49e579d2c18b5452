"""The experiment file: YAML to frozen, validated objects, every default resolved.

Fields are identity or execution. Identity (model, tasks, seeds, hyperparameters) says what is computed and is frozen in
the store at the first run; execution (`store`, `resources`) says where and how, and changes no result.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from raytvb import presets, suite
from raytvb.basis import METHODS
from raytvb.errors import UserError
from raytvb.methods import MERGE
from raytvb.online import ONLINE_METHODS

TINY_MODEL = "glyphs-tiny"
DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of the {}.")
EXECUTION_FIELDS = ("store", "resources")
MERGES = tuple(name for name in MERGE if name not in ("sum", "fisher"))  # fisher needs what a store has not

Fraction = Annotated[float, Field(gt=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Count = Annotated[int, Field(ge=1)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


class ModelConfig(_Frozen):
    """The pretrained open_clip model whose image tower is fine-tuned."""

    name: str = Field(TINY_MODEL, description=f"open_clip name, hf-hub:…, local-dir:…, or the embedded {TINY_MODEL}")
    pretrained: str | None = Field(None, description="open_clip tag or a checkpoint file; only with an open_clip name")


    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.pretrained is not None and (self.name == TINY_MODEL or self.name.startswith(("hf-hub:", "local-dir:"))):
            raise ValueError(f"pretrained: {self.name} brings its own weights; leave this out")
        return self


class SplitsConfig(_Frozen):
    """Which images are train, val and test: a name that the data has, or (val, test) a share of train's images."""

    train: str | None = Field(None, description="default: train")
    val: str | float | None = Field(None, description="default: val, valid, validation or dev, else 0.1 of train")
    test: str | float | None = Field(None, description="default: test; 0.2 of the data where no split has a name")
    seed: int = Field(0, ge=0, lt=2**31, description="of the permutation that shares are taken from")

    @model_validator(mode="after")
    def _disjoint(self) -> SplitsConfig:
        asked = [getattr(self, s) for s in ("train", "val", "test")]
        names = [a for a in asked if isinstance(a, str)]
        if len(set(names)) < len(names):
            raise ValueError(f"two splits of the same name ({', '.join(names)}); use a share for one, as in `val: 0.1`")
        shares = [a for a in asked if isinstance(a, float)]
        if any(not 0 < share < 1 for share in shares):
            raise ValueError(f"val and test are names, or shares of train's images between 0 and 1, not {shares}")
        if sum(shares) >= 1:
            raise ValueError("the shares of val and test leave nothing for train")
        return self


class TaskConfig(_Frozen):
    """One classification task. A name of the embedded suite needs nothing else; other data needs a URL."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$")
    data: str | None = Field(None, description=(
        "URL of a folder (local, s3://, hf://datasets/…, any fsspec scheme) with Parquet files or a folder of images "
        "per class, or torchvision:NAME"))
    root: str | None = Field(None, description="folder of a torchvision data set (default: in the cache, downloaded)")
    splits: SplitsConfig = SplitsConfig()
    image_column: str = "image"
    label_column: str = "label"
    classes: tuple[str, ...] | None = Field(None, description="class names; default: from the data")
    templates: tuple[str, ...] | None = Field(None, description="prompts with one {} each")
    epochs: Positive | None = Field(None, description="default: finetune.epochs")
    max_corrupt: int = Field(10, ge=0, description="images of a split that may be unreadable; they are skipped")

    @model_validator(mode="after")
    def _known_or_with_data(self) -> TaskConfig:
        if self.root is not None and not (self.data or "").startswith("torchvision:"):
            raise ValueError("root: only with `data: torchvision:NAME`")
        if self.data is None and self.name not in (*suite.task_names(), suite.CONTROL):
            near = difflib.get_close_matches(self.name, suite.task_names(), 3, 0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"for example {', '.join(suite.SHOWCASE[:3])};"
            raise ValueError(f"unknown task {self.name!r}: not in the embedded suite ({hint} `raytvb tasks` lists "
                             f"them all) and no preset ({', '.join(presets.PRESETS)}), and no `data:` URL is given")
        if self.classes is not None and (not self.classes or len(set(self.classes)) < len(self.classes)):
            raise ValueError("classes: give at least one name, and each once")
        for template in self.templates or ():
            if template.count("{}") != 1:
                raise ValueError(f"template {template!r} must have exactly one {{}} for the class name")
        return self

    @property
    def prompts(self) -> tuple[str, ...]:
        """The templates that are used: the given ones or the default of the task's kind."""
        if self.templates:
            return self.templates
        return suite.TEMPLATES if self.data is None else DEFAULT_TEMPLATES


class TalosConfig(_Frozen):
    """Which parameters are trained (TaLoS). density 1.0 trains all of them and writes dense vectors."""

    density: Fraction = 0.1
    mask: Literal["shared", "per-task"] = "shared"
    select: Literal["lowest", "highest", "magnitude", "random"] = Field("lowest", description=(
        "entries to train: those of lowest sensitivity (TaLoS); to compare with: of highest, largest weights, random"))
    rounds: Count = Field(4, description="selection in stages, where it goes by sensitivity")
    damping: float = Field(0.1, ge=0.0, le=1.0)
    images: Count = Field(256, description="training images that are scored, per task")
    draws: Count | Literal["exact"] = 1
    precision: Literal["fp32", "bf16"] = Field("fp32", description="of the forward and backward pass of the scores")

    @property
    def stages(self) -> int:
        """Rounds that are made: weights and random numbers do not change when weights are damped."""
        return self.rounds if self.select in ("lowest", "highest") else 1


class FinetuneConfig(_Frozen):
    """Fine-tuning with AdamW, warm-up and cosine, clipping at norm 1, the zero-shot head frozen."""

    epochs: Positive = Field(10, description="for tasks that do not give their own")
    batch_size: Count = Field(128, description="images a step")
    accumulate: Count = Field(1, description="parts a batch is computed in, for less memory; its gradient is the same")
    precision: Literal["fp32", "bf16"] = Field("fp32", description=(
        "bf16: forward and backward pass in bfloat16 where that is safe (autocast); weights and AdamW stay float32"))
    lr: Positive | None = Field(None, description="default: 1e-5; tuned values on the embedded model")
    weight_decay: float = Field(0.1, ge=0.0)
    warmup: float = Field(0.1, ge=0.0, description="share of the steps that warm up; from 1 on, a number of steps")
    clip: Positive = 1.0
    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)

    @model_validator(mode="after")
    def _whole_parts(self) -> FinetuneConfig:
        if self.accumulate > self.batch_size:
            raise ValueError(f"accumulate = {self.accumulate}: at most {self.batch_size}, the batch_size")
        if self.warmup >= 1 and self.warmup != int(self.warmup):
            raise ValueError(f"warmup = {self.warmup}: a share below 1, or a whole number of steps")
        return self


class BasisConfig(_Frozen):
    """Which bases are built: one method or several."""

    method: tuple[str, ...] = ("ae",)
    prepare: Literal["none", "trimmed", "dropped", "sparsified"] = Field("none", description=(
        "what bases are made of: the task vectors, or those trimmed as in TIES, with dropped entries (DARE) or without "
        "both tails (Breadcrumbs)"))
    online: bool = Field(False, description=(
        f"also bases that see each vector once, in bounded memory ({', '.join(ONLINE_METHODS)})"))
    buffer: Count = Field(1, description="vectors that an online basis takes in at a time; it holds M and these")

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("method"), str):
            values = {**values, "method": (values["method"],)}
        if isinstance(values, dict) and isinstance(values.get("method"), list):
            values = {**values, "method": tuple(dict.fromkeys(map(str, values["method"])))}
        return values

    @model_validator(mode="after")
    def _known(self) -> BasisConfig:
        unknown = [m for m in self.method if m not in METHODS]
        if unknown or not self.method:
            raise ValueError(f"unknown method {', '.join(unknown) or '(none given)'}; allowed: {', '.join(METHODS)}")
        if self.online and not set(self.method) & set(ONLINE_METHODS):
            raise ValueError(f"online: none of the methods {', '.join(self.method)} can be online; "
                             f"those that can: {', '.join(ONLINE_METHODS)}")
        return self


class CoefficientConfig(_Frozen):
    """The merge coefficient alpha, from `low` to `high`. The best one is near one over the number of vectors added."""

    low: float = Field(0.0, ge=0.0)
    high: Positive = 4.0
    strategy: Literal["line", "grid"] = Field("line", description=(
        "line: a coarse-to-fine search for the one maximum, on multiples of 1/size; grid: `points` even steps"))
    points: int = Field(21, ge=2, description="of the grid, low and high included")
    vector: Literal["none", "per-task", "per-basis"] = Field("none", description=(
        "also a coefficient for each task, or each basis vector, for the addition of all tasks (Optuna)"))
    trials: Count = Field(60, description="that Optuna tries for such a vector")

    @model_validator(mode="after")
    def _ordered(self) -> CoefficientConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class SearchConfig(_Frozen):
    """What Ray Tune searches: every basis method at every size, coefficients within each trial."""

    sizes: tuple[Count, ...] = Field((), description="basis sizes M, at most T; default: a quarter and half of T")
    objective: Literal["subsets", "all", "single"] = "subsets"
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] | None = Field(None, description=(
        "choose the smallest basis whose accuracy is at most this below the best one's (0.01: one point); default: the "
        "best one"))
    coefficients: CoefficientConfig = CoefficientConfig()
    shares: tuple[Fraction, ...] = Field((0.25, 1.0), description=(
        "parts of the validation images, rising to 1: the coefficient is searched on the first, and the poorer methods "
        "of a size end there"))
    keep: Fraction = Field(0.5, description=(
        "part of the methods of a size that go on to the next share, at least two; 1: all"))
    lengths: Literal["auto", "projected", "own"] = Field("auto", description=(
        "of what is decoded from a basis: as the projection has it, or that of the task vector; auto: what is better "
        "on validation images, for each number of tasks added but all, whose projected sum it keeps"))
    random_subsets: Count = Field(1, description="draws of the random baselines at each size")
    merges: tuple[str, ...] = Field((), description=(
        f"other merge methods to compare with, on the full vectors and on each basis: {', '.join(MERGES)}"))

    @model_validator(mode="before")
    @classmethod
    def _one_or_many(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return values | {k: (values[k],) for k in ("merges", "sizes", "shares") if isinstance(
                values.get(k), str | int | float)}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> SearchConfig:
        if not self.shares or list(self.shares) != sorted(set(self.shares)) or self.shares[-1] != 1.0:
            raise ValueError(f"shares must rise and end with 1.0, not {list(self.shares)}")
        unknown = [m for m in self.merges if m not in MERGES]
        if unknown or len(set(self.merges)) < len(self.merges):
            raise ValueError(f"merges: {', '.join(unknown) or 'a method is given twice'}; allowed: {', '.join(MERGES)}")
        return self


class UnseenConfig(_Frozen):
    """Tasks without a vector: coefficients of the basis vectors, and of all task vectors, learned on few images."""

    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    shots: Count = Field(4, description="training images of each class")
    steps: Count = 30
    lr: Positive = Field(0.02, description="of Adam on coefficients of vectors that are scaled to equal length")
    batch_size: Count = 64

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if isinstance(values, dict) and "tasks" in values:
            given = values["tasks"]
            given = given if isinstance(given, list | tuple) else [given]
            return {**values, "tasks": [made for task in given for made in _expanded(task)]}
        return values


class DisentanglementConfig(_Frozen):
    """Weight disentanglement error of pairs of tasks, over a grid of two coefficients."""

    pairs: tuple[tuple[str, str], ...] = Field((), description="names of tasks; default: the first two")
    low: float = -1.0
    high: float = 2.0
    points: int = Field(7, ge=2, description="of each coefficient, low and high included")

    @model_validator(mode="after")
    def _ordered(self) -> DisentanglementConfig:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        return self


class EvaluateConfig(_Frozen):
    """What is measured on the test split. Negation's control must keep 95 % of its zero-shot accuracy."""

    control: TaskConfig | None = Field(None, description=(
        f"default: {suite.CONTROL} on the embedded model, else none; imagenet: the ImageNet-1k validation images"))
    negation: bool = Field(True, description="false, or `control: none`: nothing is negated")
    keep: Fraction = 0.95
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description=(
        "of the forward pass: bf16 where it keeps 99.5 % of the answers, else fp32; auto: tries bf16 on GPUs only"))
    additions: tuple[tuple[str, ...], ...] = Field((), description=(
        "lists of tasks to add, beside the seeded subsets: each with its own coefficient"))
    unseen: UnseenConfig | None = None
    disentanglement: DisentanglementConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        control = values.get("control")
        if control == "none":
            values = {**values, "control": None, "negation": False}
        elif isinstance(control, str) or (isinstance(control, dict) and "preset" in control):
            found = _expanded(control)
            if len(found) != 1:
                raise ValueError("control: one task, not the tasks of a preset")
            values = {**values, "control": found[0]}
        unseen = values.get("unseen")
        if isinstance(unseen, str | list | tuple):
            values = {**values, "unseen": {"tasks": unseen}}
        if isinstance(values.get("disentanglement"), bool):
            values = {**values, "disentanglement": {} if values["disentanglement"] else None}
        return values


class ResourceConfig(_Frozen):
    """Execution: what a Ray task asks for. None of it changes a result."""

    cpus_per_task: float = Field(1.0, ge=0.0)
    gpus_per_task: float = Field(0.0, ge=0.0)
    max_retries: int = Field(20, ge=0, description="restarts of a task whose worker or node died")
    checkpoint_s: float = Field(300.0, gt=0.0, description="seconds between checkpoints of a fine-tune")
    concurrent_trials: int = Field(0, ge=0, description="0: as many as the cluster has room for")
    shards: Count = Field(1, description="actors that the coordinates of the vectors are split over for the basis")
    cache: Literal["auto", "memory", "disk"] = Field("auto", description=(
        "where those keep the vectors' kept values; auto: memory up to 1 GB each, else a file under $TMPDIR"))
    wait_s: float = Field(0.0, ge=0.0, description="how long to wait for an autoscaler to bring what is asked for")

    @model_validator(mode="after")
    def _whole_above_one(self) -> ResourceConfig:
        for name in ("cpus_per_task", "gpus_per_task"):
            value = getattr(self, name)
            if value > 1 and value != int(value):
                raise ValueError(f"{name} = {value}: Ray takes fractions below 1 and whole numbers above")
        return self


def _expanded(task: Any) -> list[Any]:
    """A name of a task or preset, or the fields of either, as the fields of tasks."""
    if isinstance(task, str):
        task = {"preset": task} if task in presets.PRESETS else {"name": task}
    if not (isinstance(task, dict) and "preset" in task):
        return [task]
    if task["preset"] not in presets.PRESETS:
        raise ValueError(f"tasks: unknown preset {task['preset']!r}; there are {', '.join(presets.PRESETS)}")
    if "name" in task:
        raise ValueError(f"tasks: preset {task['preset']} names its tasks itself; leave `name` out")
    return list(presets.expand(**task))


class Experiment(_Frozen):
    """Everything an experiment file can say. `store` is a local directory or any fsspec URL (s3://bucket/prefix)."""

    name: str = Field("experiment", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    store: str = Field(min_length=1)
    seed: int = Field(0, ge=0, lt=2**31)
    model: ModelConfig = ModelConfig()
    tasks: tuple[TaskConfig, ...] = Field(min_length=1)
    talos: TalosConfig = TalosConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    basis: BasisConfig = BasisConfig()
    search: SearchConfig = SearchConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    resources: ResourceConfig = ResourceConfig()

    @model_validator(mode="before")
    @classmethod
    def _task_names(cls, values: Any) -> Any:
        if isinstance(values, dict) and isinstance(values.get("tasks"), list | tuple | str | dict):
            given = values["tasks"]
            given = given if isinstance(given, list | tuple) else [given]
            return {**values, "tasks": [made for task in given for made in _expanded(task)]}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Experiment:
        names = [t.name for t in self.tasks]
        repeated = sorted({n for n in names if names.count(n) > 1})
        if repeated:
            raise ValueError(f"tasks: given more than once: {', '.join(repeated)}")
        every = {t.name for t in self.every_task}
        if any(b.startswith(a + "/") for a in every for b in every):
            raise ValueError("tasks: one task's name is the folder of another's (control and unseen tasks included)")
        for field, groups in (("evaluate.additions", self.evaluate.additions),
                              ("evaluate.disentanglement.pairs", self.pairs)):
            for group in groups:
                wrong = [n for n in group if n not in names]
                if wrong or not group or len(set(group)) < len(group):
                    raise ValueError(f"{field}: [{', '.join(group)}]: give different tasks of the experiment"
                                     + (f"; {', '.join(wrong)} is none" if wrong else ""))
        control = self.control
        if control is not None and any(t.name == control.name and t != control for t in self.unseen):
            raise ValueError(f"evaluate: the control and an unseen task are both called {control.name}, but differ")
        unseen = [t.name for t in self.unseen]
        both = [n for n in unseen if n in names]
        if both or len(set(unseen)) < len(unseen):
            raise ValueError(f"evaluate.unseen.tasks: {', '.join(both) or 'a name is given twice'}"
                             + (": these have task vectors; name others" if both else ""))
        return self

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks in order; position t is row t of every Gram matrix and coefficient table."""
        return tuple(t.name for t in self.tasks)

    @property
    def own_masks(self) -> bool:
        """Every task has a mask of its own."""
        return self.talos.mask == "per-task" and self.talos.density < 1.0

    @property
    def control(self) -> TaskConfig | None:
        """The control of negation; None where nothing is negated."""
        return self.evaluate.control if self.evaluate.negation else None

    def tasks_with(self, split: str) -> tuple[TaskConfig, ...]:
        """The tasks whose images of a split are needed: also the control's but for train, and the unseen ones' but for
        val."""
        control = (self.control,) if self.control is not None and split != "train" else ()
        extra = (*control, *(() if split == "val" else self.unseen))
        named = {t.name: t for t in (*reversed(extra), *self.tasks)}  # of the same name the first one
        return (*self.tasks, *(t for t in extra if named[t.name] is t))

    @property
    def every_task(self) -> tuple[TaskConfig, ...]:
        """The tasks, the control where there is one that is not a task itself, and the unseen tasks."""
        return self.tasks_with("test")

    @property
    def unseen(self) -> tuple[TaskConfig, ...]:
        """Tasks without a task vector, that coefficients are learned for."""
        return () if self.evaluate.unseen is None else self.evaluate.unseen.tasks

    @property
    def pairs(self) -> tuple[tuple[str, str], ...]:
        """Pairs of tasks whose weight disentanglement is measured."""
        asked = self.evaluate.disentanglement
        if asked is None or len(self.tasks) < 2:
            return ()
        return asked.pairs or ((self.tasks[0].name, self.tasks[1].name),)

    def identity(self) -> dict[str, Any]:
        """What the experiment computes, as plain JSON values, with every default filled in."""
        return self.model_dump(mode="json", exclude=set(EXECUTION_FIELDS) | {"name"})


def half(count: int) -> int:
    """Basis size M = T/2 that every method is reported at: max(1, round(T/2))."""
    return max(1, round(count / 2))


def quarter(count: int) -> int:
    """Basis size M = T/4: max(1, round(T/4))."""
    return max(1, round(count / 4))


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
    search["sizes"] = tuple(sorted({min(m, count) for m in sizes}))  # more vectors than tasks are those of the tasks
    if experiment.evaluate.control is None and experiment.evaluate.negation and tiny:
        evaluate["control"] = TaskConfig.model_validate({"name": suite.CONTROL})
    return {"finetune": experiment.finetune.model_copy(update=finetune),
            "search": experiment.search.model_copy(update=search),
            "evaluate": experiment.evaluate.model_copy(update=evaluate)}


def _field(location: Sequence[int | str]) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in location).lstrip(".") or "the file"


def _allowed(location: Sequence[int | str]) -> str:
    """Names of the fields that exist where an unknown one was given."""
    model: Any = Experiment
    for part in location[:-1]:
        if isinstance(part, str) and issubclass(model, BaseModel) and part in model.model_fields:
            nested = {"tasks": TaskConfig, "control": TaskConfig, "unseen": UnseenConfig,
                      "disentanglement": DisentanglementConfig}.get(part, model.model_fields[part].annotation)
            model = nested if isinstance(nested, type) and issubclass(nested, BaseModel) else model
    return ", ".join(model.model_fields)


def _explain(error: ValidationError, origin: str) -> UserError:
    lines, problems = [], error.errors()
    for problem in problems:
        place = problem["loc"]
        if problem["type"] == "too_short" and any(p["loc"][:len(place)] == place != p["loc"] for p in problems):
            continue  # a list whose members are wrong counts as too short
        path = _field(problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _allowed(problem["loc"]).split(", "), 1)
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
    """Validate plain values. Raises UserError that lists each wrong field, its value and what is allowed."""
    if not isinstance(values, dict):
        raise UserError(f"{origin}: expected fields like `store:` and `tasks:`, found {type(values).__name__}")
    try:
        return Experiment.model_validate({**values, **_resolve(values)})
    except ValidationError as error:
        raise _explain(error, origin) from None


def load_experiment(path: str | Path, overrides: dict[str, Any] | None = None) -> Experiment:
    """Read an experiment file; `overrides` replace top-level fields. Raises UserError for anything wrong with it."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the experiment file {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if isinstance(values, dict):
        values = {**values, **(overrides or {})}
    return parse_experiment(values, str(path))
