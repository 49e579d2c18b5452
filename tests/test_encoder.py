"""Pretrained weights from files in the usual formats, created in the tests, and the errors for
files that do not fit.
"""

import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from raytvb.errors import UserError
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.classifier import ImageClassifier
from raytvb.models.open_clip_models import load_encoder

NAME = "raytvb-test-vit"
CONFIG = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 24, "head_width": 12},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A model that open_clip knows by name, like its own models."""
    file = tmp_path_factory.mktemp("configs") / f"{NAME}.json"
    file.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(file)


def state(seed: int = 0) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    tensors: dict[str, Tensor] = open_clip.create_model(NAME, load_weights=False).state_dict()
    return tensors


def written(path: Path, content: dict[str, Any]) -> ModelConfig:
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous().clone() for n, t in content.items()}, path)
    else:
        torch.save(content, path)
    return ModelConfig(name=NAME, pretrained=str(path))


@pytest.mark.parametrize(
    ("file", "wrap"),
    [
        ("weights.safetensors", lambda s: s),
        ("weights.pt", lambda s: s),
        ("weights.pt", lambda s: {"state_dict": s}),
        (
            "weights.bin",
            lambda s: {"epoch": 3, "state_dict": {f"module.{n}": t for n, t in s.items()}},
        ),
    ],
)
def test_a_checkpoint_file_of_any_common_form_is_loaded(
    tmp_path: Path, file: str, wrap: Any
) -> None:
    expected = state(seed=5)
    encoder = load_encoder(written(tmp_path / file, wrap(expected)))
    found = encoder.model.state_dict()
    assert found.keys() == expected.keys() and all(
        torch.equal(t, found[n]) for n, t in expected.items()
    )
    assert not any(
        torch.equal(t, state(seed=6)[n])
        for n, t in expected.items()
        if "weight" in n and t.dim() == 2
    )


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt"])
def test_every_tensor_that_differs_is_listed_at_once(tmp_path: Path, file: str) -> None:
    """The differences include a position embedding of another resolution, which open_clip would
    resize.
    """
    wrong = state()
    for name in ("visual.proj", "visual.ln_post.weight"):
        del wrong[name]
    wrong |= {
        "head.weight": torch.zeros(3),
        "text_projection": torch.zeros(8, 7),
        "visual.positional_embedding": torch.zeros(10, 24),
    }
    with pytest.raises(UserError) as caught:
        load_encoder(written(tmp_path / file, wrong))
    assert str(caught.value).splitlines() == [
        f"model.pretrained: {tmp_path / file} is not a checkpoint of {NAME}: "
        f"use the checkpoint of this model, or the name of the model that it belongs to",
        "  missing: visual.ln_post.weight, visual.proj",
        "  not in the model: head.weight",
        "  of another shape: text_projection (8, 7) instead of (8, 12), "
        "visual.positional_embedding (10, 24) instead of (5, 24)",
    ]


@pytest.mark.parametrize(
    ("file", "content"),
    [("weights.safetensors", b"junk" * 10), ("weights.pt", b"junk" * 10), ("weights.pt", b"")],
)
def test_a_file_that_is_no_checkpoint_is_named(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{tmp_path / file} cannot be read as a checkpoint: .*copy it again"
    ):
        load_encoder(ModelConfig(name=NAME, pretrained=str(tmp_path / file)))


def test_a_checkpoint_with_other_objects_is_not_unpickled(tmp_path: Path) -> None:
    config = written(
        tmp_path / "weights.pt", {"state_dict": state(), "arguments": Path("anything")}
    )
    with pytest.raises(UserError, match="it holds other Python objects"):
        load_encoder(config)


def test_a_tower_that_gives_its_tokens_too_is_classified_by_its_features() -> None:
    class Tower(torch.nn.Module):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            return images.flatten(1), images

    images, head = torch.randn(3, 1, 2, 2), torch.randn(5, 4)
    expected = torch.nn.functional.normalize(images.flatten(1), dim=-1) @ head.T
    assert torch.equal(ImageClassifier(Tower(), head)(images), expected)


def test_an_unknown_model_and_an_unknown_tag_list_those_there_are() -> None:
    with pytest.raises(
        UserError, match=r"unknown model 'ViT-B32'; open_clip has .*ViT-B-32.*local-dir:PATH"
    ):
        load_encoder(ModelConfig(name="ViT-B32", pretrained="openai"))
    with pytest.raises(
        UserError,
        match=r"'opanai' is neither a file nor a tag of ViT-B-32; its tags: openai, laion",
    ):
        load_encoder(ModelConfig(name="ViT-B-32", pretrained="opanai"))
    with pytest.raises(UserError, match=r"None is neither a file nor a tag of ViT-B-32"):
        load_encoder(ModelConfig(name="ViT-B-32"))
