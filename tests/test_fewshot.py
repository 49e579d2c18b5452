"""Coefficients learned from a few images, compared with autograd through the coefficients, and what
learning must not change.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vector_files import open_set, put_vector

from raytvb.data.preprocess import Preprocess
from raytvb.models.classifier import ImageClassifier
from raytvb.models.few_shot import Learned, few_shot_sample, learn_coefficients
from raytvb.storage.masks import Mask
from raytvb.storage.store import Store
from raytvb.storage.vector_set import VectorSet

CPU = torch.device("cpu")
PREPROCESS = Preprocess(4, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), {})
CLASSES, COUNT = 5, 4
# The vectors have different lengths; the third is zero.
LENGTHS = (0.3, 1.0, 0.0, 3.0)
SCALES = torch.tensor([1 / length if length else 0.0 for length in LENGTHS], dtype=torch.float64)


def a_classifier() -> ImageClassifier:
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 5, 3), nn.GELU(), nn.Flatten(), nn.Linear(20, 6))
    return ImageClassifier(tower, 4 * torch.randn(CLASSES, 6)).eval()


def state(classifier: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in classifier.named_parameters()}


def some_images(count: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return images, torch.randint(CLASSES, (count,), generator=generator)


def some_vectors(folder: Path, masked: bool) -> tuple[VectorSet, list[dict[str, Tensor]]]:
    """Vector files, and the same vectors as whole tensors. The mask keeps nothing of the
    convolution's bias.
    """
    generator, store, shapes = (
        torch.Generator().manual_seed(8),
        Store(str(folder)),
        state(a_classifier()),
    )
    kept = {
        n: torch.rand(t.shape, generator=generator) < (0.4 if masked else 1.0)
        for n, t in shapes.items()
    }
    kept["visual.0.bias"][:] = not masked
    mask = Mask.of(kept) if masked else None
    keys, whole = [], []
    for number, length in enumerate(LENGTHS):
        values = {
            n: length * torch.randn(t.shape, generator=generator) / 10 for n, t in shapes.items()
        }
        keys.append(put_vector(store, f"suite/task-{number}", values, mask))
        whole.append({n: t * kept[n] for n, t in values.items()})
    return open_set(store, keys), whole


def learned(vectors: VectorSet, classifier: nn.Module | None = None, **options: Any) -> Learned:
    images, labels = some_images()
    given: dict[str, Any] = {
        "images": images,
        "labels": labels,
        "scales": SCALES,
        "preprocess": PREPROCESS,
        "steps": 8,
        "lr": 0.1,
        "batch_size": 8,
        "seed": 5,
        "device": CPU,
    } | options
    return learn_coefficients(
        a_classifier() if classifier is None else classifier, vectors, **given
    )


def reference(
    whole: list[dict[str, Tensor]], images: Tensor, labels: Tensor, batches: list[Tensor], lr: float
) -> tuple[Tensor, list[float]]:
    """Coefficients and losses in float64, by autograd through c into theta_0 + sum_f c_f v_f."""
    classifier = a_classifier().double()
    pixels = PREPROCESS.normalise(images).double()
    u = torch.zeros(len(whole), dtype=torch.float64, requires_grad=True)
    optimizer, losses = torch.optim.Adam([u], lr=lr), []
    for batch in batches:
        c = u * SCALES
        theta = {
            n: p.detach() + sum(c[f] * v[n].double() for f, v in enumerate(whole))
            for n, p in classifier.named_parameters()
        }
        logits = torch.func.functional_call(classifier, theta, (pixels[batch],))
        loss = nn.functional.cross_entropy(logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return (u * SCALES).detach(), losses


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("batch_size", [8, 30, 100])
def test_learning_is_adam_through_the_coefficients(
    masked: bool, batch_size: int, tmp_path: Path
) -> None:
    vectors, whole = some_vectors(tmp_path, masked)
    images, labels = some_images()
    generator, batches = torch.Generator().manual_seed(5), list[Tensor]()
    while len(batches) < 8:  # the last batch of an epoch has the images that are left
        order = torch.arange(30) if batch_size >= 30 else torch.randperm(30, generator=generator)
        batches += order.split(batch_size)
    expected, losses = reference(whole, images, labels, batches[:8], 0.1)
    found = learned(vectors, batch_size=batch_size)
    assert torch.allclose(found.coefficients, expected, atol=1e-4, rtol=1e-4)
    assert found.losses == pytest.approx(losses, abs=1e-5)
    assert found.coefficients.dtype == torch.float64 and found.seconds > 0.0
    assert (
        bool(found.coefficients[[0, 1, 3]].all())
        and (found.coefficients / SCALES)[[0, 1, 3]].abs().max() > 0.3
    )
    if batch_size >= 30:
        assert found.losses == sorted(found.losses, reverse=True)


@pytest.mark.parametrize("masked", [False, True])
def test_the_direction_is_the_combination_of_the_vectors(masked: bool, tmp_path: Path) -> None:
    vectors, whole = some_vectors(tmp_path, masked)
    found = learned(vectors)
    assert found.direction.dtype == torch.float32 and found.direction.shape == (vectors.count,)
    combined = next(vectors.combinations(found.coefficients[:, None]))
    assert torch.allclose(found.direction, combined, atol=1e-6)
    kept = None if vectors.mask is None else vectors.mask.load().tensors()
    parts = []
    for name in sorted(whole[0]):
        total = sum(
            float(c) * v[name].double() for c, v in zip(found.coefficients, whole, strict=True)
        )
        assert isinstance(total, Tensor)
        parts.append(total.reshape(-1) if kept is None else total[kept[name]])
    assert torch.allclose(found.direction.double(), torch.cat(parts), atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_vectors_that_do_not_fit_in_memory_are_read_in_blocks(
    masked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, _ = some_vectors(tmp_path, masked)
    held, reads = learned(vectors), list[tuple[int, int]]()
    monkeypatch.setattr("raytvb.models.few_shot.COMBINED_BYTES", 4 * COUNT * vectors.count - 1)
    monkeypatch.setattr("raytvb.models.few_shot.block_columns", lambda rows: 32)
    read_all = VectorSet.read_all

    def counted(self: VectorSet, start: int, count: int) -> Tensor:
        reads.append((start, count))
        return read_all(self, start, count)

    monkeypatch.setattr(VectorSet, "read_all", counted)
    streamed = learned(vectors)
    assert torch.allclose(streamed.coefficients, held.coefficients, atol=1e-6)
    assert torch.allclose(streamed.direction, held.direction, atol=1e-6)
    assert streamed.losses == pytest.approx(held.losses, abs=1e-6)
    blocks = -(-vectors.count // 32)
    assert blocks > 1 and all(count <= 32 for _, count in reads)
    assert len(reads) == 1 + blocks * (8 + 8)  # products of 8 steps, directions of 7 and at the end
    monkeypatch.setattr("raytvb.models.few_shot.COMBINED_BYTES", 4 * COUNT * vectors.count)
    reads.clear()
    learned(vectors)
    assert len(reads) == 1 + blocks


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_a_vector_of_zeros_is_not_used(scale: float, tmp_path: Path) -> None:
    vectors, _ = some_vectors(tmp_path, masked=True)
    scales = SCALES.clone()
    scales[2] = scale
    found = learned(vectors, scales=scales)
    assert found.coefficients[2] == 0.0 and bool(found.coefficients.isfinite().all())


def test_scales_make_vectors_of_different_length_alike(tmp_path: Path) -> None:
    """A vector ten times as long gets a tenth of the coefficient, so the merge is the same."""
    store, shapes = Store(str(tmp_path)), state(a_classifier())
    generator = torch.Generator().manual_seed(2)
    values = {n: torch.randn(t.shape, generator=generator) / 10 for n, t in shapes.items()}
    longer = {n: 10 * t for n, t in values.items()}
    found = [
        learned(
            open_set(store, [put_vector(store, f"suite/{name}", vector)]),
            scales=torch.tensor([scale]),
        )
        for name, vector, scale in (("one", values, 1.0), ("ten", longer, 0.1))
    ]
    assert torch.allclose(found[0].coefficients, 10 * found[1].coefficients, atol=1e-5)
    assert torch.allclose(found[0].direction, found[1].direction, atol=1e-5)


def test_the_same_seed_gives_the_same_bits_and_another_one_other_batches(tmp_path: Path) -> None:
    vectors, _ = some_vectors(tmp_path, masked=True)
    torch.manual_seed(1)
    first = learned(vectors)
    torch.manual_seed(2)
    again, other = learned(vectors), learned(vectors, seed=6)
    assert torch.equal(first.coefficients, again.coefficients) and torch.equal(
        first.direction, again.direction
    )
    assert first.losses == again.losses
    assert not torch.equal(first.coefficients, other.coefficients)


@pytest.mark.parametrize("lr", [0.1, 1e38])
def test_the_classifier_is_left_as_it_was(lr: float, tmp_path: Path) -> None:
    """The classifier is restored even if learning fails. Learning again gives the same result."""
    vectors, _ = some_vectors(tmp_path, masked=True)
    classifier, before = a_classifier(), state(a_classifier())
    classifier.visual.requires_grad_(False)
    classifier.visual.get_submodule("3").requires_grad_(True)
    first = learned(vectors, classifier)
    if lr > 1:
        with pytest.raises(ValueError, match=r"not finite at step \d of 8: lr 1e\+38 is too high"):
            learned(vectors, classifier, lr=lr)
    assert all(
        torch.equal(p, before[n]) and p.grad is None for n, p in classifier.named_parameters()
    )
    assert {n for n, p in classifier.named_parameters() if p.requires_grad} == {
        "visual.3.weight",
        "visual.3.bias",
    }
    with torch.no_grad():  # learning wants gradients wherever it is called
        assert torch.equal(learned(vectors, classifier).coefficients, first.coefficients)


def test_no_steps_learn_nothing(tmp_path: Path) -> None:
    found = learned(some_vectors(tmp_path, masked=True)[0], steps=0)
    assert not found.coefficients.any() and not found.direction.any() and found.losses == []


IMAGES, LABELS = some_images()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "no images"),
        ({"labels": LABELS + 1}, r"labels must be 0 to 4, .* from 1 to 5"),
        ({"labels": LABELS - 1}, r"labels must be 0 to 4, .* from -1 to 3"),
        ({"labels": LABELS[:-1]}, r"labels must be \(30,\) int64, one for each image, not \(29,\)"),
        ({"labels": LABELS.float()}, r"not \(30,\) torch.float32"),
        ({"images": IMAGES[..., 1:]}, r"images must be \(N, 3, 4, 4\) uint8, not \(30, 3, 4, 3\)"),
        ({"images": IMAGES.float()}, r"not \(30, 3, 4, 4\) torch.float32"),
        ({"scales": SCALES[1:]}, "scales must be 4 finite numbers"),
        ({"scales": 1 / SCALES}, "scales must be 4 finite numbers, one for each vector, not .*inf"),
    ],
)
def test_what_does_not_fit_is_told(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        learned(some_vectors(tmp_path, masked=True)[0], **options)


def test_vectors_of_another_model_are_told_by_their_parameters(tmp_path: Path) -> None:
    vectors, _ = some_vectors(tmp_path, masked=False)
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.GELU(), nn.Flatten(), nn.Linear(20, 7))
    with pytest.raises(
        ValueError, match=r"shapes of visual\.0\.bias, visual\.3\.bias, visual\.3\.weight differ"
    ):
        learned(vectors, ImageClassifier(tower, torch.randn(CLASSES, 7)))


def test_a_sample_has_as_many_images_of_each_class_as_asked_for_where_there_are_so_many() -> None:
    labels = torch.tensor([2] * 9 + [0] * 3 + [7] + [2] * 4)
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    for shots in (1, 2, 3, 4, 20):
        chosen = few_shot_sample(labels, shots, 1)
        assert chosen.dtype == torch.int64 and chosen.tolist() == sorted(set(chosen.tolist()))
        assert {c: int((labels[chosen] == c).sum()) for c in (0, 2, 7)} == {
            c: min(shots, n) for c, n in ((0, 3), (2, 13), (7, 1))
        }
        assert set(few_shot_sample(labels, max(1, shots - 1), 1).tolist()) <= set(chosen.tolist())
    assert few_shot_sample(labels[:0], 3, 0).tolist() == []
    with pytest.raises(ValueError, match="shots must be at least 1, not 0"):
        few_shot_sample(labels, 0, 1)


def test_a_sample_is_seeded_and_every_image_can_be_chosen() -> None:
    labels = torch.arange(40) % 4
    drawn = [few_shot_sample(labels, 2, seed).tolist() for seed in range(40)]
    assert drawn[3] == few_shot_sample(labels, 2, 3).tolist()
    assert len({str(d) for d in drawn}) > 35
    assert {position for d in drawn for position in d} == set(range(40))
