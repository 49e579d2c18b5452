"""The 8, 14 and 20 image classification tasks on which the literature measures task arithmetic with
CLIP.

Epochs: Ilharco et al. (ICLR 2023) for the first eight, Wang et al. (TALL masks, ICML 2024) for the
others. Prompts are CLIP's. The data are Parquet collections on the Hugging Face hub; class names
are given where theirs are missing, or are not English words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product

_DIGITS = tuple("0123456789")

_NUMBER = ('a photo of the number: "{}".',)

_PHOTO = ("a photo of a {}.", "a photo of the {}.")

_SMALL_PHOTO = tuple(
    template.replace("*", article)
    for article, template in product(
        ("a", "the"),
        (
            "a photo of * {}.",
            "a blurry photo of * {}.",
            "a black and white photo of * {}.",
            "a low contrast photo of * {}.",
            "a high contrast photo of * {}.",
            "a bad photo of * {}.",
            "a good photo of * {}.",
            "a photo of * small {}.",
            "a photo of * big {}.",
        ),
    )
)

_TRAFFIC_SIGNS = (
    "red and white circle 20 kph speed limit",
    "red and white circle 30 kph speed limit",
    "red and white circle 50 kph speed limit",
    "red and white circle 60 kph speed limit",
    "red and white circle 70 kph speed limit",
    "red and white circle 80 kph speed limit",
    "end / de-restriction of 80 kph speed limit",
    "red and white circle 100 kph speed limit",
    "red and white circle 120 kph speed limit",
    "red and white circle red car and black car no passing",
    "red and white circle red truck and black car no passing",
    "red and white triangle road intersection warning",
    "white and yellow diamond priority road",
    "red and white upside down triangle yield right-of-way",
    "stop",
    "empty red and white circle",
    "red and white circle no truck entry",
    "red circle with white horizonal stripe no entry",
    "red and white triangle with exclamation mark warning",
    "red and white triangle with black left curve approaching warning",
    "red and white triangle with black right curve approaching warning",
    "red and white triangle with black double curve approaching warning",
    "red and white triangle rough / bumpy road warning",
    "red and white triangle car skidding / slipping warning",
    "red and white triangle with merging / narrow lanes warning",
    "red and white triangle with person digging / construction / road work warning",
    "red and white triangle with traffic light approaching warning",
    "red and white triangle with person walking warning",
    "red and white triangle with child and person walking warning",
    "red and white triangle with bicyle warning",
    "red and white triangle with snowflake / ice warning",
    "red and white triangle with deer warning",
    "white circle with gray strike bar no speed limit",
    "blue circle with white right turn arrow mandatory",
    "blue circle with white left turn arrow mandatory",
    "blue circle with white forward arrow mandatory",
    "blue circle with white forward or right turn arrow mandatory",
    "blue circle with white forward or left turn arrow mandatory",
    "blue circle with white keep right arrow mandatory",
    "blue circle with white keep left arrow mandatory",
    "blue circle with white arrows indicating a traffic circle",
    "white circle with gray strike bar indicating no passing for cars has ended",
    "white circle with gray strike bar indicating no passing for trucks has ended",
)


@dataclass(frozen=True)
class PresetTask:
    """A task of a preset, with the fields of a task in an experiment file."""

    data: str
    templates: tuple[str, ...]
    epochs: int | None = None
    classes: tuple[str, ...] | None = None
    image_column: str = "image"
    label_column: str = "label"
    splits: Mapping[str, str | float] = field(default_factory=dict)


CLIP_TASKS = {
    "Cars": PresetTask(
        data="hf://datasets/tanganke/stanford_cars",
        epochs=35,
        templates=(
            *_PHOTO,
            "a photo of my {}.",
            "i love my {}!",
            "a photo of my dirty {}.",
            "a photo of my clean {}.",
            "a photo of my new {}.",
            "a photo of my old {}.",
        ),
    ),
    "DTD": PresetTask(
        data="hf://datasets/tanganke/dtd",
        epochs=76,
        templates=(
            "a photo of a {} texture.",
            "a photo of a {} pattern.",
            "a photo of a {} thing.",
            "a photo of a {} object.",
            "a photo of the {} texture.",
            "a photo of the {} pattern.",
            "a photo of the {} thing.",
            "a photo of the {} object.",
        ),
    ),
    "EuroSAT": PresetTask(
        data="hf://datasets/tanganke/eurosat",
        epochs=12,
        templates=(
            "a centered satellite photo of {}.",
            "a centered satellite photo of a {}.",
            "a centered satellite photo of the {}.",
        ),
    ),
    "GTSRB": PresetTask(
        data="hf://datasets/tanganke/gtsrb",
        epochs=11,
        templates=(
            'a zoomed in photo of a "{}" traffic sign.',
            'a centered photo of a "{}" traffic sign.',
            'a close up photo of a "{}" traffic sign.',
        ),
        classes=_TRAFFIC_SIGNS,
    ),
    "MNIST": PresetTask(
        data="hf://datasets/ylecun/mnist/mnist",
        epochs=5,
        templates=_NUMBER,
        classes=_DIGITS,
    ),
    "RESISC45": PresetTask(
        data="hf://datasets/tanganke/resisc45",
        epochs=15,
        templates=tuple(
            f"{view} {noun} {of} {{}}."
            for view in ("satellite", "aerial")
            for noun in ("imagery", "photo", "view")
            for of in ("of", "of a", "of the")
        ),
    ),
    "SVHN": PresetTask(
        data="hf://datasets/ufldl-stanford/svhn/cropped_digits",
        epochs=4,
        templates=_NUMBER,
        classes=_DIGITS,
    ),
    "SUN397": PresetTask(
        data="hf://datasets/tanganke/sun397",
        epochs=14,
        templates=_PHOTO,
    ),
    "CIFAR100": PresetTask(
        data="hf://datasets/tanganke/cifar100",
        epochs=6,
        templates=_SMALL_PHOTO,
    ),
    "STL10": PresetTask(
        data="hf://datasets/tanganke/stl10",
        epochs=60,
        templates=_PHOTO,
    ),
    "Flowers102": PresetTask(
        data="hf://datasets/dpdl-benchmark/oxford_flowers102",
        epochs=147,
        templates=("a photo of a {}, a type of flower.",),
    ),
    "OxfordIIITPet": PresetTask(
        data="hf://datasets/timm/oxford-iiit-pet",
        epochs=82,
        templates=("a photo of a {}, a type of pet.",),
    ),
    "PCAM": PresetTask(
        data="hf://datasets/1aurent/PatchCamelyon",
        epochs=1,
        templates=("this is a photo of {}",),
        classes=("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    "FER2013": PresetTask(
        data="hf://datasets/clip-benchmark/wds_fer2013@refs/convert/parquet/default",
        epochs=10,
        templates=(
            "a photo of a {} looking face.",
            "a photo of a face showing the emotion: {}.",
            "a photo of a face looking {}.",
            "a face that looks {}.",
            "they look {}.",
            "look at how {} they are.",
        ),
        image_column="jpg",
        label_column="cls",
        classes=("angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"),
    ),
    "EMNIST": PresetTask(
        data="hf://datasets/ernestchu/emnist-digits",
        epochs=2,
        templates=('a photo of the digit character: "{}".',),
        classes=_DIGITS,
    ),
    "CIFAR10": PresetTask(
        data="hf://datasets/tanganke/cifar10",
        epochs=6,
        templates=_SMALL_PHOTO,
    ),
    "Food101": PresetTask(
        data="hf://datasets/ethz/food101",
        epochs=4,
        templates=("a photo of {}, a type of food.",),
        splits={"test": "validation"},
    ),
    "FashionMNIST": PresetTask(
        data="hf://datasets/zalando-datasets/fashion_mnist/fashion_mnist",
        epochs=5,
        templates=_PHOTO,
    ),
    "RenderedSST2": PresetTask(
        data="hf://datasets/nateraw/rendered-sst2",
        epochs=39,
        templates=("a {} review of a movie.",),
        classes=("negative", "positive"),
    ),
    "KMNIST": PresetTask(
        data="hf://datasets/tanganke/kmnist/kmnist",
        epochs=5,
        templates=("a photo of the character {}.",),
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}
"""The tasks of the presets in order. The smaller presets are the first 8 and 14 of them."""

IMAGENET = PresetTask(
    data="torchvision:ImageNet",
    splits={"train": "val", "val": 0.2, "test": 0.7},
    templates=(
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
)
"""ImageNet as the control of negation. A fifth of its 50,000 validation images is the split val,
and seven tenths are the split test. The prompts are the subset of CLIP's eighty that works best.
The archives are not free to download: `root:` says where they are."""

TASKS = {**CLIP_TASKS, "ImageNet": IMAGENET}

PRESETS = {
    "clip8": tuple(CLIP_TASKS)[:8],
    "clip14": tuple(CLIP_TASKS)[:14],
    "clip20": tuple(CLIP_TASKS),
    "imagenet": ("ImageNet",),
}
"""Names of the tasks of each preset."""


def preset_tasks(
    preset: str, data: str | None, fields: Mapping[str, object]
) -> list[dict[str, object]]:
    """The tasks of a preset, with the fields that an experiment file would give.

    data: URL of a copy of the data sets, with a folder for each task (DATA/Cars, DATA/DTD...).
    fields: replace the fields of every task. Raises KeyError for an unknown preset.
    """
    tasks = []
    for name in PRESETS[preset]:
        task = {"name": name, **asdict(TASKS[name])}
        if data:
            task["data"] = f"{data.rstrip('/')}/{name}"
        tasks.append({**task, **fields})
    return tasks
