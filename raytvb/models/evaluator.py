"""Accuracy of merged models: one image tower, updated in place from the pretrained values for each
merge.

A merge is theta_0 + alpha * d with a direction d on the common coordinates of a set of vectors.
Every update starts from the stored pretrained values, so there is no drift however many merges are
tried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.maths.counts import Count
from raytvb.maths.subsets import edge, nested_order

BATCH = 256


class Evaluator:
    """An image tower with the heads and images of several tasks.

    `mask` gives the coordinates of directions: its kept entries, or every parameter where it is
    None. In bf16 the tower runs under autocast; its weights, the unit features and the head stay
    float32.
    """

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
        self._tower = tower.to(device).eval().requires_grad_(False)
        self._device, self._preprocess, self._splits = device, preprocess, splits
        self._heads = {n: h.to(device) for n, h in heads.items()}
        self._orders = {n: nested_order(n, len(s)) for n, s in splits.items()}
        self._zero_shot: dict[str, Count] = {}
        self._bf16 = precision == "bf16"
        self.images = 0
        """Images that have gone through the tower."""
        named = sorted((f"visual.{n}", p) for n, p in tower.named_parameters())
        self._slots = [
            (p, None if mask is None else mask[n].reshape(-1).nonzero()[:, 0].to(device))
            for n, p in named
        ]
        self._base = torch.cat([p.reshape(-1) for p, _ in self._slots])
        self._kept = None if mask is None else self._gathered().clone()
        self._everywhere = False
        """A direction over all parameters is in place, not one of the mask's entries."""

    def _gathered(self) -> Tensor:
        return torch.cat([p.reshape(-1) if i is None else p.reshape(-1)[i] for p, i in self._slots])

    def _put(self, values: Tensor, everywhere: bool) -> None:
        sizes = [p.numel() if i is None or everywhere else len(i) for p, i in self._slots]
        for (parameter, indices), part in zip(self._slots, values.split(sizes), strict=True):
            if indices is None or everywhere:
                parameter.copy_(part.view_as(parameter))
            else:
                parameter.view(-1)[indices] = part

    def merge(self, direction: Tensor | None, alpha: float = 0.0) -> None:
        """Set the tower to theta_0 + alpha * direction, or to theta_0.

        direction: (count,) on the mask's kept entries, or over all parameters, names sorted.
        """
        everywhere = self._kept is None or (
            direction is not None and len(direction) == len(self._base)
        )
        if self._everywhere and not everywhere:
            self._put(self._base, True)
        self._everywhere = everywhere and self._kept is not None
        base = self._base if everywhere or self._kept is None else self._kept
        self._put(
            base if direction is None else base + alpha * direction.to(self._device), everywhere
        )

    def zero_shot(self, task: str) -> Count:
        """Correct answers of the pretrained tower, measured once; leaves the pretrained tower in
        place.
        """
        self.merge(None)
        if task not in self._zero_shot:
            self._zero_shot[task] = self.count(task)
        return self._zero_shot[task]

    @torch.inference_mode()
    def _logits(self, task: str, start: float, stop: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits (n, C) and labels (n,) of the task's images from share to share, a batch at a
        time.
        """
        split = self._splits[task]
        chosen = self._orders[task][edge(start, len(split)) : edge(stop, len(split))]
        whole = len(chosen) == len(split)
        for first in range(0, len(chosen), BATCH):
            # All of them in the order in which they lie, which needs no gathering.
            part: Any = slice(first, first + BATCH) if whole else chosen[first : first + BATCH]
            pixels = self._preprocess.normalise(split.images[part].to(self._device))
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16):
                output = self._tower(pixels)
            features = (
                output[0] if isinstance(output, tuple) else output
            )  # CoCa's tower gives its tokens as well
            yield (
                nn.functional.normalize(features.float(), dim=-1) @ self._heads[task].T,
                split.labels[part],
            )
        self.images += len(chosen)

    def answers(self, task: str, start: float = 0.0, stop: float = 1.0) -> tuple[Tensor, Tensor]:
        """Classes (n,) that the present tower says and the labels (n,) of the task's images from
        share to share.
        """
        found = [
            (logits.argmax(dim=1).cpu(), labels)
            for logits, labels in self._logits(task, start, stop)
        ]
        none = torch.zeros(0, dtype=torch.int64)
        return torch.cat([none, *(a for a, _ in found)]), torch.cat([none, *(b for _, b in found)])

    def count(self, task: str, start: float = 0.0, stop: float = 1.0) -> Count:
        """Correct answers of the present tower with the task's head on the task's images from share
        to share.

        Where weights are so large that the tower overflows it gives no answer, which is not
        correct.
        """
        correct, total, expected = 0, 0, 0.0
        for logits, labels in self._logits(task, start, stop):
            answered = torch.isfinite(logits).all(dim=1)
            right = (
                torch.where(answered[:, None], logits.softmax(dim=1), 0.0)
                .cpu()
                .gather(1, labels[:, None])[:, 0]
            )
            correct += int(((logits.argmax(dim=1) == labels.to(logits.device)) & answered).sum())
            total, expected = total + len(labels), expected + float(right.double().sum())
        return Count(correct, total, expected)
