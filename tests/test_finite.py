"""Values that are not finite end in an error that names the tensors, before they are stored."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from test_sparse import CPU, PREPROCESS, full_mask, random_mask, toy_net, toy_split
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.errors import UserError
from raytvb.experiment.parsing import parse_experiment
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.experiment.task_store import TaskStore
from raytvb.finetuning.masks import _sensitivities
from raytvb.finetuning.training_loop import Checkpoint, finetune
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.merge_registry import MERGE_METHODS, merge_method
from raytvb.maths.method_registry import MethodError
from raytvb.maths.task_vector import TaskVector
from raytvb.search.merged_vectors import NotFiniteError, method_direction
from raytvb.suite.task_names import class_names

BAD = (math.nan, math.inf, -math.inf)


def test_names_are_listed() -> None:
    tensors = {f"t{n}": torch.ones(3) for n in range(6)}
    assert not_finite(tensors) == []
    for n in (5, 0, 3, 2):
        tensors[f"t{n}"][1] = BAD[n % 3]
    assert not_finite(tensors) == ["t0", "t2", "t3", "t5"]
    assert listed(["a"]) == "a" and listed(["a", "b", "c"]) == "a, b, c"
    assert listed(not_finite(tensors)) == "t0, t2, t3 and 1 more"


# Task vectors -------------------------------------------------------------------------------------


def models() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Two models with an attention mask of 0 and -inf as a buffer."""
    mask = torch.full((4, 4), -torch.inf).triu(1)
    base = {"w": torch.randn(3, 2), "b": torch.randn(5), "attn_mask": mask, "n": torch.tensor(3)}
    tuned = {"w": torch.randn(3, 2), "b": torch.randn(5), "attn_mask": mask.clone(), "n": base["n"]}
    return base, tuned


def test_infinite_buffers_make_no_nan() -> None:
    base, tuned = models()
    vector = TaskVector.from_state_dicts(base, tuned)
    assert torch.equal(vector.tensors["attn_mask"], torch.zeros(4, 4))
    assert torch.equal(vector.tensors["w"], tuned["w"] - base["w"])
    assert math.isfinite(vector.norm())
    again = (2.0 * vector - vector).apply(base, 0.5)
    assert torch.equal(again["attn_mask"], base["attn_mask"]) and not not_finite({"w": again["w"]})


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("which", [0, 1])
def test_a_difference_that_is_not_finite_is_named(which: int, value: float) -> None:
    pair = models()
    pair[which]["b"][2] = value
    with pytest.raises(ValueError, match=r"difference of the two models has NaN .* values in b:"):
        TaskVector.from_state_dicts(*pair)


def test_a_difference_that_overflows_is_named() -> None:
    base, tuned = models()
    base["w"][0, 0], tuned["w"][0, 0] = -3e38, 3e38
    base["attn_mask"][0, 0] = -math.inf  # in one model only
    with pytest.raises(ValueError, match="NaN or infinite values in attn_mask, w:"):
        TaskVector.from_state_dicts(base, tuned)


@pytest.mark.parametrize(
    ("dtype", "coefficient"),
    [
        (torch.float32, 1e200),
        (torch.float32, math.nan),
        (torch.float32, -math.inf),
        (torch.float16, 1e6),
        (torch.bfloat16, 1e39),
    ],
)
def test_an_application_that_is_not_finite_is_named(dtype: torch.dtype, coefficient: float) -> None:
    base, tuned = models()
    vector = TaskVector.from_state_dicts(base, tuned)
    state = {name: t.to(dtype) if t.is_floating_point() else t for name, t in base.items()}
    with pytest.raises(ValueError, match=r"the result would have NaN or infinite values in .*b, w"):
        vector.apply(state, coefficient)
    assert not not_finite({"w": vector.apply(state, 0.5)["w"]})


# Fine-tuning --------------------------------------------------------------------------------------


def config(**fields: float) -> FinetuneConfig:
    return FinetuneConfig.model_validate({"batch_size": 25, "warmup": 0.0, **fields})


@pytest.mark.parametrize("dense", [False, True])
def test_a_last_update_that_overflows_is_no_vector(dense: bool) -> None:
    """The loss before it was finite, so only the weights show it."""
    net = toy_net()
    mask = full_mask(net) if dense else random_mask(net)
    huge = config(epochs=0.5, lr=3e38, weight_decay=1000.0)
    words = r"after step 1 of 1 the parameters have NaN or infinite values in .*; lower finetune.lr"
    with pytest.raises(UserError, match=words) as caught:
        finetune(net, toy_split(), mask, huge, PREPROCESS, seed=0, device=CPU)
    assert ("1.weight" in str(caught.value) and "2.weight" not in str(caught.value)) or dense


def test_no_checkpoint_holds_values_that_are_not_finite() -> None:
    net, saved = toy_net(), list[Checkpoint]()
    huge = config(epochs=2, lr=3e38, weight_decay=1000.0)
    with pytest.raises(UserError, match="after step 1 of 4"):
        finetune(
            net,
            toy_split(),
            full_mask(net),
            huge,
            PREPROCESS,
            seed=0,
            device=CPU,
            save=saved.append,
            save_every_s=0.0,
        )
    assert saved == []


def test_a_rate_that_diverges_names_the_step() -> None:
    net = toy_net()
    huge = config(epochs=4, lr=1e30)
    with pytest.raises(UserError, match=r"is (nan|inf) at step \d of 8; lower finetune.lr"):
        finetune(net, toy_split(), full_mask(net), huge, PREPROCESS, seed=0, device=CPU)


# Merge methods ------------------------------------------------------------------------------------


class Vectors:
    """Two vectors of two parameters in memory, as `Coordinates`."""

    mask = None
    count = 10

    def __init__(self) -> None:
        self.parameters = {"a": (2, 3), "b": (4,)}
        self.values = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))

    def read_all(self, start: int, count: int) -> Tensor:
        return self.values[:, start : start + count]


@pytest.mark.parametrize("method", ["ties", "mean", "dare", "iso-c"])
def test_task_vectors_that_overflow_are_named(method: str) -> None:
    weights = torch.tensor([[1e39, 0.0], [0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(NotFiniteError, match="NaN or infinite values in a; use smaller weights"):
        method_direction(Vectors(), weights, method)  # type: ignore[arg-type]


def test_the_error_of_a_method_names_the_parameter() -> None:
    @merge_method("breaks-later", summary="fails for vectors", coefficient="one")
    def breaks_later(vectors: Tensor) -> Tensor:
        return vectors.sum(0) / (vectors.ndim - 2)

    try:
        with pytest.raises(MethodError, match=r"b: merge method 'breaks-later' .* 4 values of 4"):
            weights = torch.eye(2, dtype=torch.float64)
            method_direction(Vectors(), weights, "breaks-later")  # type: ignore[arg-type]
    finally:
        del MERGE_METHODS._entries["breaks-later"]


# Scores -------------------------------------------------------------------------------------------


class Root(nn.Module):
    """The root of the square, plus a constant."""

    shift = 1.0

    def forward(self, values: Tensor) -> Tensor:
        return (values * values + self.shift).sqrt()


@pytest.mark.parametrize("where", ["weight", "gradient"])
def test_scores_that_are_nan_name_the_task_and_the_parameters(tmp_path: Path, where: str) -> None:
    """NaN in a weight makes the logits NaN. The gradient of a root at 0, times 0, is NaN too."""
    fields = {"store": str(tmp_path), "tasks": ["glyphs/greek-blur"], "talos": {"images": 8}}
    experiment = parse_experiment(fields)
    task_store = TaskStore(experiment, experiment.tasks[0])
    classes = len(class_names(experiment.tasks[0].name))
    linear, root = nn.Linear(3 * 16 * 16, 5), Root()
    layers: Any = nn.Sequential(nn.Flatten(), linear, root, nn.Linear(5, classes))
    config = {
        "size": (16, 16),
        "mode": "RGB",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "resize_mode": "squash",
    }
    preprocess = Preprocess(16, (0.5,) * 3, (0.5,) * 3, config)
    scores = _sensitivities(task_store, layers, preprocess, torch.Generator().manual_seed(0))
    assert bool(scores.isfinite().all())
    words = r"the scores are NaN in 1.bias, 1.weight; check the weights"
    if where == "weight":
        words = "the model's logits are NaN or infinite for 8 of 8 images; check"
        with torch.no_grad():
            linear.weight[0, 0] = math.nan
    else:
        root.shift = 0.0
        with torch.no_grad():
            linear.weight.zero_()
            linear.bias.zero_()
    with pytest.raises(UserError, match=words):
        _sensitivities(task_store, layers, preprocess, torch.Generator().manual_seed(0))
