"""Sensitivity scores against a plain loop of per-sample autograd, masks against a stable sort."""

import copy
from collections.abc import Callable

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor, nn

from raytvb.encoder import ImageClassifier
from raytvb.talos import (
    _labels_and_weights,
    damp,
    fisher_scores,
    flatten,
    jaccard,
    kept_count,
    round_density,
    select_further,
    select_mask,
    unflatten,
)

CLASSES = 5


def tiny_vit(seed: int = 0) -> nn.Module:
    """Two blocks of width 24 on 16x16 images, with a head of 5 classes."""
    torch.manual_seed(seed)
    clip = open_clip.CLIP(
        embed_dim=12,
        vision_cfg={"image_size": 16, "patch_size": 8, "layers": 2, "width": 24, "head_width": 12},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
    )
    head = 5.0 * nn.functional.normalize(torch.randn(CLASSES, 12), dim=-1)
    return ImageClassifier(clip.visual, head).eval()


def tiny_conv_net(seed: int = 0) -> nn.Module:
    """A convolution with BatchNorm whose running statistics are not the trivial ones."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.GELU(), nn.Flatten(),
                        nn.Linear(6 * 7 * 7, CLASSES))
    net[1].running_mean.normal_()
    net[1].running_var.uniform_(0.5, 2.0)
    return net.eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"vit": tiny_vit, "conv": tiny_conv_net}


def some_images(count: int = 7, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def sampled(classifier: nn.Module, images: Tensor, draws: int, seed: int) -> Tensor:
    """The labels (N, draws) that `fisher_scores` draws with a generator of this seed."""
    with torch.no_grad():
        return _labels_and_weights(classifier(images), draws, torch.Generator().manual_seed(seed))[0]


def loop_scores(classifier: nn.Module, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """The definition, one backward pass for each image and label; labels (N, R), None for the sum over classes."""
    parameters = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    scores = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for index, image in enumerate(images):
        log_p = classifier(image[None]).log_softmax(dim=1)[0]
        chosen = range(len(log_p)) if labels is None else labels[index].tolist()
        for label in chosen:
            weight = log_p[label].exp().item() if labels is None else 1 / labels.shape[1]
            gradients = torch.autograd.grad(log_p[label], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                scores[name] += weight * gradient.square() / len(images)
    return scores


def assert_same_scores(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(e.max()) for e in expected.values())
    assert largest > 0
    for name, reference in expected.items():
        assert found[name].dtype == torch.float32 and found[name].shape == reference.shape
        error = (found[name].double() - reference.double()).abs().max()
        assert error <= max(1e-4 * float(reference.max()), 1e-9 * largest), name


@pytest.mark.parametrize("draws", [1, 3, "exact"])
@pytest.mark.parametrize("model", MODELS)
def test_scores_are_those_of_a_plain_loop_in_double_precision(model: str, draws: int | str) -> None:
    classifier, images = MODELS[model](), some_images(5)
    labels = None if draws == "exact" else sampled(classifier, images, draws, seed=3)
    expected = loop_scores(copy.deepcopy(classifier).double(), images.double(), labels)
    found = fisher_scores(classifier, images, draws=draws, batch_size=3, generator=torch.Generator().manual_seed(3))
    assert_same_scores(found, expected)


def test_a_double_precision_model_is_scored_too() -> None:
    classifier, images = tiny_conv_net().double(), some_images().double()
    assert_same_scores(fisher_scores(classifier, images, draws="exact"), loop_scores(classifier, images, None))


def test_many_draws_approach_the_exact_expectation() -> None:
    """The labels come from the model's own distribution: 1,000 draws for each image leave an error of a few percent."""
    classifier, images = tiny_conv_net(), some_images(3)
    with torch.no_grad():
        classifier[-1].weight *= 4  # so that the distribution over classes is far from uniform
    exact = flatten(fisher_scores(classifier, images, draws="exact"))
    drawn = flatten(fisher_scores(classifier, images.repeat(250, 1, 1, 1), draws=4, batch_size=256))
    uniform = flatten(loop_scores(classifier, images, torch.arange(CLASSES).expand(3, -1)))
    assert (drawn - exact).norm() < 0.1 * exact.norm()
    assert (uniform - exact).norm() > 0.3 * exact.norm()  # so the test can tell the distributions apart


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # attention without gradients is not batched
def test_frozen_parameters_are_left_out_and_change_nothing() -> None:
    classifier, images = tiny_vit(), some_images()
    everything = fisher_scores(classifier, images, draws="exact")
    for name, parameter in classifier.named_parameters():
        parameter.requires_grad_("mlp" in name)
    some = fisher_scores(classifier, images, draws="exact")
    assert some.keys() == {n for n in everything if "mlp" in n} and len(some) < len(everything)
    assert_same_scores(some, {n: everything[n] for n in some})


@pytest.mark.parametrize("draws", [1, 2, "exact"])
@pytest.mark.parametrize("model", MODELS)
def test_the_batch_size_does_not_matter(model: str, draws: int | str) -> None:
    classifier, images = MODELS[model](), some_images(11)
    whole = fisher_scores(classifier, images, draws=draws, batch_size=32)
    for size in (1, 4):
        assert_same_scores(fisher_scores(classifier, images, draws=draws, batch_size=size), whole)


def test_scoring_is_seeded_and_leaves_the_model_alone() -> None:
    classifier, images = tiny_vit(), some_images()
    before = {n: t.clone() for n, t in classifier.state_dict().items()}

    def once(seed: int) -> Tensor:
        return flatten(fisher_scores(classifier, images, generator=torch.Generator().manual_seed(seed)))

    assert torch.equal(once(5), once(5))
    assert not torch.equal(once(5), once(6))
    default = flatten(fisher_scores(classifier, images))
    assert torch.equal(default, once(0))
    assert all(torch.equal(t, before[n]) for n, t in classifier.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


def test_nothing_to_score_is_an_error() -> None:
    classifier = tiny_conv_net()
    with pytest.raises(ValueError, match="0 images"):
        fisher_scores(classifier, some_images(0))
    with pytest.raises(ValueError, match="draws = 0"):
        fisher_scores(classifier, some_images(2), draws=0)
    with pytest.raises(ValueError, match="0 parameters require grad"):
        fisher_scores(classifier.requires_grad_(False), some_images(2))


def some_scores(seed: int = 0, levels: int | None = None) -> dict[str, Tensor]:
    """Scores of three tensors in an order that is not the sorted one; with `levels` values only, so with many ties."""
    rng = np.random.default_rng(seed)
    shapes = {"b": (7, 11), "c": (5,), "a": (3, 2, 4)}
    made = {n: rng.random(s) if levels is None else rng.integers(levels, size=s) / levels for n, s in shapes.items()}
    return {n: torch.tensor(v, dtype=torch.float32) for n, v in made.items()}


def sorted_mask(scores: dict[str, Tensor], keep: int) -> dict[str, Tensor]:
    flat = np.concatenate([scores[n].numpy().ravel() for n in sorted(scores)])
    mask = np.zeros(len(flat), dtype=bool)
    mask[np.argsort(flat, kind="stable")[:keep]] = True
    return unflatten(torch.from_numpy(mask), scores)


def assert_same_mask(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name].dtype == torch.bool and torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("density", [0.001, 0.1, 0.25, 1 / 3, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("levels", [None, 1, 2, 6])
def test_the_mask_is_that_of_a_stable_sort(density: float, levels: int | None) -> None:
    for seed in range(3):
        scores = some_scores(seed, levels)
        keep = max(1, round(density * 106))
        mask = select_mask(scores, density)
        assert sum(int(m.sum()) for m in mask.values()) == keep == kept_count(106, density)
        assert_same_mask(mask, sorted_mask(scores, keep))


def test_the_lowest_scores_are_kept() -> None:
    mask = select_mask({"a": torch.tensor([3.0, 1.0, 2.0]), "b": torch.tensor([[0.5], [9.0]])}, 0.4)
    assert mask["a"].tolist() == [False, True, False] and mask["b"].tolist() == [[True], [False]]


def test_ties_go_to_the_first_position_in_name_order() -> None:
    mask = select_mask({"b": torch.zeros(4), "a": torch.zeros(4)}, 0.75)
    assert mask["a"].tolist() == [True] * 4 and mask["b"].tolist() == [True, True, False, False]


def test_density_one_keeps_everything() -> None:
    scores = some_scores()
    scores["c"][2] = torch.inf
    assert all(bool(m.all()) for m in select_mask(scores, 1.0).values())


@pytest.mark.parametrize("density", [0.0, -0.1, 1.0001, float("nan")])
def test_a_density_outside_of_0_to_1_is_an_error(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        select_mask(some_scores(), density)


def test_scores_that_are_nan_are_an_error_that_names_the_tensors() -> None:
    scores = some_scores()
    scores["c"][1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN in c$"):
        select_mask(scores, 0.5)


def test_staged_rounds_never_take_back_a_rejected_entry() -> None:
    kept, rounds = None, 4
    for step in range(1, rounds + 1):
        scores = some_scores(seed=10 + step)  # new scores every round, so that rejected ones would look good again
        density = round_density(0.1, step, rounds)
        chosen = select_further(scores, kept, density)
        assert sum(int(m.sum()) for m in chosen.values()) == max(1, round(106 * 0.1 ** (step / rounds)))
        if kept is not None:
            assert all(bool((kept[n] | ~chosen[n]).all()) for n in chosen)
            barred = {n: s.where(kept[n], torch.tensor(torch.inf)) for n, s in scores.items()}
            assert_same_mask(chosen, sorted_mask(barred, sum(int(m.sum()) for m in chosen.values())))
        kept = chosen
    assert sum(int(m.sum()) for m in kept.values()) == 11


def test_one_round_is_a_plain_threshold() -> None:
    scores = some_scores()
    assert round_density(0.1, 1, 1) == 0.1
    assert_same_mask(select_further(scores, None, 0.1), select_mask(scores, 0.1))


def test_an_infinite_score_does_not_bring_back_a_rejected_entry() -> None:
    """A sensitivity that overflowed is still better than one that an earlier round rejected."""
    kept = {"a": torch.tensor([False, True, True, False])}
    scores = {"a": torch.tensor([1.0, torch.inf, torch.inf, 1.0])}
    chosen = select_further(scores, kept, 0.5)
    assert chosen["a"].tolist() == [False, True, True, False]


def test_damp_multiplies_the_rejected_weights_only() -> None:
    parameters = {"a": torch.tensor([1.0, -2.0, 3.0]), "b": torch.tensor([[4.0]])}
    kept = {"a": torch.tensor([True, False, True]), "b": torch.tensor([[False]])}
    damped = damp(parameters, kept, 0.1)
    assert torch.equal(damped["a"], torch.tensor([1.0, -2.0 * 0.1, 3.0]))
    assert torch.equal(damped["b"], torch.tensor([[4.0 * 0.1]]))
    assert all(torch.equal(t, parameters[n]) for n, t in damp(parameters, kept, 1.0).items())
    assert parameters["a"][1] == -2.0


def test_jaccard_is_intersection_over_union() -> None:
    left = {"a": torch.tensor([True, True, False, False]), "b": torch.tensor([[True]])}
    right = {"b": torch.tensor([[True]]), "a": torch.tensor([False, True, True, False])}
    assert jaccard(left, right) == pytest.approx(2 / 4)
    assert jaccard(left, left) == 1.0
    assert jaccard(left, {"a": ~left["a"], "b": ~left["b"]}) == 0.0


def test_flatten_goes_by_sorted_names_and_unflatten_undoes_it() -> None:
    scores = some_scores()
    flat = flatten(scores)
    assert torch.equal(flat, torch.cat([scores[n].reshape(-1) for n in ("a", "b", "c")]))
    back = unflatten(flat, scores)
    assert back.keys() == scores.keys() and all(torch.equal(back[n], scores[n]) for n in scores)
