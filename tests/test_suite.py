"""The embedded suite as it is drawn and as it is read back, other data sets created in the tests,
and the tiny CLIP.
"""

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from raytvb.data.load_split import load_split
from raytvb.data.preprocess import Preprocess
from raytvb.data.splits import task_classes
from raytvb.data.suite_files import cache_folder, task_url
from raytvb.errors import UserError
from raytvb.experiment.sections.model import ModelConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.models.classifier import ImageClassifier
from raytvb.models.heads import load_tokenizer, zero_shot_head
from raytvb.models.open_clip_models import Encoder, load_encoder
from raytvb.suite import glyphs
from raytvb.suite.canvas import SIZE
from raytvb.suite.characters import handwritten_digits
from raytvb.suite.domains import DOMAINS
from raytvb.suite.sources import SOURCES
from raytvb.suite.task_names import (
    CLASSES,
    CONTROL,
    DOMAIN_NAMES,
    MODEL_DIR,
    SHOWCASE,
    SPLITS,
    class_names,
    source_and_domain,
    task_names,
)

TASK = "glyphs/greek-blur"
SQUASH = Preprocess(
    32, (0.5,) * 3, (0.5,) * 3, {"size": 32, "interpolation": "bicubic", "resize_mode": "squash"}
)
NO_RESIZE = Preprocess(32, (0.5,) * 3, (0.5,) * 3, {})


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache folder only for this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("RAYTVB_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return load_encoder(ModelConfig())


def test_the_suite_has_264_tasks_with_the_showcase_first() -> None:
    names = task_names()
    assert len(names) == len(set(names)) == 264 == len(SOURCES) * len(DOMAINS)
    assert names[:16] == SHOWCASE and len(set(SHOWCASE)) == 16
    assert set(names) == {f"glyphs/{s}-{d}" for s in SOURCES for d in DOMAINS}
    assert CONTROL not in names


def test_the_names_are_those_of_what_is_drawn() -> None:
    assert tuple(DOMAINS) == DOMAIN_NAMES and list(SOURCES) == list(CLASSES)
    for name, source in SOURCES.items():
        assert source.name == name and source.classes == CLASSES[name]
    for task in SHOWCASE:
        source_name, domain = source_and_domain(task)
        assert source_name in SOURCES and domain in DOMAINS


def digest(task: str, split: str) -> str:
    rendered = glyphs.render(task, split, 40)
    return hashlib.sha256(rendered.images.tobytes() + rendered.labels.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize(
    ("task", "split", "expected"),
    [
        ("glyphs/textures-noise", "train", "af33b4e875fcac9d"),
        ("glyphs/counting-fog", "val", "42a09e523bf7e916"),
        ("glyphs/position-shear", "test", "6334e0f049357a00"),
        ("glyphs/shapes-rotation", "test", "834771e8a7c5b921"),
        ("glyphs/colours-pixelation", "train", "7d8dd257e85ecee3"),
        ("glyphs/clock-occlusion", "val", "d67a4f5d6aedd809"),
    ],
)
def test_drawings_do_not_change(task: str, split: str, expected: str) -> None:
    """If the drawings change, the cached suite needs a new FORMAT, and the tiny CLIP was trained on
    other images.
    """
    assert digest(task, split) == expected


def test_every_task_has_different_class_names() -> None:
    for task in task_names():
        names = class_names(task)
        assert 8 <= len(names) <= 16 and len(set(names)) == len(names)
        assert all(n == n.strip() and n.isprintable() and n for n in names)
    everything = class_names(CONTROL)
    assert len(everything) == len(set(everything)) == sum(len(s.classes) for s in SOURCES.values())
    for task in ("glyphs/greek", "glyphs/greek-mud", "mnist", ""):
        with pytest.raises(KeyError):
            class_names(task)


ONE_OF_EACH = [
    *(f"glyphs/{s}-noise" for s in SOURCES),
    *(f"glyphs/shapes-{d}" for d in DOMAINS),
    CONTROL,
]


@pytest.mark.parametrize("task", ONE_OF_EACH)
def test_rendering_is_deterministic_and_balanced_and_splits_differ(task: str) -> None:
    classes = len(class_names(task))
    count = min(2 * classes + 3, 45)
    rendered = {split: glyphs.render(task, split, count) for split in SPLITS}
    for split, made in rendered.items():
        again = glyphs.render(task, split, count)
        assert np.array_equal(made.images, again.images) and np.array_equal(
            made.labels, again.labels
        )
        assert made.images.shape == (count, SIZE, SIZE, 3) and made.images.dtype == np.uint8
        assert made.labels.shape == (count,) and made.labels.dtype == np.int64
        found = np.bincount(made.labels, minlength=classes)
        assert len(found) == classes and found.max() - found.min() <= 1
        assert not np.array_equal(made.labels, np.arange(count) % classes)  # shuffled
    images = [i.tobytes() for made in rendered.values() for i in made.images]
    assert len(set(images)) == len(images)


def test_splits_have_their_sizes_and_an_unknown_one_is_an_error() -> None:
    assert len(glyphs.render("glyphs/trigrams-fog", "val").labels) == glyphs.SPLIT_SIZES["val"]
    assert len(glyphs.render(CONTROL, "train").labels) == 0
    with pytest.raises(KeyError):
        glyphs.render(TASK, "dev")
    with pytest.raises(KeyError):
        glyphs.render("glyphs/greek-mud", "test")


def test_tasks_of_one_source_draw_different_images() -> None:
    first, second = (glyphs.render(f"glyphs/latin-{d}", "test", 30) for d in ("noise", "clutter"))
    assert not np.array_equal(first.labels, second.labels)
    assert (first.images != second.images).any(axis=(1, 2, 3)).all()


def test_no_handwritten_digit_is_in_two_splits() -> None:
    pools = {
        s: {i.tobytes() for images in handwritten_digits(s).values() for i in images}
        for s in SPLITS
    }
    assert (
        sum(len(p) for p in pools.values()) > 1700
    )  # all of scikit-learn's 1,797 digits but for equal drawings
    for split in SPLITS:
        assert (
            set(handwritten_digits(split)) == set(range(10))
            and min(len(i) for i in handwritten_digits(split).values()) > 20
        )
    assert (
        not pools["train"] & pools["val"]
        and not pools["train"] & pools["test"]
        and not pools["val"] & pools["test"]
    )


@pytest.mark.parametrize("name", SOURCES)
def test_the_foreground_is_lighter_than_the_background(name: str) -> None:
    source = SOURCES[name]
    for label in range(len(source.classes)):
        rng = np.random.default_rng([1, label])
        mask = source.draw(label, copy.deepcopy(rng), "test")
        image = glyphs.draw(source, label, rng, "test")
        assert (
            mask.shape == (SIZE, SIZE)
            and mask.dtype == np.float32
            and np.array_equal(mask, mask.clip(0, 1))
        )
        assert image.shape == (SIZE, SIZE, 3) and image.dtype == np.float32
        inside, outside = mask > 0.7, mask < 0.05
        assert inside.sum() >= 3 and outside.sum() > 50
        assert image[inside].mean() > image[outside].mean() + 0.1


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_of_strength_one_changes_the_picture_and_of_strength_zero_hardly(
    name: str,
) -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        picture = glyphs.draw(SOURCES["shapes"], 6, rng, "test").clip(0, 1)
        before = picture.copy()
        weak = DOMAINS[name](picture, 0.0, np.random.default_rng(seed))
        strong = DOMAINS[name](picture, 1.0, np.random.default_rng(seed))
        assert np.array_equal(picture, before)
        assert weak.shape == strong.shape == picture.shape
        assert abs(strong - picture).mean() > 0.02 and abs(weak - picture).mean() < 0.01
        assert abs(strong - picture).mean() > 3 * abs(weak - picture).mean()


@pytest.mark.parametrize("split", SPLITS)
def test_a_task_read_back_from_parquet_is_what_was_drawn(cache: Path, split: str) -> None:
    found, drawn = load_split(TaskConfig(name=TASK), split, NO_RESIZE), glyphs.render(TASK, split)
    assert len(found) == glyphs.SPLIT_SIZES[split]
    assert found.classes == class_names(TASK) and found.labels.dtype == torch.int64
    assert np.array_equal(found.labels.numpy(), drawn.labels)
    assert found.images.dtype == torch.uint8 and found.images.is_contiguous()
    assert np.array_equal(found.images.permute(0, 2, 3, 1).numpy(), drawn.images)
    assert task_url(TaskConfig(name=TASK)).startswith(str(cache)) and cache_folder() == cache


def test_the_class_names_are_in_the_parquet_metadata(cache: Path) -> None:
    files = sorted(Path(task_url(TaskConfig(name=TASK))).iterdir())
    assert [f.name for f in files] == ["test.parquet", "train.parquet", "val.parquet"]
    for file in files:
        document = json.loads(pq.read_schema(file).metadata[b"huggingface"])
        assert document["info"]["features"]["label"]["names"] == list(class_names(TASK))
    assert task_classes(
        TaskConfig(name="own", data=task_url(TaskConfig(name=TASK)))
    ) == class_names(TASK)


def test_the_control_has_no_training_images(cache: Path) -> None:
    folder = Path(task_url(TaskConfig(name=CONTROL)))
    assert sorted(f.name for f in folder.iterdir()) == ["test.parquet", "val.parquet"]
    with pytest.raises(UserError, match=f"{CONTROL}: no train"):
        load_split(TaskConfig(name=CONTROL), "train", NO_RESIZE)


def test_a_drawn_task_is_not_drawn_again(cache: Path) -> None:
    folder = Path(task_url(TaskConfig(name="glyphs/trigrams-fog")))
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert Path(task_url(TaskConfig(name="glyphs/trigrams-fog"))) == folder
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before and len(before) == 3


def test_the_tiny_clip_classifies_the_control_without_training(
    cache: Path, encoder: Encoder
) -> None:
    """Over 90 % of the 960 undegraded test images, among all classes of all sources."""
    task = TaskConfig(name=CONTROL)
    split = load_split(task, "test", encoder.preprocess)
    head = zero_shot_head(encoder, load_tokenizer(ModelConfig()), split.classes, task.prompts)
    assert head.shape[0] == len(class_names(CONTROL)) == len(split.classes)
    norms = head.norm(dim=1)
    assert torch.allclose(norms, norms[0].expand_as(norms), rtol=1e-5)
    with torch.inference_mode():
        visual = encoder.model.visual
        assert isinstance(visual, torch.nn.Module)
        logits = ImageClassifier(visual, head)(encoder.preprocess.normalise(split.images))
    assert len(split) == glyphs.CONTROL_SIZES["test"]
    assert float((logits.argmax(dim=1) == split.labels).float().mean()) > 0.9


def test_the_tiny_clip_is_a_float32_model_in_eval_mode_of_the_suites_size(encoder: Encoder) -> None:
    assert encoder.preprocess.size == SIZE and not encoder.model.training
    state = encoder.visual_state()
    assert state and all(
        n.startswith("visual.") and p.dtype == torch.float32 for n, p in state.items()
    )
    assert (
        len(encoder.fingerprint()) == 64
        and encoder.fingerprint() == load_encoder(ModelConfig()).fingerprint()
    )
    changed = load_encoder(ModelConfig())
    with torch.no_grad():
        next(iter(changed.visual_state().values())).view(-1)[0] += 1e-3
    assert changed.fingerprint() != encoder.fingerprint()


def test_pixels_are_normalised_by_channel() -> None:
    preprocess = Preprocess(2, (0.1, 0.2, 0.3), (0.5, 0.25, 2.0), {})
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 2, 2)
    found = preprocess.normalise(images)
    assert found.shape == images.shape and found.dtype == torch.float32
    assert found[0, :, 0, 0].tolist() == pytest.approx([-0.2, 0.0, 0.35], abs=1e-6)


@pytest.mark.slow
def test_pretraining_writes_weights_like_those_in_the_package(tmp_path: Path) -> None:
    tokenizer = MODEL_DIR / "bpe_2000.txt.gz"
    before = tokenizer.read_bytes()
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "raytvb.suite.pretrain",
            "--images",
            "200",
            "--steps",
            "4",
            "--out",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert tokenizer.read_bytes() == before
    made, packaged = (
        load_file(folder / "open_clip_model.safetensors") for folder in (tmp_path, MODEL_DIR)
    )
    assert {n: (t.shape, t.dtype) for n, t in made.items()} == {
        n: (t.shape, t.dtype) for n, t in packaged.items()
    }
    assert all(bool(torch.isfinite(t).all()) for t in made.values())
