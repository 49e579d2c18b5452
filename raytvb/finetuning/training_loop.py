"""Fine-tune the kept entries of an image tower on one task.

These are plain functions that know neither Ray nor a store.

The protocol is that of Iurada et al., ICLR 2025, arXiv 2504.02620: AdamW, warm-up then cosine,
gradient norm clipped at 1, the zero-shot head frozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.errors import UserError
from raytvb.experiment.sections.finetune import FinetuneConfig
from raytvb.maths.finite import listed, not_finite
from raytvb.maths.masked_adamw import MaskedAdamW


@dataclass(frozen=True)
class Finetuned:
    """A task vector, and the figures of its training."""

    values: dict[str, Tensor]
    """Differences from the pretrained values by parameter. They are the kept entries (K,) of each
    parameter, or whole tensors if all entries of all parameters are kept.
    """
    steps: int
    final_loss: float
    """Loss of the last step's batch."""
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tune that has not ended."""

    step: int
    """Number of steps done."""
    loss: float
    """Loss of the last step."""
    seconds: float
    """Time spent on all steps."""
    tensors: dict[str, Tensor]
    """State of the optimizer (its `values` are the kept parameters) and of torch's generators, on
    the CPU.
    """


def learning_rate(step: int, steps: int, config: FinetuneConfig) -> float:
    """Learning rate of step `step` (from 0): linear warm-up, then half a cosine down to 0.

    A `config.warmup` below 1 is a share of the steps; from 1 on it is a number of steps.
    """
    peak = config.lr if config.lr is not None else 1e-5
    warm = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batches(
    count: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Positions (n,) of the images in each of `steps` batches.

    Every epoch is a fresh permutation of the images. Its last batch may be smaller.
    """
    done = 0
    while done < steps:
        for batch in torch.randperm(count, generator=generator).split(batch_size):
            yield batch
            done += 1
            if done == steps:
                return


def finetune(
    classifier: nn.Module,
    split: Split,
    mask: Mapping[str, Tensor],
    config: FinetuneConfig,
    preprocess: Preprocess,
    *,
    seed: int,
    device: torch.device,
    start: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    save_every_s: float = math.inf,
    interrupted: Callable[[], bool] = lambda: False,
) -> Finetuned:
    """Train the entries that `mask` keeps; the classifier is changed in place.

    On a CPU the result is deterministic for a given seed, even after a restart from a checkpoint of
    the same fine-tune. Torch's global generator is seeded, for dropout.

    Args:
        mask: a bool tensor for every parameter of the classifier.
        start: the checkpoint to go on from; None: the pretrained model.
        save: called with a checkpoint every `save_every_s` seconds, at the end of a step.
        interrupted: asked after each step. If it says so, a checkpoint is saved, and
            KeyboardInterrupt is raised. After the last step, the fine-tune ends as usual.

    Raises UserError at the first loss or gradient that is not finite; it names the step. No
    checkpoint is saved after that step. Raises UserError that names the parameters if values that
    are not finite would be saved or returned.
    """
    run = _Run(classifier, split, mask, config, preprocess, device)
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    clock = time.perf_counter()
    step, loss, seconds_before = 0, math.nan, 0.0
    if start is not None:
        run.restore(start.tensors)
        step, loss, seconds_before = start.step, start.loss, start.seconds
    saved = clock
    # The batches before the checkpoint are drawn again, to bring the generator to its old state.
    for indices in islice(batches(len(split), config.batch_size, run.steps, generator), step, None):
        loss = run.step(step, indices)
        step += 1
        now, ends = time.perf_counter(), step < run.steps and interrupted()
        if save is not None and (ends or now - saved >= save_every_s):
            run.check_finite(step)
            save(Checkpoint(step, loss, seconds_before + now - clock, run.state()))
            saved = time.perf_counter()
        if ends:
            raise KeyboardInterrupt
    run.check_finite(step)
    values = run.end()
    return Finetuned(values, run.steps, loss, seconds_before + time.perf_counter() - clock)


class _Run:
    """A classifier in training, with its optimizer."""

    def __init__(
        self,
        classifier: nn.Module,
        split: Split,
        mask: Mapping[str, Tensor],
        config: FinetuneConfig,
        preprocess: Preprocess,
        device: torch.device,
    ) -> None:
        self._classifier, self._split, self._preprocess = classifier, split, preprocess
        self._config, self._device, self._mask = config, device, mask
        self.steps = max(1, round(config.epochs * math.ceil(len(split) / config.batch_size)))
        classifier.to(device).train()
        _freeze_statistics(classifier)
        parameters = dict(classifier.named_parameters())
        self._optimizer = MaskedAdamW(parameters, mask, lr=0.0, weight_decay=config.weight_decay)
        self._before = self._optimizer.values.detach().clone()

    def step(self, step: int, indices: Tensor) -> float:
        """One update on the images at `indices`; returns the loss of the batch.

        Raises UserError for a loss or gradient that is not finite.
        """
        loss, config = 0.0, self._config
        for part in indices.chunk(config.accumulate):
            loss += self._add_gradients(part, len(part) / len(indices))
        norm = self._optimizer.step(learning_rate(step, self.steps, config), config.clip)
        for what, value in (("loss", loss), ("gradient's norm", norm)):
            if not math.isfinite(value):
                raise UserError(
                    f"the {what} is {value} at step {step + 1} of {self.steps}; lower finetune.lr "
                    f"({config.lr})"
                )
        return loss

    def _add_gradients(self, indices: Tensor, share: float) -> float:
        """Forward and backward pass of a part of a batch; returns its share of the batch's loss."""
        device, config = self._device, self._config
        images = self._preprocess.normalise(self._split.images[indices].to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            logits = self._classifier(images)
        loss = share * nn.functional.cross_entropy(
            logits.float(),
            self._split.labels[indices].to(device),
            label_smoothing=config.label_smoothing,
        )
        loss.backward()
        return loss.item()

    def check_finite(self, step: int) -> None:
        """Raise UserError that names the parameters which the updates made NaN or infinite.

        step: number of updates so far.
        """
        values = self._optimizer.values.detach()
        if bool(values.isfinite().all()):
            return
        names = sorted(self._mask)
        parts = values.split([int(self._mask[name].sum()) for name in names])
        bad = not_finite(dict(zip(names, parts, strict=True)))
        raise UserError(
            f"after step {step} of {self.steps} the parameters have NaN or infinite values in "
            f"{listed(bad)}; lower finetune.lr ({self._config.lr})"
        )

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, except the order of the images."""
        tensors = {**self._optimizer.state(), "rng": torch.get_rng_state()}
        if self._device.type == "cuda":
            tensors["rng_cuda"] = torch.cuda.get_rng_state(self._device)
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned."""
        moments = {name: t for name, t in tensors.items() if not name.startswith("rng")}
        self._optimizer.load_state(moments)
        torch.set_rng_state(tensors["rng"])
        if "rng_cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["rng_cuda"])

    def end(self) -> dict[str, Tensor]:
        """Release the parameters' hooks. Returns the task vector as in `Finetuned.values`."""
        self._optimizer.close()
        masks = [self._mask[name] for name in sorted(self._mask)]
        difference = (self._optimizer.values.detach() - self._before).cpu()
        parts = difference.split([int(mask.sum()) for mask in masks])
        is_dense = all(bool(mask.all()) for mask in masks)
        values: dict[str, Tensor] = {}
        for name, mask, part in zip(sorted(self._mask), masks, parts, strict=True):
            values[name] = part.view(mask.shape) if is_dense else part
        return values


def _freeze_statistics(classifier: nn.Module) -> None:
    """Set batch norms to eval mode.

    Running statistics are not parameters, so changes of them would be missing from the task vector.
    """
    for module in classifier.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
