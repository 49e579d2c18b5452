"""Archives of NumPy arrays, as big_vision stores SigLIP's weights: read, or refused by name."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from torch import Tensor

from raytvb.errors import UserError
from raytvb.models.big_vision import load_archive
from raytvb.models.open_clip_package import described_model
from raytvb.models.pretrained_files import outline

NAME = "raytvb-input-siglip"
CONFIG = {
    "embed_dim": 64,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {
        **{"image_size": 160, "timm_model_name": "test_vit"},
        **{"timm_pool": "map", "timm_proj": "none"},
    },
    "text_cfg": {
        **{"context_length": 8, "vocab_size": 50, "width": 64, "heads": 2, "layers": 1},
        **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
}


@pytest.fixture(scope="module", autouse=True)
def small_siglip(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A small model of SigLIP's kind that open_clip knows by name."""
    path = tmp_path_factory.mktemp("configs") / f"{NAME}.json"
    path.write_text(json.dumps(CONFIG))
    open_clip.add_model_config(path)


def random_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = {name: tensor.shape for name, tensor in outline(NAME).state_dict().items()}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


class Archive:
    """Arrays by big_vision's names, made from a state dict by open_clip's names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = state
        self.arrays: dict[str, Any] = {}

    def put(self, name: str, tensor: Tensor) -> None:
        self.arrays[f"params/{name}"] = tensor.numpy()

    def dense(self, name: str, own: str) -> None:
        self.put(f"{name}/kernel", self.state[f"{own}.weight"].T)
        self.put(f"{name}/bias", self.state[f"{own}.bias"])

    def norm(self, name: str, own: str) -> None:
        self.put(f"{name}/scale", self.state[f"{own}.weight"])
        self.put(f"{name}/bias", self.state[f"{own}.bias"])

    def attention(
        self, name: str, inputs: list[tuple[Tensor, Tensor]], own: str, heads: int = 2
    ) -> None:
        """inputs: weight and bias of queries, keys and values."""
        for part, (weight, bias) in zip(("query", "key", "value"), inputs, strict=True):
            self.put(f"{name}/{part}/kernel", weight.T.reshape(len(weight), heads, -1))
            self.put(f"{name}/{part}/bias", bias.reshape(heads, -1))
        weight = self.state[f"{own}.weight"]
        self.put(f"{name}/out/kernel", weight.reshape(len(weight), heads, -1).permute(1, 2, 0))
        self.put(f"{name}/out/bias", self.state[f"{own}.bias"])

    def block(self, name: str, own: str, names: dict[str, str]) -> None:
        weight, bias = (self.state[f"{own}.attn.{names[kind]}"] for kind in ("weight", "bias"))
        inputs = list(zip(weight.chunk(3), bias.chunk(3), strict=True))
        self.norm(f"{name}/LayerNorm_0", f"{own}.{names['first']}")
        self.attention(
            f"{name}/MultiHeadDotProductAttention_0", inputs, f"{own}.attn.{names['out']}"
        )
        self.norm(f"{name}/LayerNorm_1", f"{own}.{names['second']}")
        self.dense(f"{name}/MlpBlock_0/Dense_0", f"{own}.mlp.{names['up']}")
        self.dense(f"{name}/MlpBlock_0/Dense_1", f"{own}.mlp.{names['down']}")


IMAGE = {
    **{"weight": "qkv.weight", "bias": "qkv.bias", "out": "proj", "up": "fc1", "down": "fc2"},
    **{"first": "norm1", "second": "norm2"},
}
TEXT = {
    **{"weight": "in_proj_weight", "bias": "in_proj_bias", "out": "out_proj", "up": "c_fc"},
    **{"down": "c_proj", "first": "ln_1", "second": "ln_2"},
}


def arrays_of(state: dict[str, Tensor]) -> dict[str, Any]:
    archive, trunk, pool = Archive(state), "visual.trunk", "visual.trunk.attn_pool"
    archive.put(
        "img/embedding/kernel", state[f"{trunk}.patch_embed.proj.weight"].permute(2, 3, 1, 0)
    )
    archive.put("img/embedding/bias", state[f"{trunk}.patch_embed.proj.bias"])
    archive.put("img/cls", state[f"{trunk}.cls_token"])
    archive.put("img/pos_embedding", state[f"{trunk}.pos_embed"])
    for n in range(6):
        archive.block(f"img/Transformer/encoderblock_{n}", f"{trunk}.blocks.{n}", IMAGE)
    archive.norm("img/Transformer/encoder_norm", f"{trunk}.norm")
    archive.put("img/MAPHead_0/probe", state[f"{pool}.latent"])
    key, value = state[f"{pool}.kv.weight"].chunk(2)
    key_bias, value_bias = state[f"{pool}.kv.bias"].chunk(2)
    query = (state[f"{pool}.q.weight"], state[f"{pool}.q.bias"])
    inputs = [query, (key, key_bias), (value, value_bias)]
    archive.attention("img/MAPHead_0/MultiHeadDotProductAttention_0", inputs, f"{pool}.proj")
    archive.norm("img/MAPHead_0/LayerNorm_0", f"{pool}.norm")
    for n in (0, 1):
        archive.dense(f"img/MAPHead_0/MlpBlock_0/Dense_{n}", f"{pool}.mlp.fc{n + 1}")
    archive.put("txt/Embed_0/embedding", state["text.token_embedding.weight"])
    archive.put("txt/pos_embedding", state["text.positional_embedding"][None])
    archive.block("txt/Encoder_0/encoderblock_0", "text.transformer.resblocks.0", TEXT)
    archive.norm("txt/Encoder_0/encoder_norm", "text.ln_final")
    archive.dense("txt/head", "text.text_projection")
    archive.put("b", state["logit_bias"][None])
    archive.put("t", state["logit_scale"][None])
    return archive.arrays


def test_an_archive_of_siglip_is_read(tmp_path: Path) -> None:
    state = random_state()
    np.savez(tmp_path / "a.npz", **arrays_of(state))
    model = described_model(NAME)
    load_archive(model, str(tmp_path / "a.npz"), NAME)
    found = model.state_dict()
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor), name


class Code:
    """Writes a file if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


def without(name: str) -> dict[str, Any]:
    arrays = arrays_of(random_state())
    del arrays[name]
    return arrays


def deeper() -> dict[str, Any]:
    arrays = arrays_of(random_state())
    return arrays | {"params/img/Transformer/encoderblock_6/LayerNorm_0/scale": np.ones(64, "f4")}


def wider() -> dict[str, Any]:
    return arrays_of(random_state()) | {"params/img/embedding/bias": np.ones(65, "f4")}


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "objects": (lambda: {"params/b": np.array([Code()], dtype=object)}, "params/b (object)"),
    "int8": (lambda: {"params/b": np.ones(3, np.int8)}, "params/b (int8)"),
    "other names": (lambda: {"a": np.ones(3)}, "its arrays are not those of SigLIP: a"),
    "missing": (lambda: without("params/txt/head/bias"), "an array is missing"),
    "more blocks": (deeper, "it has 7 blocks in params/img/Transformer/ and the model has 6"),
    "wider": (wider, "of another shape"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_an_archive_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    content, words = REFUSED[what]
    path = tmp_path / "a.npz"
    np.savez(path, **content())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load_archive(described_model(NAME), str(path), NAME)
    assert str(path) in str(caught.value) and words in str(caught.value)
    assert not (tmp_path / "was-run").exists()
