"""Names of the embedded suite `glyphs`: its tasks, and their classes and prompts.

A task `glyphs/<source>-<domain>` shows one kind of drawing (greek letters, handwritten digits,
clock hands...) under one degradation (blur, fog...). `glyphs/clean` has undegraded images of all
classes and is the control for negation. The suite is a test bed. A network as small as its CLIP
merges worse than a ViT-B/32, so results on it say nothing about which published method is better.

This module draws nothing and imports only the standard library, since experiment files are checked
against these names.
"""

from __future__ import annotations

import unicodedata
from functools import cache
from pathlib import Path

SUITE = "glyphs"

CONTROL = f"{SUITE}/clean"

MODEL_DIR = Path(__file__).parent / "model"
"""Folder of the tiny CLIP: its configuration, tokenizer and weights."""

TEMPLATES = ("a picture of a {}.", "an image of the {}.", "a photo of the {}.")

SPLITS = ("train", "val", "test")
"""The splits of every task. A split's position seeds its drawings."""

ALPHABETS = {
    "latin": "ABDEFGHKMQRSWZ",
    "greek": "αβγδεζθλξπφψωσ",
    "cyrillic": "БДЖИЛФЦЧШЭЮЯ",
    "hebrew": "אבגדהחטלמסעפצש",
    "armenian": "ԱԳԴԵԶԹԺԽԾՁՃՄ",
    "georgian": "აბგდევზთკლმფ",
    "arabic": "ابجدرسصطعفكلمه",
    "tifinagh": "ⴱⴳⴷⴼⴽⵅⵇⵉⵊⵎⵙⵛⵣⵢ",
    "canadian": "ᐁᐅᐊᐯᐳᑌᑎᑐᑫᑭᒉᒋ",
    "math": "∀∃∅∆∈∏∑√∞∩∪≈⊕⊗",
    "pictograms": "♈♉♊♋♌♍♎♏♐♑♒♓",
    "arrows": "←↑→↓↖↗↘↙↔↕↩↻",
    "braille": "⠁⠃⠉⠙⠑⠋⠛⠓⠞⠺⠽⠿",
    "dingbats": "✂✈✉✌✎✔✖✞✡✪❄❤❥✿",
    "trigrams": "☰☱☲☳☴☵☶☷",
}
"""Sources that show a character of a font: source to its characters, one for each class."""

SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "pentagon",
    "hexagon",
    "star",
    "cross",
    "ring",
    "crescent",
    "half disc",
    "heart",
)

NUMBERS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)

TEXTURES = (
    "horizontal lines",
    "vertical lines",
    "rising diagonal lines",
    "falling diagonal lines",
    "checkerboard",
    "grid of dots",
    "square grid",
    "concentric circles",
    "radial rays",
    "zigzag lines",
    "brick wall",
    "slanted grid",
)

COLOURS = {
    "red": (235, 60, 50),
    "green": (60, 200, 70),
    "blue": (80, 110, 245),
    "yellow": (240, 225, 60),
    "orange": (245, 145, 40),
    "purple": (165, 80, 210),
    "cyan": (70, 220, 225),
    "pink": (250, 150, 195),
    "white": (248, 248, 248),
    "grey": (150, 150, 150),
}
"""Red, green and blue, 0 to 255. Every colour is light enough to stand out from the dark
backgrounds that it is drawn on."""

POSITIONS = {
    "right of": (1, 0),
    "below right of": (1, 1),
    "below": (0, 1),
    "below left of": (-1, 1),
    "left of": (-1, 0),
    "above left of": (-1, -1),
    "above": (0, -1),
    "above right of": (1, -1),
}
"""Direction from the block to the disc: steps to the right, and steps down."""

DOMAIN_NAMES = (
    "noise",
    "blur",
    "stripes",
    "contrast",
    "occlusion",
    "pixelation",
    "saltpepper",
    "clutter",
    "fog",
    "shear",
    "rotation",
    "photo",
)

# These sixteen tasks were chosen because addition shows best on them. Their order was chosen by the
# same measure, so that the first eight are the best eight of them.
SHOWCASE = tuple(
    f"{SUITE}/{task}"
    for task in (
        "greek-blur",
        "latin-fog",
        "arabic-photo",
        "tifinagh-blur",
        "armenian-fog",
        "pictograms-photo",
        "textures-blur",
        "math-fog",
        "dingbats-stripes",
        "hebrew-fog",
        "georgian-photo",
        "cyrillic-stripes",
        "clock-blur",
        "counting-photo",
        "digits-stripes",
        "shapes-stripes",
    )
)


def _character_name(character: str) -> str:
    """The character's Unicode name. Braille names are shortened to the part in which they differ,
    since the text tower reads only 20 tokens.
    """
    return unicodedata.name(character).lower().replace("pattern dots-", "dots ")


def _classes() -> dict[str, tuple[str, ...]]:
    classes = {}
    for source, characters in ALPHABETS.items():
        classes[source] = tuple(map(_character_name, characters))
    classes["digits"] = tuple(f"handwritten digit {number}" for number in NUMBERS[:10])
    classes["shapes"] = SHAPES
    classes["counting"] = ("one dot", *(f"{number} dots" for number in NUMBERS[2:9]))
    classes["textures"] = tuple(f"texture of {texture}" for texture in TEXTURES)
    classes["colours"] = tuple(f"{colour} object" for colour in COLOURS)
    classes["clock"] = tuple(f"clock at {number} o'clock" for number in NUMBERS[1:])
    classes["position"] = tuple(f"disc {position} a block" for position in POSITIONS)
    return classes


CLASSES = _classes()
"""Class names of every source, in the order of their labels."""


@cache
def task_names() -> tuple[str, ...]:
    """Every task of the suite, the showcase first: 22 sources x 12 domains."""
    names = list(SHOWCASE)
    for domain in DOMAIN_NAMES:
        for source in CLASSES:
            name = f"{SUITE}/{source}-{domain}"
            if name not in SHOWCASE:
                names.append(name)
    return tuple(names)


@cache
def all_classes() -> tuple[tuple[str, int, str], ...]:
    """(source, label within the source, class name) of every class, in the order of the control's
    labels.
    """
    return tuple(
        (source, label, name)
        for source, classes in CLASSES.items()
        for label, name in enumerate(classes)
    )


def source_and_domain(task: str) -> tuple[str, str]:
    """The two parts of a task's name. Raises KeyError if the suite has no task of this name."""
    if task not in task_names():
        raise KeyError(task)
    source, domain = task.removeprefix(f"{SUITE}/").split("-")
    return source, domain


def class_names(task: str) -> tuple[str, ...]:
    """Class names of a task of the suite or of the control. Raises KeyError for other names."""
    if task == CONTROL:
        return tuple(name for _, _, name in all_classes())
    return CLASSES[source_and_domain(task)[0]]
