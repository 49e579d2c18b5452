"""The 8, 14 and 20 image classification tasks on which task arithmetic with CLIP is measured in the
literature.

Epochs: Ilharco et al. (ICLR 2023) for the first eight, Wang et al. (TALL masks, ICML 2024) for the
others. Prompts are CLIP's. The data are Parquet collections on the Hugging Face hub; class names
are given where theirs are missing, or are not English words.
"""

from __future__ import annotations

from typing import Any

_DIGITS = tuple("0123456789")


_NUMBER = ('a photo of the number: "{}".',)


_PHOTO = ("a photo of a {}.", "a photo of the {}.")


_SMALL_PHOTO = tuple(
    t.replace("*", article)
    for article in ("a", "the")
    for t in (
        "a photo of * {}.",
        "a blurry photo of * {}.",
        "a black and white photo of * {}.",
        "a low contrast photo of * {}.",
        "a high contrast photo of * {}.",
        "a bad photo of * {}.",
        "a good photo of * {}.",
        "a photo of * small {}.",
        "a photo of * big {}.",
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


def _hub(path: str, epochs: int, templates: tuple[str, ...], **fields: Any) -> dict[str, Any]:
    return {"data": f"hf://datasets/{path}", "epochs": epochs, "templates": templates, **fields}


TASKS: dict[str, dict[str, Any]] = {
    "Cars": _hub(
        "tanganke/stanford_cars",
        35,
        (
            *_PHOTO,
            "a photo of my {}.",
            "i love my {}!",
            "a photo of my dirty {}.",
            "a photo of my clean {}.",
            "a photo of my new {}.",
            "a photo of my old {}.",
        ),
    ),
    "DTD": _hub(
        "tanganke/dtd",
        76,
        tuple(
            f"a photo of {article} {{}} {noun}."
            for article in ("a", "the")
            for noun in ("texture", "pattern", "thing", "object")
        ),
    ),
    "EuroSAT": _hub(
        "tanganke/eurosat",
        12,
        (
            "a centered satellite photo of {}.",
            "a centered satellite photo of a {}.",
            "a centered satellite photo of the {}.",
        ),
    ),
    "GTSRB": _hub(
        "tanganke/gtsrb",
        11,
        (
            'a zoomed in photo of a "{}" traffic sign.',
            'a centered photo of a "{}" traffic sign.',
            'a close up photo of a "{}" traffic sign.',
        ),
        classes=_TRAFFIC_SIGNS,
    ),
    "MNIST": _hub("ylecun/mnist/mnist", 5, _NUMBER, classes=_DIGITS),
    "RESISC45": _hub(
        "tanganke/resisc45",
        15,
        tuple(
            f"{view} {noun} {of} {{}}."
            for view in ("satellite", "aerial")
            for noun in ("imagery", "photo", "view")
            for of in ("of", "of a", "of the")
        ),
    ),
    "SVHN": _hub("ufldl-stanford/svhn/cropped_digits", 4, _NUMBER, classes=_DIGITS),
    "SUN397": _hub("tanganke/sun397", 14, _PHOTO),
    "CIFAR100": _hub("tanganke/cifar100", 6, _SMALL_PHOTO),
    "STL10": _hub("tanganke/stl10", 60, _PHOTO),
    "Flowers102": _hub(
        "dpdl-benchmark/oxford_flowers102", 147, ("a photo of a {}, a type of flower.",)
    ),
    "OxfordIIITPet": _hub("timm/oxford-iiit-pet", 82, ("a photo of a {}, a type of pet.",)),
    "PCAM": _hub(
        "1aurent/PatchCamelyon",
        1,
        ("this is a photo of {}",),
        classes=("lymph node", "lymph node containing metastatic tumor tissue"),
    ),
    "FER2013": _hub(
        "clip-benchmark/wds_fer2013@refs/convert/parquet/default",
        10,
        (
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
    "EMNIST": _hub(
        "ernestchu/emnist-digits", 2, ('a photo of the digit character: "{}".',), classes=_DIGITS
    ),
    "CIFAR10": _hub("tanganke/cifar10", 6, _SMALL_PHOTO),
    "Food101": _hub(
        "ethz/food101", 4, ("a photo of {}, a type of food.",), splits={"test": "validation"}
    ),
    "FashionMNIST": _hub("zalando-datasets/fashion_mnist/fashion_mnist", 5, _PHOTO),
    "RenderedSST2": _hub(
        "nateraw/rendered-sst2", 39, ("a {} review of a movie.",), classes=("negative", "positive")
    ),
    "KMNIST": _hub(
        "tanganke/kmnist/kmnist",
        5,
        ("a photo of the character {}.",),
        classes=("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}


PRESETS: dict[str, tuple[str, ...]] = {
    f"clip{count}": tuple(TASKS)[:count] for count in (8, 14, 20)
}


# As a control: a fifth of the 50,000 validation images chooses, seven tenths are the test split.
# Prompts are those that do best together of CLIP's eighty. The archives are not free to download:
# `root:` says where they are.
TASKS["ImageNet"] = {
    "data": "torchvision:ImageNet",
    "splits": {"train": "val", "val": 0.2, "test": 0.7},
    "templates": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ),
}


PRESETS["imagenet"] = ("ImageNet",)


def expand(preset: str, data: str | None = None, **fields: Any) -> list[dict[str, Any]]:
    """The tasks of a preset as fields of an experiment file; `fields` replace those of every task.

    `data` is a copy of the collections, a folder for each task (DATA/Cars, DATA/DTD...). Raises
    KeyError for a preset that there is not.
    """
    own = [TASKS[name] | {"name": name} for name in PRESETS[preset]]
    moved = [{"data": f"{data.rstrip('/')}/{task['name']}"} if data else {} for task in own]
    return [task | place | fields for task, place in zip(own, moved, strict=True)]
