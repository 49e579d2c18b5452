"""Benchmark of the sensitivity scores."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from raytvb.bench.measure import (
    CLASSES,
    Peak,
    Precision,
    machine,
    random_classifier,
    seconds_of,
    versions,
)
from raytvb.maths.fisher import fisher_scores


def published_scores(
    classifier: nn.Module, images: Tensor, labels: Tensor, scored: int
) -> dict[str, Tensor]:
    """Diagonal Fisher information by the algorithm of the authors' code of TaLoS, summed over the
    first images.

    One forward pass of the batch; then for each of `scored` images a backward pass through the
    graph of the whole batch, whose squared gradients are copied to the host and added there.
    """
    parameters = dict(classifier.named_parameters())
    scores = {n: torch.zeros(p.shape) for n, p in parameters.items()}
    log_p = classifier(images).log_softmax(dim=1).gather(1, labels[:, None])
    for n in range(scored):
        classifier.zero_grad()
        log_p[n].backward(retain_graph=True)
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                scores[name] += parameter.grad.square().to("cpu", copy=True)
    classifier.zero_grad()
    return scores


def bench_fisher(
    model: str = "ViT-B-32",
    *,
    batch_size: int = 32,
    batches: int = 4,
    scored: int = 4,
    threads: int = 1,
    device: torch.device | None = None,
    precision: Precision = "fp32",
) -> dict[str, Any]:
    """Seconds an image of `fisher_scores` on some batches, of the published loop on one, of a
    batch-1 loop.

    The loops are timed on the first `scored` images only, as each takes the same time.
    """
    torch.set_num_threads(threads)
    place = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    classifier, size = random_classifier(model, place)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator).to(place)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator).to(place)
    scored = min(scored, batch_size)
    score = partial(fisher_scores, classifier, batch_size=batch_size, precision=precision)
    score(images)  # the first call takes memory from the system
    with Peak(place).watch() as ours_memory:
        ours = seconds_of(partial(score, torch.cat([images] * batches)), place)
    published_scores(classifier, images, labels, 1)
    forward = median(
        seconds_of(lambda: published_scores(classifier, images, labels, 0), place) for _ in range(3)
    )
    with Peak(place).watch() as published_memory:
        published = seconds_of(lambda: published_scores(classifier, images, labels, scored), place)

    def loop() -> None:
        for n in range(scored):
            published_scores(classifier, images[n : n + 1], labels[n : n + 1], 1)

    one_by_one = median(seconds_of(loop, place) for _ in range(3)) / scored
    reference, mine = (
        max(published - forward, 0.0) / scored + forward / batch_size,
        ours / (batches * batch_size),
    )
    return {
        "benchmark": "fisher",
        "model": model,
        "batch_size": batch_size,
        "precision": precision,
        "parameters": sum(p.numel() for p in classifier.parameters()),
        "reference": {
            "algorithm": "one backward pass an image through the graph of its batch (authors' code)",
            "seconds_per_image": reference,
            "images_timed": scored,
            "memory_bytes": published_memory.bytes,
        },
        "ours": {
            "algorithm": "one forward and one backward pass a batch",
            "seconds_per_image": mine,
            "images_timed": batches * batch_size,
            "memory_bytes": ours_memory.bytes,
            "images_per_s": 1 / mine,
        },
        "ratio": reference / mine,
        "loop": {
            "algorithm": "forward and backward pass of one image at a time",
            "seconds_per_image": one_by_one,
            "images_timed": scored,
            "ratio": one_by_one / mine,
        },
        "machine": machine(place, threads),
        "versions": versions(),
    }
