"""Make the weights of the suite's tiny CLIP: `python -m raytvb.suite.pretrain` (about an hour on
one core).

Contrastive image-to-text training from scratch on all classes of the suite; equal captions in a
batch are one text, so an image is never pushed away from its own class. 70 % of the images are
clean, 30 % degraded at strength up to 0.4. Nothing but train-split drawings is seen. Prints a line
a minute and writes weights in half precision.
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
from raytvb.suite.domains import DOMAINS
from raytvb.suite.sources import SIZE, SOURCES

BPE_FILE = "bpe_2000.txt.gz"


WEIGHTS_FILE = "open_clip_model.safetensors"


def write_tokenizer(folder: Path, merges: int = 2000) -> None:
    """The first merges of open_clip's own BPE file, compressed without a time stamp."""
    lines = gzip.decompress(Path(default_bpe()).read_bytes()).decode().split("\n")[: merges + 1]
    (folder / BPE_FILE).write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))


def draw_pool(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` training images (N, 32, 32, 3) uint8 and their labels among all classes (N,)."""
    rng = np.random.default_rng(seed)
    classes, domains = glyphs.all_classes(), list(DOMAINS.values())
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
    """Zero-shot accuracy on the clean validation set over all classes; tokens are (templates,
    classes, context).
    """
    control = glyphs.render(glyphs.CONTROL, "val")
    heads = [model.encode_text(t, normalize=True) for t in tokens]  # type: ignore[operator]
    features = model.encode_image(normalise(control.images), normalize=True)  # type: ignore[operator]
    return float(((features @ sum(heads).T).argmax(1).numpy() == control.labels).mean())


@click.command()
@click.option(
    "--images", default=120_000, show_default=True, help="size of the pool of training images"
)
@click.option("--steps", default=32_000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--lr", default=1.2e-3, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=glyphs.MODEL_DIR, show_default=True)
def main(images: int, steps: int, batch_size: int, lr: float, seed: int, out: Path) -> None:
    """Pretrain the tiny CLIP of the embedded suite and write its weights."""
    torch.manual_seed(seed)
    write_tokenizer(glyphs.MODEL_DIR)
    name = f"local-dir:{glyphs.MODEL_DIR}"
    model = open_clip.create_model(name, load_weights=False)
    tokenizer = open_clip.get_tokenizer(name, bpe_path=str(glyphs.MODEL_DIR / BPE_FILE))
    names = [n for _, _, n in glyphs.all_classes()]
    tokens = torch.stack([tokenizer([t.format(n) for n in names]) for t in glyphs.TEMPLATES])
    started = time.time()
    pool, labels = draw_pool(images, seed)
    print(
        f"{images} images drawn in {time.time() - started:.0f} s, {len(names)} classes, "
        f"longest caption {int((tokens != 0).sum(-1).max())} of {tokens.shape[-1]} tokens",
        flush=True,
    )

    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)
    rng = np.random.default_rng(seed + 1)
    order, losses, reported = np.empty(0, dtype=np.int64), [], started
    for step in range(steps):
        if len(order) < batch_size:
            order = rng.permutation(images)
        batch, order = order[:batch_size], order[batch_size:]
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 100)
            group["lr"] = lr * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
        present, target = np.unique(labels[batch], return_inverse=True)
        texts = tokens[int(rng.integers(len(tokens)))][torch.from_numpy(present)]
        image_features = model.encode_image(normalise(pool[batch]), normalize=True)
        text_features = model.encode_text(texts, normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(target))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
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
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.half().contiguous() for k, v in model.state_dict().items() if k != "attn_mask"}
    save_file(weights, out / WEIGHTS_FILE)
    print(
        f"wrote {out / WEIGHTS_FILE}, {sum(v.numel() for v in weights.values()):,} parameters",
        flush=True,
    )


if __name__ == "__main__":
    main()
