"""Pretrained models as users have them: folders, checkpoints of other programs, downloads that
failed. Each is read as it is meant, or refused by a message that names the file and the way out.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save, save_file
from torch import Tensor, nn

from raytvb.errors import UserError
from raytvb.experiment.sections.model import ModelConfig
from raytvb.models.open_clip_models import (
    Encoder,
    load_encoder,
)
from raytvb.models.open_clip_package import described_model

NAME, OTHER = "raytvb-input-vit", "raytvb-input-wide"
CONFIG: dict[str, Any] = {
    "embed_dim": 12,
    "vision_cfg": {"image_size": 32, "patch_size": 16, "layers": 1, "width": 24, "head_width": 12},
    "text_cfg": {"context_length": 8, "vocab_size": 50, "width": 8, "heads": 1, "layers": 1},
}


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_small_models(tmp_path_factory.mktemp("configs"))


def add_small_models(folder: Path) -> None:
    """Two models that open_clip then knows by name, like its own; one also with QuickGELU."""
    wide = copy.deepcopy(CONFIG)
    wide["vision_cfg"]["width"] = 36
    quick = {**CONFIG, "quick_gelu": True}
    for name, config in ((NAME, CONFIG), (OTHER, wide), (f"{NAME}-quickgelu", quick)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def state(name: str = NAME) -> dict[str, Tensor]:
    torch.manual_seed(1)
    tensors: dict[str, Tensor] = described_model(name).state_dict()
    return tensors


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return state() | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


def renamed(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state().items()}


def tied() -> dict[str, Tensor]:
    tensors = state()
    return tensors | {"visual.ln_pre.bias": tensors["visual.ln_post.bias"]}


def as_dtype(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in state().items()}


def torch_bytes(content: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def file_of(path: Path, content: Any) -> Path:
    """A file with these bytes, or with these tensors in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous().clone() for name, tensor in content.items()}, path)
    elif path.suffix == ".npz":
        np.savez(path, **content)
    else:
        torch.save(content, path)
    return path


def from_file(path: Path, name: str = NAME) -> Encoder:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the activation; other tests are about that
        return load_encoder(ModelConfig(name=name, pretrained=str(path)))


# Checkpoints that are read ------------------------------------------------------------------------


def legacy(content: Any) -> bytes:
    return torch_bytes(content, _use_new_zipfile_serialization=False)


def deflated(data: bytes) -> bytes:
    """The same archive of torch.save, compressed by another program."""
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(data)) as source,
        zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return buffer.getvalue()


def one_buffer() -> dict[str, Tensor]:
    """All tensors as parts of one flat buffer, as sharded training stores them."""
    parts, start = state(), 0
    flat = torch.cat([tensor.flatten() for tensor in parts.values()])
    for name, tensor in parts.items():
        parts[name] = flat[start : start + tensor.numel()].view(tensor.shape)
        start += tensor.numel()
    return parts


READ: dict[str, tuple[str, Callable[[], Any]]] = {
    "model": ("a.pt", lambda: {"model": state(), "epoch": 3}),
    "model_state_dict": ("a.pth", lambda: {"model_state_dict": state(), "optimizer": {"a": 1}}),
    "ema": ("a.bin", lambda: {"ema": state()}),
    "module": ("a.pt", lambda: {"module": state()}),
    "nested": ("a.pt", lambda: {"model": {"state_dict": renamed("module.")}}),
    "compiled": ("a.pt", lambda: renamed("module._orig_mod.")),
    "compiled safetensors": ("a.safetensors", lambda: renamed("_orig_mod.")),
    "parameters": ("a.pt", lambda: {n: nn.Parameter(t) for n, t in state().items()}),
    "old format": ("a.pt", lambda: legacy(state())),
    "compressed": ("a.pt", lambda: deflated(torch_bytes(state()))),
    "safetensors by another name": ("a.bin", lambda: save(state())),
    "float64": ("a.safetensors", lambda: as_dtype(torch.float64)),
    "one buffer": ("a.pt", one_buffer),
    "tied": ("a.pt", tied),
    "numbers of OpenAI": ("a.pt", lambda: changed(vocab_size=torch.tensor(50))),
    "positions": ("a.pt", lambda: changed(text__position_ids=torch.arange(8))),
    "scale": ("a.pt", lambda: changed(logit_scale=state()["logit_scale"].view(1))),
}


@pytest.mark.parametrize("what", READ)
def test_a_checkpoint_of_another_form_is_read(tmp_path: Path, what: str) -> None:
    file, content = READ[what]
    found = from_file(file_of(tmp_path / file, content())).model.state_dict()
    for name, tensor in state().items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("file", ["a.pt", "a.safetensors"])
def test_weights_in_half_precision_become_float32(
    tmp_path: Path, dtype: torch.dtype, file: str
) -> None:
    found = from_file(file_of(tmp_path / file, as_dtype(dtype))).model.state_dict()
    expected = as_dtype(dtype)
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in expected.items())


# Files that are refused ---------------------------------------------------------------------------


class Code:
    """Writes a file if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch was-run",)


def header(fields: dict[str, Any], values: bytes = bytes(16)) -> bytes:
    text = json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + values


def lying(dtype: str, shape: list[int], stop: int = 16) -> bytes:
    return header({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, stop]}})


def zipped(**files: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(f"a/{name.replace('__', '.')}", data)
    return buffer.getvalue()


def script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 3)), buffer)
    return buffer.getvalue()


def flipped() -> bytes:
    """An archive of torch.save with a changed bit in the values."""
    data = torch_bytes(state())
    at = data.index(state()["visual.proj"].numpy().tobytes()) + 5
    return data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]


def hugging_face(patch: int = 32) -> dict[str, Tensor]:
    """Some tensors of Hugging Face's CLIP, in the sizes of ViT-B-32."""
    tensors = {
        "vision_model.embeddings.patch_embedding.weight": torch.zeros(768, 3, patch, patch),
        "vision_model.embeddings.position_embedding.weight": torch.zeros(50, 768),
        "text_model.embeddings.token_embedding.weight": torch.zeros(49408, 512).half(),
        "text_model.embeddings.position_embedding.weight": torch.zeros(77, 512),
        "visual_projection.weight": torch.zeros(512, 768),
    }
    for layer in range(12):
        tensors[f"vision_model.encoder.layers.{layer}.mlp.fc1.bias"] = torch.zeros(1)
        tensors[f"text_model.encoder.layers.{layer}.mlp.fc1.bias"] = torch.zeros(1)
    return tensors


def many(prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}.{number}": torch.zeros(1) for number in range(3000)}


def tower() -> dict[str, Tensor]:
    names = (n for n in state() if n.startswith("visual."))
    return {name.removeprefix("visual."): state()[name] for name in names}


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605143316\n"
BASE_24 = torch.zeros(300)
QUANTISED = torch.quantize_per_tensor(torch.zeros(24, 12), 0.1, 0, torch.qint8)
NO_NUMBERS = {"visual.proj": torch.zeros(24, 12)}
SHARED = BASE_24[:288].view(24, 12)

REFUSED: dict[str, tuple[str, Callable[[], Any], tuple[str, ...]]] = {
    # what the file is
    "empty": ("a.pt", lambda: b"", ("it is empty", "copy it again")),
    "LFS": ("a.safetensors", lambda: POINTER, ("pointer of Git LFS", "git lfs pull")),
    "HTML": (
        "a.pt",
        lambda: b"\n<!DOCTYPE html><html>",
        ("a web page", "download the file itself"),
    ),
    "XML": ("a.pt", lambda: b"<?xml version='1.0'?>", ("a web page",)),
    "JSON": ("a.bin", lambda: b'{"error": "not found"}', ("it is JSON",)),
    "gzip": ("a.pt", lambda: gzip.compress(b"a"), ("compressed with gzip", "unpack it")),
    "GGUF": ("a.bin", lambda: b"GGUF" + bytes(9), ("quantised weights",)),
    "HDF5": ("a.h5", lambda: b"\x89HDF\r\n", ("an HDF5 file", "convert it")),
    "zeros": ("a.pt", lambda: bytes(1000), ("begin with zeros", "copy it again")),
    "text": (
        "a.safetensors",
        lambda: b"weights",
        ("neither safetensors nor a file of torch.save",),
    ),
    "another archive": ("a.pt", lambda: zipped(readme=b"1"), ("without the `data.pkl`",)),
    "bomb": ("a.pt", lambda: zipped(data__pkl=bytes(9_000_000)), ("compressed to a small part",)),
    "TorchScript": ("a.pt", script, ("a TorchScript archive", "`pretrained: openai`")),
    "torch as safetensors": (
        "a.safetensors",
        lambda: torch_bytes(state()),
        ("rename it to end in .pt",),
    ),
    # damage
    "cut archive": (
        "a.pt",
        lambda: torch_bytes(state())[:-99],
        ("its end is missing", "copy it again"),
    ),
    "cut old file": ("a.pt", lambda: legacy(state())[:-99], ("damaged",)),
    "flipped bit": ("a.pt", flipped, ("differ from their checksums", "copy it again")),
    "cut safetensors": (
        "a.safetensors",
        lambda: save(state())[:-9],
        ("copied in part", "copy it again"),
    ),
    "longer": ("a.safetensors", lambda: save(state()) + b"ab", ("damaged",)),
    "lying shape": ("a.safetensors", lambda: lying("F32", [2**40, 2**40]), ("damaged",)),
    "lying size": ("a.safetensors", lambda: lying("F32", [10**12], 4 * 10**12), ("damaged",)),
    "no JSON": ("a.safetensors", lambda: struct.pack("<Q", 9) + b"{aaaaaaaa", ("damaged",)),
    "no tensors": ("a.safetensors", lambda: header({}, b""), ("it holds no tensors",)),
    # what it holds
    "list": ("a.pt", lambda: [torch.zeros(1)], ("no tensors by name",)),
    "tensor": ("a.pt", lambda: torch.zeros(1), ("no tensors by name",)),
    "nothing": ("a.pt", lambda: None, ("no tensors by name",)),
    "no names": ("a.pt", lambda: {1: torch.zeros(1)}, ("no tensors by name",)),
    "empty wrapper": ("a.pt", lambda: {"state_dict": {}}, ("no tensors by name",)),
    "code": ("a.pt", lambda: {"state_dict": state(), "a": Code()}, ("other Python objects",)),
    "whole model": (
        "a.pt",
        lambda: described_model(NAME),
        ("other Python objects", "state_dict alone"),
    ),
    "optimizer": (
        "a.pt",
        lambda: {"optimizer": {"state": 1}, "epoch": 2},
        ("it holds optimizer, epoch",),
    ),
    "two sets": (
        "a.pt",
        lambda: {"model": state(), "ema": state()},
        ("several sets", "model, ema"),
    ),
    "epoch": ("a.pt", lambda: {**state(), "epoch": 3}, ("beside tensors it holds epoch",)),
    "module and epoch": (
        "a.pt",
        lambda: {"module": state(), "epochs": 3},
        ("under the name `module`",),
    ),
    # dtypes and values
    "int8": ("a.pt", lambda: as_dtype(torch.int8), ("is int8", "float16", "is not quantised")),
    "uint8": ("a.safetensors", lambda: as_dtype(torch.uint8), ("is uint8",)),
    "bool": ("a.safetensors", lambda: as_dtype(torch.bool), ("is bool",)),
    "int64": ("a.safetensors", lambda: as_dtype(torch.int64), ("is int64",)),
    "complex": ("a.pt", lambda: as_dtype(torch.complex64), ("is complex64",)),
    "float8": ("a.pt", lambda: as_dtype(torch.float8_e4m3fn), ("is float8_e4m3fn",)),
    "F8": ("a.safetensors", lambda: as_dtype(torch.float8_e5m2), ("is F8_E5M2",)),
    "F4": ("a.safetensors", lambda: lying("F4", [32]), ("dtype of a is F4",)),
    "quantised": ("a.pt", lambda: changed(visual__proj=QUANTISED), ("visual.proj is qint8",)),
    "sparse": (
        "a.pt",
        lambda: changed(visual__proj=torch.eye(24, 12).to_sparse()),
        ("sparse_coo",),
    ),
    "no values": (
        "a.pt",
        lambda: changed(visual__proj=SHARED.to("meta")),
        ("visual.proj has no values",),
    ),
    "NaN": (
        "a.pt",
        lambda: changed(visual__proj=SHARED * torch.nan),
        ("NaN or infinite", "visual.proj"),
    ),
    "inf": ("a.safetensors", lambda: changed(visual__proj=SHARED + torch.inf), ("visual.proj",)),
    "too large": (
        "a.pt",
        lambda: changed(visual__proj=SHARED.double() + 1e300),
        ("finite in float32",),
    ),
    # views
    "overlap": (
        "a.pt",
        lambda: changed(visual__proj=SHARED, visual__class_embedding=BASE_24[270:294]),
        ("visual.proj and visual.class_embedding share a part", "clone()"),
    ),
    "transposed": (
        "a.pt",
        lambda: changed(visual__proj=BASE_24[:288].view(12, 24).T, a=SHARED),
        ("share a part", "visual.proj"),
    ),
    "expanded": (
        "a.pt",
        lambda: changed(visual__class_embedding=torch.zeros(1).expand(24)),
        ("several values of visual.class_embedding share",),
    ),
    # names and sizes
    "another size": ("a.safetensors", lambda: state(OTHER), (f"its sizes are those of {OTHER}",)),
    "Hugging Face": (
        "a.safetensors",
        hugging_face,
        (
            "Hugging Face's CLIP",
            "in the sizes of ViT-B-32, ViT-B-32-quickgelu",
            "`pretrained: openai`",
        ),
    ),
    "Hugging Face, many": ("a.pt", lambda: many("vision_model.encoder"), ("Hugging Face's CLIP",)),
    "unknown, many": (
        "a.pt",
        lambda: many("a" * 300),
        ("and 2,995 more", "name of the model that"),
    ),
    "timm": ("a.pt", lambda: {"blocks.0.attn.qkv.weight": SHARED}, ("image tower of timm",)),
    "torchvision": ("a.pt", lambda: {"conv_proj.weight": SHARED}, ("classifier of torchvision",)),
    "one tower": ("a.pt", tower, ("one tower of a CLIP model", "the whole model")),
    "adapter": ("a.pt", lambda: {"base.q.lora_A.weight": SHARED}, ("an adapter (LoRA)",)),
    "part": ("m-00001-of-00002.safetensors", lambda: NO_NUMBERS, ("one of several parts",)),
    "bias": (
        "a.pt",
        lambda: changed(logit_bias=torch.tensor(0.0)),
        ("not in the model: logit_bias",),
    ),
    # NumPy
    "NumPy": (
        "a.npz",
        lambda: {"params/b": np.ones(1)},
        ("a model of SigLIP", f"and {NAME} is none"),
    ),
    "NumPy by another name": ("a.npy", lambda: zipped(b__npy=b"1"), ("NumPy archive",)),
    "array": ("a.npy", lambda: b"\x93NUMPY", ("a single NumPy array", "`.npz`")),
    "no archive": ("a.npz", lambda: b"junk", ("neither safetensors nor",)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_file_that_cannot_be_used_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    file, content, words = REFUSED[what]
    path = file_of(tmp_path / file, content())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        from_file(path)
    message = str(caught.value)
    assert str(path) in message and all(word in message for word in words), message
    assert len(message) < 1500 and message.count("\n") < 20
    assert "Error:" not in message and "torch.load" not in message
    assert not (tmp_path / "was-run").exists()


NO_FILES = {
    "folder": (".", "is a folder: give a file in it"),
    "missing": ("nothing.pt", "is neither a file nor a tag"),
    "pipe": ("pipe", "is neither a file nor a tag"),
    "URL": ("https://host/a.pt", "is neither a file nor a tag"),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    path, words = NO_FILES[what]
    with pytest.raises(UserError, match=words):
        load_encoder(ModelConfig(name=NAME, pretrained=path))
