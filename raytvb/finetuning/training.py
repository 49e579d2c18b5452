"""Fine-tune the kept entries of an image tower on one task; plain functions that know no Ray and no
store.

Protocol: Iurada et al., ICLR 2025, arXiv 2504.02620: AdamW, warm-up then cosine, gradient norm
clipped at 1, the zero-shot head frozen.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import Split
from raytvb.errors import UserError
from raytvb.experiment.training import FinetuneConfig
from raytvb.maths.masked_adamw import MaskedAdamW


@dataclass(frozen=True)
class Finetuned:
    """The task vector (per parameter the 1-D kept differences, or the whole tensors where all are
    kept) and metrics.
    """

    values: dict[str, Tensor]
    steps: int
    final_loss: float
    seconds: float


@dataclass(frozen=True)
class Checkpoint:
    """A fine-tune after `step` steps, the last of them with `loss`, `seconds` after its start; CPU
    tensors.
    """

    step: int
    loss: float
    seconds: float
    tensors: dict[str, Tensor]


def learning_rate(step: int, steps: int, config: FinetuneConfig) -> float:
    """Rate of 0-based step `step`: linear warm-up (a share of the steps, or a number), then a half
    cosine to 0.
    """
    peak = config.lr if config.lr is not None else 1e-5
    warm = round(config.warmup * steps) if config.warmup < 1 else round(config.warmup)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def batches(
    count: int, batch_size: int, steps: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Index tensors of `steps` batches; every epoch is a fresh permutation, its last batch may be
    smaller.
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
) -> Finetuned:
    """Train the entries that `mask` keeps (name -> bool tensor, one a parameter); the classifier is
    changed in place.

    Deterministic on a CPU for a given seed, also where it goes on from a checkpoint (`start`) of
    the same fine-tune. `save` gets one every `save_every_s` seconds, at the end of a step. Torch's
    global generator is seeded, for dropout.
    Raises UserError at the first loss or gradient that is not finite, naming the step; no
    checkpoint is saved after it.
    """
    classifier.to(device).train()
    for module in classifier.modules():
        # Running statistics are no parameters: what they learned would be missing from the task
        # vector.
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()
    parameters = dict(classifier.named_parameters())
    optimizer = MaskedAdamW(parameters, mask, lr=0.0, weight_decay=config.weight_decay)
    before = optimizer.values.detach().clone()
    steps = max(1, round(config.epochs * math.ceil(len(split) / config.batch_size)))
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    first, loss, before_s = 0, math.nan, 0.0
    if start is not None:
        optimizer.load_state({n: t for n, t in start.tensors.items() if not n.startswith("rng")})
        _restore_rng(start.tensors)
        first, loss, before_s = start.step, start.loss, start.seconds
    started = saved = time.perf_counter()
    for step, indices in enumerate(batches(len(split), config.batch_size, steps, generator)):
        if step < first:
            continue
        loss = sum(
            _add_gradients(
                classifier, split, part, len(part) / len(indices), config, preprocess, device
            )
            for part in indices.chunk(config.accumulate)
        )
        norm = optimizer.step(learning_rate(step, steps, config), config.clip)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient's norm"
            value = loss if not math.isfinite(loss) else norm
            raise UserError(
                f"the {what} is {value} at step {step + 1} of {steps}; lower finetune.lr ({config.lr})"
            )
        now = time.perf_counter()
        if save is not None and now - saved >= save_every_s:
            save(
                Checkpoint(
                    step + 1, loss, before_s + now - started, optimizer.state() | _rng_state(device)
                )
            )
            saved = time.perf_counter()
    optimizer.close()
    kept = {n: mask[n] for n in sorted(mask)}
    parts = (optimizer.values.detach() - before).cpu().split([int(m.sum()) for m in kept.values()])
    dense = all(bool(m.all()) for m in kept.values())
    values = {
        n: p.view(m.shape) if dense else p for (n, m), p in zip(kept.items(), parts, strict=True)
    }
    return Finetuned(values, steps, loss, before_s + time.perf_counter() - started)


def _add_gradients(
    classifier: nn.Module,
    split: Split,
    indices: Tensor,
    share: float,
    config: FinetuneConfig,
    preprocess: Preprocess,
    device: torch.device,
) -> float:
    """Forward and backward of a part of a batch, whose loss counts for its share of the batch's;
    returns that loss.
    """
    images = preprocess.normalise(split.images[indices].to(device))
    with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        logits = classifier(images)
    loss = share * nn.functional.cross_entropy(
        logits.float(), split.labels[indices].to(device), label_smoothing=config.label_smoothing
    )
    loss.backward()
    return loss.item()


def _rng_state(device: torch.device) -> dict[str, Tensor]:
    state = {"rng": torch.get_rng_state()}
    return state | ({"rng_cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _restore_rng(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors["rng"])
    if "rng_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["rng_cuda"])
