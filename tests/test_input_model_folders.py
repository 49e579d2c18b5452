"""Folders of pretrained models: descriptions, tokenizers, and what lies beside a checkpoint."""

from __future__ import annotations

import copy
import datetime
import gzip
import json
import shutil
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from hostile_files import altered_plain_json
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_input_models import CONFIG, NAME, POINTER, add_small_models, file_of, from_file, state

from raytvb.cli.main import main
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.layout import BASE
from raytvb.experiment.sections.model import ModelConfig
from raytvb.maths.fisher import fisher_scores
from raytvb.merging.folder import write_folder
from raytvb.models import hub
from raytvb.models.classifier import ImageClassifier
from raytvb.models.heads import load_tokenizer
from raytvb.models.model_fields import check_description
from raytvb.models.model_folder import CONFIG_FILE
from raytvb.models.open_clip_models import (
    Encoder,
    count_parameters,
    encoder_files,
    load_encoder,
    load_folder,
)
from raytvb.models.pretrained_files import activation_warnings
from raytvb.models.pretrained_model import store_base
from raytvb.models.tokenizer_files import stored_tokenizer
from raytvb.models.weight_files import tied_apart
from raytvb.storage import records
from raytvb.storage.store import Store
from raytvb.suite.task_names import MODEL_DIR


@pytest.fixture(scope="module", autouse=True)
def small_models(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_small_models(tmp_path_factory.mktemp("configs"))


# Descriptions of models ---------------------------------------------------------------------------

CORRECT = "correct the file"
FIELDS: tuple[tuple[str, Any, str], ...] = (
    ("model_cfg", ..., "is missing"),
    ("model_cfg", None, "is null instead of an object"),
    ("model_cfg.embed_dim", ..., "is missing"),
    ("model_cfg.embed_dim", "96", "is '96'; it must be a whole number"),
    ("model_cfg.embed_dim", True, "is true"),
    ("model_cfg.embed_dim", 96.5, "a whole number"),
    ("model_cfg.embed_dim", 0, "above 0 up to 65,536"),
    ("model_cfg.embed_dim", 10**30, "up to 65,536"),
    ("model_cfg.quick_gelu", "yes", "true or false"),
    ("model_cfg.depth", 12, "unknown field depth"),
    ("model_cfg.init_logit_bias", "x", "a number"),
    ("model_cfg.multimodal_cfg", {}, "custom_text must be true"),
    ("model_cfg.vision_cfg", ..., "is missing"),
    ("model_cfg.vision_cfg", [], "is [] instead of an object"),
    ("model_cfg.vision_cfg.depth", 12, "unknown field depth; open_clip knows"),
    ("model_cfg.vision_cfg.layers", "12", "is '12'; it must be a whole number"),
    ("model_cfg.vision_cfg.layers", 10**9, "up to 200"),
    ("model_cfg.vision_cfg.layers", [1, 1], "has 2 numbers"),
    ("model_cfg.vision_cfg.width", 10**6, "up to 65,536"),
    ("model_cfg.vision_cfg.width", 97, "not a multiple of head_width 32"),
    ("model_cfg.vision_cfg.head_width", None, "is null"),
    ("model_cfg.vision_cfg.patch_size", None, "is null"),
    ("model_cfg.vision_cfg.patch_size", 64, "0 patches"),
    ("model_cfg.vision_cfg.image_size", 10**6, "up to 4,096"),
    ("model_cfg.vision_cfg.image_size", 4096, "262,144 patches"),
    ("model_cfg.vision_cfg.image_size", [32, 16], "only square images"),
    ("model_cfg.vision_cfg.mlp_ratio", float("nan"), "a number"),
    ("model_cfg.vision_cfg.pool_type", "none", "must be tok or avg"),
    ("model_cfg.vision_cfg.act_kwargs", {"approximate": "x"}, "none or tanh"),
    ("model_cfg.vision_cfg.norm_kwargs", {"eps": "x"}, "eps is 'x'"),
    ("model_cfg.vision_cfg.timm_model_name", "hf-hub:a/b", "does not know"),
    ("model_cfg.text_cfg.context_length", 10**6, "up to 8,192"),
    ("model_cfg.text_cfg.vocab_size", 10**9, "up to 10,000,000"),
    ("model_cfg.text_cfg.heads", 3, "not a multiple of its 3 heads"),
    ("model_cfg.text_cfg.pool_type", "x", "first or last"),
    ("model_cfg.text_cfg.tokenizer_kwargs", [], "instead of an object"),
    ("preprocess_cfg", [], "is [] instead of an object"),
    ("preprocess_cfg.mean", [0.5], "three numbers"),
    ("preprocess_cfg.std", [0, 0, 0], "three numbers above 0"),
    ("preprocess_cfg.mean", [123.7, 116.3, 103.5], "of pixels from 0 to 1"),
    ("preprocess_cfg.std", [1e-300] * 3, "of pixels from 0 to 1"),
    ("preprocess_cfg.image_mean", [0.5, 0.5, 0.5], "unknown field image_mean"),
    ("preprocess_cfg.size", [32, 16], "side of a square image"),
    ("preprocess_cfg.interpolation", "nearest", "bicubic or bilinear"),
    ("preprocess_cfg.mode", "L", "must be RGB"),
    ("preprocess_cfg.fill_color", "black", "from 0 to 255"),
)
DESCRIPTION: dict[str, Any] = json.loads((MODEL_DIR / CONFIG_FILE).read_text())


def with_field(path: str, value: Any) -> dict[str, Any]:
    """The description of the suite's model with one field replaced, or taken out by `...`."""
    document = copy.deepcopy(DESCRIPTION)
    section = document
    *outer, name = path.split(".")
    for key in outer:
        section = section[key]
    section[name] = value
    if value is ...:
        del section[name]
    return document


@pytest.mark.parametrize(("path", "value", "words"), FIELDS)
def test_a_field_of_a_description_is_refused_before_anything_is_built(
    path: str, value: Any, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        check_description(with_field(path, value), "folder/open_clip_config.json")
    message = str(caught.value)
    assert message.startswith("folder/open_clip_config.json: ") and CORRECT in message
    assert words in message and path.rpartition(".")[0] in message, message


def test_every_description_of_open_clip_is_accepted() -> None:
    for name in open_clip.list_models():
        check_description({"model_cfg": open_clip.get_model_config(name)}, name)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the suite's model."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def describe_as(folder: Path, path: str, value: Any) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps(with_field(path, value)))


def bpe(folder: Path, data: bytes) -> None:
    (folder / "bpe_2000.txt.gz").write_bytes(data)


OPTIONS = "model_cfg.text_cfg.tokenizer_kwargs"
WEIGHTS = "open_clip_model.safetensors"
FOLDERS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "gone": (shutil.rmtree, ("does not exist",)),
    "no description": (lambda f: (f / CONFIG_FILE).unlink(), (f"has no {CONFIG_FILE}",)),
    "no JSON": (
        lambda f: (f / CONFIG_FILE).write_text("{"),
        (CONFIG_FILE, "not valid JSON (line 1"),
    ),
    "no text": (lambda f: (f / CONFIG_FILE).write_bytes(b"\x80abc"), ("not valid JSON",)),
    "list": (lambda f: (f / CONFIG_FILE).write_text("[]"), ("the document is []",)),
    "deep": (lambda f: (f / CONFIG_FILE).write_text("[" * 99_999), ("nested too deeply",)),
    "long": (lambda f: (f / CONFIG_FILE).write_bytes(b" " * 2_000_000), ("over 1 MB",)),
    "digits": (lambda f: (f / CONFIG_FILE).write_text("9" * 5000), ("number in it is too long",)),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), ("has no weights", WEIGHTS)),
    "LFS": (lambda f: (f / WEIGHTS).write_bytes(POINTER), (WEIGHTS, "pointer of Git LFS")),
    "embed_dim": (
        lambda f: describe_as(f, "model_cfg.embed_dim", 64),
        (WEIGHTS, "does not fit", "visual.proj (96, 96) instead of (96, 64)"),
    ),
    "depth": (
        lambda f: describe_as(f, "model_cfg.vision_cfg.layers", 9),
        (WEIGHTS, "missing: ", "more"),
    ),
    "width": (
        lambda f: describe_as(f, "model_cfg.vision_cfg.width", 64_000),
        ("of another shape", "instead of (64000,)"),
    ),
    "attention": (
        lambda f: describe_as(f, "model_cfg.vision_cfg.attentional_pool", True),
        ("missing: visual.attn_pool",),
    ),
    "text": (
        lambda f: describe_as(f, "model_cfg.text_cfg.proj_type", "none"),
        ("cannot build the model",),
    ),
    "no BPE file": (lambda f: (f / "bpe_2000.txt.gz").unlink(), ("which does not exist",)),
    "BPE, no gzip": (lambda f: bpe(f, b"a b\n"), ("no gzipped text",)),
    "BPE, cut": (lambda f: bpe(f, gzip.compress(b"a b\n" * 999)[:-9]), ("no gzipped text",)),
    "BPE, no pairs": (lambda f: bpe(f, gzip.compress(b"a b c\n" * 9)), ("not pairs",)),
    "BPE, bomb": (lambda f: bpe(f, gzip.compress(bytes(33_000_000), 1)), ("over 32 MB",)),
    "BPE, number": (lambda f: describe_as(f, OPTIONS, {"bpe_path": 5}), ("bpe_path is 5",)),
    "no BPE": (lambda f: describe_as(f, OPTIONS, {}), ("vocab_size is 2,514", "49,408 tokens")),
    "clean": (lambda f: describe_as(f, OPTIONS, {"clean": "x"}), ("clean is 'x'",)),
    "option": (lambda f: describe_as(f, OPTIONS, {"a": 1}), ("unknown field a",)),
    "special": (
        lambda f: describe_as(f, OPTIONS, {"additional_special_tokens": ["("]}),
        ("additional_special_tokens",),
    ),
    "Hugging Face": (
        lambda f: describe_as(f, "model_cfg.text_cfg.hf_tokenizer_name", "bert-base-uncased"),
        (CONFIG_FILE, "transformers"),
    ),
    "BERT": (
        lambda f: describe_as(f, "model_cfg.text_cfg.hf_model_name", "roberta-base"),
        (CONFIG_FILE, "transformers"),
    ),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_cannot_be_used_is_refused_by_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)  # no transformers
    change, words = FOLDERS[what]
    change(folder)
    with pytest.raises(UserError) as caught:
        load_encoder(ModelConfig(name=f"local-dir:{folder}"))
    message = str(caught.value)
    assert str(folder) in message and all(word in message for word in words), message
    assert len(message) < 1500 and message.count("\n") < 20


@pytest.mark.fuzz
@settings(
    derandomize=True,
    database=None,
    deadline=datetime.timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
    max_examples=120,
)
@given(data=st.data())
def test_descriptions_changed_at_random(data: st.DataObject) -> None:
    changed = data.draw(altered_plain_json((MODEL_DIR / CONFIG_FILE).read_bytes()))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(MODEL_DIR, Path(place) / "model"))
        (folder / CONFIG_FILE).write_bytes(changed)
        try:
            load_encoder(ModelConfig(name=f"local-dir:{folder}"))
        except UserError as error:
            assert str(folder) in str(error) and str(error).count("\n") < 20


def test_several_weights_of_which_none_is_preferred(folder: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(folder / WEIGHTS, folder / name)
    load_folder(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"several files of weights \(a.safetensors, b.safetensors"):
        load_folder(folder)
    (folder / "a.safetensors").unlink()
    assert load_folder(folder).fingerprint() == load_encoder(ModelConfig()).fingerprint()


def test_a_plan_builds_nothing_large(folder: Path) -> None:
    expected = count_parameters(ModelConfig())
    assert count_parameters(ModelConfig(name=f"local-dir:{folder}")) == expected
    describe_as(folder, "model_cfg.vision_cfg.width", 64_000)
    assert count_parameters(ModelConfig(name=f"local-dir:{folder}")) > 10**11
    describe_as(folder, "model_cfg.vision_cfg.layers", "12")
    with pytest.raises(UserError, match="layers is '12'"):
        count_parameters(ModelConfig(name=f"local-dir:{folder}"))


# Activation ---------------------------------------------------------------------------------------


def activation(encoder: Encoder) -> str:
    tower: Any = encoder.visual
    return type(tower.transformer.resblocks[0].mlp.gelu).__name__


def hidden_act(name: str) -> dict[str, Any]:
    return {"vision_config": {"hidden_act": name}, "text_config": {"hidden_act": name}}


OPENAI = {"input_resolution": 32, "context_length": 8, "vocab_size": 50}
QUICK = f"{NAME}-quickgelu"
PROMPTS = ["a photo of a cat.", "an image of the Omega"]
BESIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "nothing": (NAME, {}, "GELU"),
    "the name": (QUICK, {}, "QuickGELU"),
    "quick_gelu": (NAME, {CONFIG_FILE: {"model_cfg": {**CONFIG, "quick_gelu": True}}}, "QuickGELU"),
    "GELU": (NAME, {CONFIG_FILE: {"model_cfg": CONFIG}}, "GELU"),
    "both": (QUICK, {CONFIG_FILE: {"model_cfg": {**CONFIG, "quick_gelu": True}}}, "QuickGELU"),
    "hidden_act": (NAME, {"config.json": hidden_act("quick_gelu")}, "QuickGELU"),
    "hidden_act of GELU": (NAME, {"config.json": hidden_act("gelu")}, "GELU"),
}


def beside(tmp_path: Path, files: dict[str, Any]) -> Path:
    for name, document in files.items():
        (tmp_path / name).write_text(json.dumps(document))
    return file_of(tmp_path / "a.safetensors", state())


@pytest.mark.parametrize("what", BESIDE)
def test_the_activation_is_that_which_lies_beside_the_checkpoint(tmp_path: Path, what: str) -> None:
    name, files, expected = BESIDE[what]
    path = beside(tmp_path, files)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoder = load_encoder(ModelConfig(name=name, pretrained=str(path)))
    assert activation(encoder) == expected
    assert bool(encoder.config.get("quick_gelu", False)) == (expected == "QuickGELU")
    stored = load_folder_of(tmp_path / "stored", encoder_files(encoder, ModelConfig(name=name)))
    assert activation(stored) == expected
    said = [str(warning.message) for warning in caught]
    assert said == activation_warnings(ModelConfig(name=name, pretrained=str(path)))
    assert bool(said) == (what == "nothing")
    if said:
        assert "which is GELU" in said[0] and f"give `name: {QUICK}`" in said[0]


def load_folder_of(folder: Path, files: dict[str, bytes]) -> Encoder:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return load_folder(folder)


def test_a_file_of_openai_has_quick_gelu(tmp_path: Path) -> None:
    numbers = {name: torch.tensor(number) for name, number in OPENAI.items()}
    assert activation(from_file(file_of(tmp_path / "a.pt", state() | numbers))) == "QuickGELU"


def test_what_lies_beside_openai_s_numbers_counts_more(tmp_path: Path) -> None:
    numbers = {name: torch.tensor(number) for name, number in OPENAI.items()}
    file_of(tmp_path / "a.pt", state() | numbers)
    description = {"model_cfg": {**CONFIG, "quick_gelu": False}}
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    assert activation(from_file(tmp_path / "a.pt")) == "GELU"


def test_a_cache_of_the_hub_has_links_to_files_that_lie_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    path = beside(tmp_path / "blobs", {CONFIG_FILE: {"model_cfg": {**CONFIG, "quick_gelu": True}}})
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in (path, path.with_name(CONFIG_FILE)):
        blob = file.rename(file.with_name(f"blob-{file.stem}"))
        (snapshot / file.name).symlink_to(blob)
    assert activation(from_file(snapshot / path.name)) == "QuickGELU"


def other_model(**vision: Any) -> dict[str, Any]:
    return {"model_cfg": {**CONFIG, "vision_cfg": {**CONFIG["vision_cfg"], **vision}}}


CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "GELU": (QUICK, {CONFIG_FILE: {"model_cfg": CONFIG}}, ("has no quick_gelu: true",)),
    "hidden_act": (QUICK, {"config.json": hidden_act("gelu")}, ("says GELU", f"give {NAME} as")),
    "patch": (NAME, {CONFIG_FILE: other_model(patch_size=8)}, ("patch_size is 8 instead of 16",)),
    "heads": (NAME, {CONFIG_FILE: other_model(head_width=6)}, ("head_width is 6 instead of 12",)),
    "broken": (NAME, {CONFIG_FILE: []}, ("the document is []",)),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_lies_beside_a_checkpoint_must_not_contradict_its_name(
    tmp_path: Path, what: str
) -> None:
    name, files, words = CONTRADICTIONS[what]
    path = beside(tmp_path, files)
    with pytest.raises(UserError) as caught:
        load_encoder(ModelConfig(name=name, pretrained=str(path)))
    message = str(caught.value)
    assert str(tmp_path / next(iter(files))) in message and all(w in message for w in words)


def test_the_normalisation_beside_a_checkpoint_is_used(tmp_path: Path) -> None:
    document = {"model_cfg": CONFIG, "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "size": 99}}
    encoder = from_file(beside(tmp_path, {CONFIG_FILE: document}))
    assert encoder.preprocess.mean == (0.5, 0.4, 0.3) and encoder.preprocess.size == 32


# Tied tensors -------------------------------------------------------------------------------------


def test_tied_tensors_are_stored_once_and_restored(tmp_path: Path) -> None:
    encoder = load_encoder(ModelConfig())
    blocks: Any = encoder.model.get_submodule("transformer.resblocks")
    blocks[1].ln_1.weight = blocks[0].ln_1.weight
    expected = encoder.model.state_dict()
    files = encoder_files(encoder, ModelConfig())
    stored = load_folder_of(tmp_path / "tied", files)
    kept = load_file(tmp_path / "tied" / "model.safetensors")
    assert expected.keys() - kept.keys() == {"transformer.resblocks.1.ln_1.weight"}
    found = stored.model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_overlapping_tensors_of_a_model_are_refused_by_name() -> None:
    values = torch.zeros(12)
    with pytest.raises(UserError, match="a and b share a part"):
        tied_apart({"a": values[:8], "b": values[4:]})
    tensors, ties = tied_apart({"a": values[:4], "b": values[4:], "c": values[4:]})
    assert list(tensors) == ["a", "b"] and ties == {"c": "b"}


# Tokenizers from any working folder ---------------------------------------------------------------


def test_stored_and_merged_models_load_in_open_clip_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"store": str(tmp_path / "store"), "tasks": ["glyphs/greek-blur"]}
    experiment = Experiment.model_validate(fields)
    store_base(experiment)
    store = Store(experiment.store)
    base = records.find(store, BASE)
    assert base is not None
    stored, merged = tmp_path / "store" / BASE, tmp_path / "merged"
    write_folder(store, base, load_file(stored / "model.safetensors"), merged)
    monkeypatch.chdir("/")
    expected = load_encoder(ModelConfig())
    for folder in (stored, merged):
        model = open_clip.create_model_and_transforms(f"local-dir:{folder}")[0].eval()
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
        assert torch.equal(tokens, load_tokenizer(ModelConfig())(PROMPTS))
        with torch.no_grad():
            features = model.encode_text(tokens, normalize=True)
            assert torch.equal(features, expected.text_features(tokens))
        shutil.rmtree(folder)  # the merged model needs no file of the store


def test_a_folder_that_was_moved_keeps_its_tokenizer_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "first"
    load_folder_of(target, encoder_files(load_encoder(ModelConfig()), ModelConfig(), target))
    expected = load_tokenizer(ModelConfig())(PROMPTS)
    monkeypatch.chdir("/")
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{target}")(PROMPTS), expected)
    moved = target.rename(tmp_path / "second")
    config = ModelConfig(name=f"local-dir:{moved}")
    assert torch.equal(load_tokenizer(config)(PROMPTS), expected)
    load_encoder(config)
    file = moved / "bpe_2000.txt.gz"
    tokenizer = open_clip.get_tokenizer(f"local-dir:{moved}", bpe_path=str(file))
    assert torch.equal(tokenizer(PROMPTS), expected)


def test_open_clips_own_vocabulary_needs_no_file(tmp_path: Path) -> None:
    from open_clip.tokenizer import default_bpe

    shutil.copy(default_bpe(), tmp_path / "own.txt.gz")
    text = {"tokenizer_kwargs": {"bpe_path": "own.txt.gz", "clean": "canonicalize"}}
    fields, files = stored_tokenizer(text, f"local-dir:{tmp_path}", tmp_path)
    assert fields == {"tokenizer_kwargs": {"clean": "canonicalize"}} and not files


def test_the_files_of_a_hugging_face_tokenizer_are_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Saved:
        def save_pretrained(self, folder: str) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    text = {"hf_tokenizer_name": "owner/name"}
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda source: Saved())
    assert stored_tokenizer(text, "ViT-B-16-SigLIP", None) == ({}, {"tokenizer.json": b"{}"})
    (tmp_path / "vocab.txt").write_text("a")
    assert stored_tokenizer(text, f"local-dir:{tmp_path}", None) == ({}, {"vocab.txt": b"a"})


# Without a network --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained", "words"),
    [
        ("hf-hub:nobody/nothing", None, "hf download nobody/nothing"),
        ("hf-hub:no name/of/a model", None, "check the name"),
        ("ViT-B-32", "laion2b_s34b_b79k", "give the path of the file as `pretrained`"),
    ],
)
def test_what_cannot_be_fetched_is_said_soon(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, pretrained: str | None, words: str
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(hub, "_answers", lambda url: False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(UserError, match=words) as caught:
        load_encoder(ModelConfig(name=name, pretrained=pretrained))
    assert (pretrained or name) in str(caught.value) and time.monotonic() - started < 10
    assert not constants.HF_HUB_OFFLINE


# Recomputed activations ---------------------------------------------------------------------------


def test_scores_of_a_model_that_recomputes_its_activations() -> None:
    encoder = load_encoder(ModelConfig())
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    head = torch.randn(4, 96, generator=torch.Generator().manual_seed(1))
    plain = ImageClassifier(encoder.fresh_tower(), head).eval()
    again = ImageClassifier(encoder.fresh_tower(), head).eval()
    tower: Any = again.visual
    tower.set_grad_checkpointing(True)
    expected, found = fisher_scores(plain, images), fisher_scores(again, images)
    assert all(torch.equal(found[name], score) for name, score in expected.items())
    assert tower.transformer.grad_checkpointing  # as the caller left it


# Old stores ---------------------------------------------------------------------------------------


def test_a_model_merged_from_an_old_store_loads_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tarfile.open(Path(__file__).parent / "stores" / "format-1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    store = tmp_path / "format-1" / "shared"
    out = tmp_path / "out"
    mix = ("--add", "glyphs/greek-blur", "--basis", "full", "--coefficient", "0.5")
    assert main(["merge", str(store), *mix, "--out", str(out)]) == 0
    monkeypatch.chdir("/")
    expected = load_tokenizer(ModelConfig())(PROMPTS)
    assert torch.equal(open_clip.get_tokenizer(f"local-dir:{out}")(PROMPTS), expected)
    old = ModelConfig(name=f"local-dir:{store / 'base'}")
    assert torch.equal(load_tokenizer(old)(PROMPTS), expected)
    load_encoder(old)
