"""Benchmark of the sensitivity scores (diagonal Fisher information of all parameters)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from raytvb.bench.measure import (
    Machine,
    Peak,
    Precision,
    Result,
    default_device,
    random_batch,
    random_classifier,
    seconds_of,
    versions,
)
from raytvb.maths.fisher import fisher_scores
from raytvb.storage.contract import Contract

REPEATS = 3
"""How often short pieces of work are timed. The median counts."""


class PublishedScores(Contract):
    """The authors' loop."""

    algorithm: str = "one backward pass an image through the graph of its batch (authors' code)"
    seconds_per_image: float
    images_timed: int
    memory_bytes: int | None


class OurScores(Contract):
    """`fisher_scores`."""

    algorithm: str = "one forward and one backward pass a batch"
    seconds_per_image: float
    images_timed: int
    memory_bytes: int | None
    images_per_s: float


class SingleImages(Contract):
    """The authors' loop on batches of one image."""

    algorithm: str = "forward and backward pass of one image at a time"
    seconds_per_image: float
    images_timed: int
    ratio: float
    """Seconds of this loop divided by ours."""


class FisherResult(Result):
    """Seconds and memory to compute the scores, for each image."""

    model: str
    batch_size: int
    precision: Precision
    parameters: int
    reference: PublishedScores
    ours: OurScores
    loop: SingleImages


def published_scores(
    classifier: nn.Module, images: Tensor, labels: Tensor, scored: int
) -> dict[str, Tensor]:
    """Diagonal Fisher information by the algorithm of the authors' code of TaLoS.

    Makes one forward pass of the batch. Then makes a backward pass through the graph of the whole
    batch for each of the first `scored` images, copies the squared gradients to the host, and adds
    them there. images: (N, 3, H, W); labels: (N,). Returns the sum over those images, in the
    parameters' shapes, by name.
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
) -> FisherResult:
    """Measure the seconds per image of three ways to compute the scores.

    `fisher_scores` runs on `batches` batches. The published loop runs on the first `scored` images
    of one batch, and once more on the same images as batches of one.
    """
    torch.set_num_threads(threads)
    place = device or default_device()
    classifier, size = random_classifier(model, place)
    images, labels = random_batch(batch_size, size, place)
    ours = _our_scores(classifier, images, batches, precision)
    reference = _timed_published(classifier, images, labels, min(scored, batch_size))
    loop = _single_images(
        classifier, images, labels, reference.images_timed, ours.seconds_per_image
    )
    return FisherResult(
        benchmark="fisher",
        model=model,
        batch_size=batch_size,
        precision=precision,
        parameters=sum(p.numel() for p in classifier.parameters()),
        reference=reference,
        ours=ours,
        ratio=reference.seconds_per_image / ours.seconds_per_image,
        loop=loop,
        machine=Machine.this(place, threads),
        versions=versions(),
    )


def _our_scores(
    classifier: nn.Module, images: Tensor, batches: int, precision: Precision
) -> OurScores:
    score = partial(fisher_scores, classifier, batch_size=len(images), precision=precision)
    score(images)  # the first call takes memory from the system
    count = batches * len(images)
    with Peak(images.device).watch() as memory:
        seconds = seconds_of(partial(score, torch.cat([images] * batches)), images.device)
    return OurScores(
        seconds_per_image=seconds / count,
        images_timed=count,
        memory_bytes=memory.bytes,
        images_per_s=count / seconds,
    )


def _timed_published(
    classifier: nn.Module, images: Tensor, labels: Tensor, scored: int
) -> PublishedScores:
    """The published loop. One forward pass serves the whole batch, a backward pass one image."""
    published = partial(published_scores, classifier, images, labels)
    published(1)  # the first call takes memory from the system
    forward = _median_seconds(partial(published, 0), images.device)
    with Peak(images.device).watch() as memory:
        seconds = seconds_of(partial(published, scored), images.device)
    backward = max(seconds - forward, 0.0) / scored
    return PublishedScores(
        seconds_per_image=backward + forward / len(images),
        images_timed=scored,
        memory_bytes=memory.bytes,
    )


def _single_images(
    classifier: nn.Module, images: Tensor, labels: Tensor, count: int, ours: float
) -> SingleImages:
    """The published loop on one image at a time. ours: our seconds per image."""

    def loop() -> None:
        for n in range(count):
            published_scores(classifier, images[n : n + 1], labels[n : n + 1], 1)

    seconds = _median_seconds(loop, images.device) / count
    return SingleImages(seconds_per_image=seconds, images_timed=count, ratio=seconds / ours)


def _median_seconds(work: Callable[[], object], device: torch.device) -> float:
    return median(seconds_of(work, device) for _ in range(REPEATS))
