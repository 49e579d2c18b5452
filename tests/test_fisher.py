"""Sensitivity scores against a plain loop of per-sample autograd, for the families of image
towers.
"""

import copy
import warnings
from collections.abc import Callable

import open_clip
import pytest
import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from raytvb.maths.fisher import Draws, _add_batch, _labels_and_weights, fisher_scores
from raytvb.maths.mask_selection import flatten
from raytvb.models.classifier import ImageClassifier

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
    """A convolution with BatchNorm whose running statistics are not 0 and 1."""
    torch.manual_seed(seed)
    norm = nn.BatchNorm2d(6)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2),
        norm,
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(6 * 7 * 7, CLASSES),
    )
    assert norm.running_mean is not None and norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return net.eval()


def tower(visual: nn.Module, width: int, seed: int = 0) -> nn.Module:
    """An image tower with a head, all its parameters away from the ones and zeros of their
    initialisation.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in visual.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return ImageClassifier(visual, torch.randn(CLASSES, width, generator=generator)).eval()


def layer_scale_vit() -> nn.Module:
    """Layer scale, average pooling, no norm before the blocks."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=12,
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
        vision_cfg={
            "image_size": 32,
            "patch_size": 16,
            "layers": 2,
            "width": 24,
            "head_width": 12,
            "ls_init_value": 0.1,
            "pool_type": "avg",
            "no_ln_pre": True,
        },
    )
    return tower(clip.visual, 12)


def attention_pool_vit() -> nn.Module:
    """An attentional pooler: queries that are parameters, keys and values of another width."""
    torch.manual_seed(0)
    clip = open_clip.CLIP(
        embed_dim=12,
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
        vision_cfg={
            "image_size": 32,
            "patch_size": 16,
            "layers": 1,
            "width": 24,
            "head_width": 12,
            "attentional_pool": True,
            "attn_pooler_queries": 3,
            "attn_pooler_heads": 2,
        },
    )
    return tower(clip.visual, 12)


def resnet() -> nn.Module:
    """The attention pool and the three-convolution stem of CLIP's ResNets."""
    torch.manual_seed(0)
    return tower(ModifiedResNet((1, 1, 1, 1), output_dim=12, heads=8, image_size=32, width=8), 12)


def timm_tower(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return tower(TimmModel(name, embed_dim=12, image_size=32, pretrained=False, **options), 12)


class Tokens(nn.Module):
    """A class token and positions whose gradients for one image are one piece of memory, as in
    timm's EVA.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token, self.positions = (
            nn.Parameter(torch.randn(1, 1, 12)),
            nn.Parameter(torch.randn(1, 5, 12)),
        )
        self.patches, self.last = nn.Linear(192, 12), nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(
            images.unfold(2, 8, 8)
            .unfold(3, 8, 8)
            .permute(0, 2, 3, 1, 4, 5)
            .flatten(3)
            .flatten(1, 2)
        )
        x = torch.cat((self.token.expand(len(x), -1, -1), x), dim=1) + self.positions
        logits: Tensor = self.last(torch.tanh(3 * x).square().mean(dim=1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": tiny_vit,
    "conv": tiny_conv_net,
    "tokens": lambda: Tokens().eval(),
}
TOWERS: dict[str, Callable[[], nn.Module]] = {
    "layer-scale-vit": layer_scale_vit,
    "attention-pool-vit": attention_pool_vit,
    "resnet": resnet,
    "timm-vit": lambda: timm_tower("test_vit", pool="avg"),
    "convnext": lambda: timm_tower("test_convnext", pool="avg"),
    "efficientnet": lambda: timm_tower("test_efficientnet", pool="avg"),
}
# Interpolated embeddings, and the pools at the end: no rule covers how their queries and biases
# meet the batch.
SLOW = {
    "timm-vit": {"visual.trunk.pos_embed"},
    "resnet": {
        f"visual.attnpool.{n}" for n in ("positional_embedding", "q_proj.bias", "v_proj.bias")
    },
    "attention-pool-vit": {
        f"visual.attn_pool.{n}"
        for n in ("query", "ln_q.weight", "ln_q.bias", "attn.in_proj_bias", "attn.q_proj_weight")
    },
}


def some_images(count: int = 7, seed: int = 1, size: int = 16) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def sampled(classifier: nn.Module, images: Tensor, draws: int, seed: int) -> Tensor:
    """The labels (N, draws) that `fisher_scores` draws with a generator of this seed."""
    with torch.no_grad():
        return _labels_and_weights(classifier(images), draws, torch.Generator().manual_seed(seed))[
            0
        ]


def unsupported(classifier: nn.Module, images: Tensor) -> set[str]:
    """Names of all parameters that are scored image by image."""
    parameters = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    scores = {n: torch.zeros_like(p) for n, p in parameters.items()}
    labels = torch.zeros(len(images), 1, dtype=torch.long)
    drawn = (labels, torch.ones(labels.shape))
    return _add_batch(classifier, parameters, images, lambda logits: drawn, scores, 1e-4)[2]


def loop_scores(classifier: nn.Module, images: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
    """The plain definition, with one backward pass for each image and label. labels: (N, R); None:
    the sum over classes.
    """
    parameters = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    scores = {n: torch.zeros_like(p) for n, p in parameters.items()}
    for index, image in enumerate(images):
        log_p = classifier(image[None]).log_softmax(dim=1)[0]
        chosen = range(len(log_p)) if labels is None else labels[index].tolist()
        for label in chosen:
            weight = log_p[label].exp().item() if labels is None else 1 / labels.shape[1]
            gradients = torch.autograd.grad(
                log_p[label], list(parameters.values()), retain_graph=True
            )
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
def test_scores_are_those_of_a_plain_loop_in_double_precision(model: str, draws: Draws) -> None:
    classifier, images = MODELS[model](), some_images(5)
    labels = None if draws == "exact" else sampled(classifier, images, draws, seed=3)
    expected = loop_scores(copy.deepcopy(classifier).double(), images.double(), labels)
    found = fisher_scores(
        classifier, images, draws=draws, batch_size=3, generator=torch.Generator().manual_seed(3)
    )
    assert_same_scores(found, expected)


@pytest.mark.parametrize("name", TOWERS)
def test_scores_of_every_family_of_towers_are_those_of_a_plain_loop(name: str) -> None:
    classifier, draws = TOWERS[name](), 2
    images = some_images(4, size=32)
    labels = sampled(classifier, images, draws, seed=3)
    expected = loop_scores(copy.deepcopy(classifier).double(), images.double(), labels)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = fisher_scores(
            classifier,
            images,
            draws=draws,
            batch_size=3,
            generator=torch.Generator().manual_seed(3),
        )
    assert_same_scores(found, expected)
    assert unsupported(classifier, images[:2]) == SLOW.get(name, set())
    assert any("scored image by image" in str(w.message) for w in caught) == (name in SLOW)


class Odd(nn.Module):
    """Ways to use a parameter that no rule knows: twice, in a power, and over the samples' own
    dimension.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tied, self.power = nn.Linear(12, 12), nn.Parameter(torch.rand(12) + 1)
        self.first, self.last = nn.Linear(48, 12), nn.Linear(12, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(nn.functional.avg_pool2d(images, 4).flatten(1))
        x = self.tied(torch.tanh(self.tied(x)))
        logits: Tensor = self.last(torch.sigmoid(x) ** self.power)
        return logits


def test_what_has_no_rule_is_scored_image_by_image_and_a_warning_says_so() -> None:
    classifier, images = Odd(), some_images()
    labels = sampled(classifier, images, 2, seed=3)
    expected = loop_scores(copy.deepcopy(classifier).double(), images.double(), labels)
    with pytest.warns(UserWarning, match=r"3 of 7 parameters .* power, tied\.bias, tied\.weight"):
        found = fisher_scores(
            classifier, images, draws=2, generator=torch.Generator().manual_seed(3)
        )
    assert_same_scores(found, expected)


def test_one_image_is_scored_too() -> None:
    classifier, images = tiny_vit(), some_images(1)
    assert_same_scores(
        fisher_scores(classifier, images, draws="exact"),
        loop_scores(copy.deepcopy(classifier).double(), images.double(), None),
    )


def test_the_common_towers_have_a_rule_for_everything() -> None:
    for model in MODELS.values():
        classifier = model()
        assert unsupported(classifier, some_images(2)) == set()


def test_a_double_precision_model_is_scored_too() -> None:
    classifier, images = tiny_conv_net().double(), some_images().double()
    assert_same_scores(
        fisher_scores(classifier, images, draws="exact"), loop_scores(classifier, images, None)
    )


def test_many_draws_approach_the_exact_expectation() -> None:
    """The labels come from the model's own distribution: 1,000 draws for each image leave an error
    of a few percent.
    """
    classifier, images = tiny_conv_net(), some_images(3)
    with torch.no_grad():
        classifier.get_parameter("4.weight").mul_(
            4
        )  # so that the distribution over classes is far from uniform
    exact = flatten(fisher_scores(classifier, images, draws="exact"))
    drawn = flatten(fisher_scores(classifier, images.repeat(250, 1, 1, 1), draws=4, batch_size=256))
    uniform = flatten(loop_scores(classifier, images, torch.arange(CLASSES).expand(3, -1)))
    assert (drawn - exact).norm() < 0.1 * exact.norm()
    assert (
        uniform - exact
    ).norm() > 0.3 * exact.norm()  # so the test can tell the distributions apart


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
def test_the_batch_size_does_not_matter(model: str, draws: Draws) -> None:
    classifier, images = MODELS[model](), some_images(11)
    whole = fisher_scores(classifier, images, draws=draws, batch_size=32)
    for size in (1, 4):
        assert_same_scores(fisher_scores(classifier, images, draws=draws, batch_size=size), whole)


def test_scoring_is_seeded_and_leaves_the_model_alone() -> None:
    classifier, images = tiny_vit(), some_images()
    before = {n: t.clone() for n, t in classifier.state_dict().items()}

    def once(seed: int) -> Tensor:
        return flatten(
            fisher_scores(classifier, images, generator=torch.Generator().manual_seed(seed))
        )

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
    for images in (some_images(2)[0], torch.zeros(2, 3, 16, 16, dtype=torch.uint8)):
        with pytest.raises(ValueError, match=r"must be normalised images \(N, 3, H, W\)"):
            fisher_scores(classifier, images)
    for wrong in ({"draws": "all"}, {"batch_size": 0}, {"precision": "fp16"}):
        ((name, value),) = wrong.items()
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            fisher_scores(classifier, some_images(2), **wrong)
    with pytest.raises(ValueError, match="0 parameters require grad"):
        fisher_scores(classifier.requires_grad_(False), some_images(2))


@pytest.mark.parametrize("name", ["vit", "conv", "layer-scale-vit", "convnext"])
def test_bfloat16_scores_have_a_rule_for_everything_and_are_near_the_exact_ones(name: str) -> None:
    classifier = {**MODELS, **TOWERS}[name]()
    images = some_images(6, size=16 if name in MODELS else 32)
    full = fisher_scores(classifier, images, draws="exact")
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # no parameter is left to the path for parameters without a rule
        half = fisher_scores(classifier, images, draws="exact", precision="bf16")
    assert not torch.equal(flatten(full), flatten(half)) and all(
        s.dtype == torch.float32 for s in half.values()
    )
    difference = (flatten(full) - flatten(half)).norm() / flatten(full).norm()
    assert float(difference) < 0.05
    ranks = torch.stack([flatten(s).argsort().argsort().float() for s in (full, half)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.99
