"""Accuracy of merged models: one image tower, whose weights are set anew for each merge.

A merge is theta_0 + alpha * d with a direction d on the common coordinates of a set of vectors.
Every merge starts from a copy of the pretrained values theta_0, so values do not drift, however
many merges are tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.maths.counts import Count
from raytvb.maths.flat_parameters import FlatParameters
from raytvb.maths.subsets import edge, nested_order
from raytvb.models.classifier import tower_features
from raytvb.models.open_clip_models import VISUAL

BATCH = 256


class Evaluator:
    """An image tower with the heads and images of several tasks."""

    def __init__(
        self,
        tower: nn.Module,
        heads: Mapping[str, Tensor],
        splits: Mapping[str, Split],
        preprocess: Preprocess,
        *,
        mask: Mapping[str, Tensor] | None,
        device: torch.device,
        precision: str = "fp32",
    ) -> None:
        """Takes the tower over and sets it to eval mode on the device.

        Args:
            tower: the pretrained image tower.
            heads: zero-shot heads (C, E) float32 by task.
            splits: images and labels by task.
            mask: a bool tensor for each parameter (`visual.…`). Its kept entries are the
                coordinates of directions; None: all entries are.
            precision: "fp32" or "bf16". With "bf16" the tower runs under autocast; its weights, the
                unit features and the heads stay float32.
        """
        self._tower = tower.to(device).eval().requires_grad_(False)
        self._device, self._preprocess, self._splits = device, preprocess, splits
        self._heads = {n: h.to(device) for n, h in heads.items()}
        self._orders = {n: nested_order(n, len(s)) for n, s in splits.items()}
        self._zero_shot: dict[str, Count] = {}
        self._bf16 = precision == "bf16"
        self.images = 0
        """Number of images that have gone through the tower."""
        parameters = {f"{VISUAL}{n}": p for n, p in tower.named_parameters()}
        self._all = FlatParameters(parameters)
        self._kept = self._all if mask is None else FlatParameters(parameters, mask)
        self._theta_0 = self._all.gather()
        self._kept_theta_0 = self._theta_0 if mask is None else self._kept.gather()
        self._changed_everywhere = False
        """Whether the last direction was over all parameters, and not only the mask's entries."""

    def merge(self, direction: Tensor | None, alpha: float = 0.0) -> None:
        """Set the tower to theta_0 + alpha * direction, or to theta_0.

        direction: (count,) on the mask's kept entries, or (D,) over all parameters, names sorted;
        None for theta_0.
        """
        everywhere = direction is not None and len(direction) == self._all.count
        if self._changed_everywhere and not everywhere:
            self._all.scatter(self._theta_0)
        self._changed_everywhere = everywhere and self._kept is not self._all
        flat, values = self._kept, self._kept_theta_0
        if everywhere:
            flat, values = self._all, self._theta_0
        if direction is not None:
            values = values + alpha * direction.to(self._device)
        flat.scatter(values)

    def zero_shot(self, task: str) -> Count:
        """Correct answers of the pretrained tower on all of the task's images, measured once.

        Afterwards the tower has the pretrained weights.
        """
        self.merge(None)
        if task not in self._zero_shot:
            self._zero_shot[task] = self.count(task)
        return self._zero_shot[task]

    @torch.inference_mode()
    def _logits(self, task: str, start: float, stop: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (n, C) and labels (n,) of a share of the task's images, a batch at a time."""
        split = self._splits[task]
        chosen = self._orders[task][edge(start, len(split)) : edge(stop, len(split))]
        for images, labels in _batches(split, chosen):
            pixels = self._preprocess.normalise(images.to(self._device))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                features = tower_features(self._tower(pixels)).float()
            yield nn.functional.normalize(features, dim=-1) @ self._heads[task].T, labels
        self.images += len(chosen)

    def answers(self, task: str, start: float = 0.0, stop: float = 1.0) -> tuple[Tensor, Tensor]:
        """The classes (n,) int64 that the present tower answers, and the labels (n,) int64.

        The images are those of the task from share `start` to share `stop` of a fixed order.
        """
        classes, labels = [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)]
        for batch_logits, batch_labels in self._logits(task, start, stop):
            classes.append(batch_logits.argmax(dim=1).cpu())
            labels.append(batch_labels)
        return torch.cat(classes), torch.cat(labels)

    def count(self, task: str, start: float = 0.0, stop: float = 1.0) -> Count:
        """Correct answers of the present tower on the same images as `answers`.

        If weights are so large that the tower overflows, it gives no answer for the image. That
        counts as not correct.
        """
        correct, total, expected = 0, 0, 0.0
        for logits, labels in self._logits(task, start, stop):
            answered = torch.isfinite(logits).all(dim=1)
            probabilities = torch.where(answered[:, None], logits.softmax(dim=1), 0.0).cpu()
            right = probabilities.gather(1, labels[:, None])[:, 0]
            correct += int(((logits.argmax(dim=1) == labels.to(logits.device)) & answered).sum())
            total, expected = total + len(labels), expected + float(right.double().sum())
        return Count(correct, total, expected)


def _batches(split: Split, chosen: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and labels at the chosen positions, a batch at a time.

    If all images are chosen, they come in the order of the split, which needs no gathering.
    """
    whole = len(chosen) == len(split)
    for first in range(0, len(chosen), BATCH):
        stop = first + BATCH
        if whole:
            yield split.images[first:stop], split.labels[first:stop]
        else:
            part = chosen[first:stop]
            yield split.images[part], split.labels[part]
