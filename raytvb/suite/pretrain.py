"""Trains the weights of the suite's tiny CLIP: `python -m raytvb.suite.pretrain` (about an hour on
one core).

The model is trained from scratch on all classes of the suite, with CLIP's loss from image to text.
Equal captions in a batch count as one text, so an image is never pushed away from its own class.
70 % of the images are clean; 30 % are degraded, at strengths up to 0.4. All images are drawings of
the train split. A line is printed every minute. The weights are written in half precision.
"""

from __future__ import annotations

import gzip
import math
import time
from pathlib import Path

import click
import numpy as np
import open_clip
import torch
from open_clip.tokenizer import default_bpe
from safetensors.torch import save_file

from raytvb.suite import glyphs
from raytvb.suite.canvas import SIZE
from raytvb.suite.domains import DOMAINS
from raytvb.suite.sources import SOURCES
from raytvb.suite.task_names import CONTROL, MODEL_DIR, TEMPLATES, all_classes

BPE_FILE = "bpe_2000.txt.gz"

WEIGHTS_FILE = "open_clip_model.safetensors"


def write_tokenizer(folder: Path, merges: int = 2000) -> None:
    """Write the first merges of open_clip's BPE file, compressed without a time stamp."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[: merges + 1]
    (folder / BPE_FILE).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def draw_pool(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` training images (N, 32, 32, 3) uint8, and their labels among all classes (N,)."""
    rng = np.random.default_rng(seed)
    classes, domains = all_classes(), list(DOMAINS.values())
    labels = rng.integers(len(classes), size=count)
    images = np.empty((count, SIZE, SIZE, 3), dtype=np.uint8)
    for i, label in enumerate(labels):
        source, inner, _ = classes[label]
        image = glyphs.draw(SOURCES[source], inner, rng, "train")
        if rng.random() < 0.3:
            image = domains[rng.integers(len(domains))](image, rng.uniform(0.0, 0.4), rng)
        images[i] = glyphs.quantise(image)
    return images, labels


def normalise(images: np.ndarray) -> torch.Tensor:
    """(N, 32, 32, 3) uint8 to (N, 3, 32, 32) float32 in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


@torch.no_grad()
def clean_accuracy(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Zero-shot accuracy on the clean validation set over all classes.

    tokens: (templates, classes, context), the captions of every class.
    """
    control = glyphs.render(CONTROL, "val")
    heads = [model.encode_text(t, normalize=True) for t in tokens]  # type: ignore[operator]
    features = model.encode_image(normalise(control.images), normalize=True)  # type: ignore[operator]
    return float(((features @ sum(heads).T).argmax(1).numpy() == control.labels).mean())


@click.command()
@click.option(
    "--images", default=120_000, show_default=True, help="How many training images are drawn."
)
@click.option("--steps", default=32_000, show_default=True, help="How many batches are trained on.")
@click.option("--batch-size", default=64, show_default=True, help="Number of images in a batch.")
@click.option("--lr", default=1.2e-3, show_default=True, help="Learning rate after warm-up.")
@click.option("--seed", default=0, show_default=True, help="Seed of weights, images and batches.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=MODEL_DIR,
    show_default=True,
    help="Folder of the weights.",
)
def main(images: int, steps: int, batch_size: int, lr: float, seed: int, out: Path) -> None:
    """Pretrain the tiny CLIP of the embedded suite and write its weights."""
    torch.manual_seed(seed)
    write_tokenizer(MODEL_DIR)
    model = open_clip.create_model(f"local-dir:{MODEL_DIR}", load_weights=False)
    tokens = _captions()
    started = time.time()
    pool, labels = draw_pool(images, seed)
    longest = int((tokens != 0).sum(-1).max())
    print(
        f"{images} images drawn in {time.time() - started:.0f} s, {tokens.shape[1]} classes, "
        f"longest caption {longest} of {tokens.shape[-1]} tokens",
        flush=True,
    )
    optimizer = _optimizer(model, lr)
    rng = np.random.default_rng(seed + 1)
    order, losses, reported = np.empty(0, dtype=np.int64), list[float](), started
    for step in range(steps):
        if len(order) < batch_size:
            order = rng.permutation(images)
        batch, order = order[:batch_size], order[batch_size:]
        for group in optimizer.param_groups:
            group["lr"] = lr * _schedule(step, steps)
        template = int(rng.integers(len(tokens)))
        loss = _loss(model, pool[batch], labels[batch], tokens[template])
        _update(model, optimizer, loss)
        losses.append(loss.item())
        if time.time() - reported > 60 or step == steps - 1:
            reported = time.time()
            model.eval()
            print(
                f"step {step + 1}/{steps} loss {np.mean(losses[-500:]):.4f} "
                f"clean {clean_accuracy(model, tokens):.4f} {reported - started:.0f} s",
                flush=True,
            )
            model.train()
    _write_weights(model, out)


def _captions() -> torch.Tensor:
    """Tokens of every class's name in every template, (templates, classes, context)."""
    tokenizer = open_clip.get_tokenizer(
        f"local-dir:{MODEL_DIR}", bpe_path=str(MODEL_DIR / BPE_FILE)
    )
    captions = []
    for template in TEMPLATES:
        captions.append(tokenizer([template.format(name) for _, _, name in all_classes()]))
    return torch.stack(captions)


def _optimizer(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """AdamW with weight decay for weight matrices, but not for biases and gains."""
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, steps: int) -> float:
    """Factor of the learning rate: 100 steps of warm-up, times a cosine that falls to zero."""
    warm = min(1.0, (step + 1) / 100)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


def _loss(
    model: torch.nn.Module, images: np.ndarray, labels: np.ndarray, tokens: torch.Tensor
) -> torch.Tensor:
    """CLIP's loss from image to text among the batch's classes; tokens: (classes, context)."""
    present, target = np.unique(labels, return_inverse=True)
    texts = tokens[torch.from_numpy(present)]
    image_features = model.encode_image(normalise(images), normalize=True)  # type: ignore[operator]
    text_features = model.encode_text(texts, normalize=True)  # type: ignore[operator]
    logits = model.logit_scale.exp() * image_features @ text_features.T  # type: ignore[operator]
    return torch.nn.functional.cross_entropy(logits, torch.from_numpy(target))


def _update(model: torch.nn.Module, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    """One step of the optimizer. The temperature stays between 1/100 and 1, as in CLIP."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator]


def _write_weights(model: torch.nn.Module, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    weights = {k: v.half().contiguous() for k, v in state.items() if k != "attn_mask"}
    save_file(weights, folder / WEIGHTS_FILE)
    parameters = sum(v.numel() for v in weights.values())
    print(f"wrote {folder / WEIGHTS_FILE}, {parameters:,} parameters", flush=True)


if __name__ == "__main__":
    main()
