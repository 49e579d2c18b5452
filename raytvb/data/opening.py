"""One encoded image as RGB pixels: which formats are read, and what is done with unusual pixels."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import (
    ExifTags,
    Image,
    ImageOps,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
)

from raytvb.data.image_source import Row
from raytvb.experiment.sections.data import DataConfig

COMMON = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
"""The formats of nearly all data sets, which are tried first."""

NOT_IMAGES = frozenset(
    {"BUFR", "EPS", "FITS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF", "XVTHUMB"}
)
"""Formats that Pillow lists but does not decode itself, or that are no pictures."""

NEED_PLUGIN = {
    ".heic": "pillow-heif",
    ".heif": "pillow-heif",
    ".hif": "pillow-heif",
    ".avif": "pillow-avif-plugin",
    ".jxl": "pillow-jxl-plugin",
}
"""Endings of images that Pillow reads only with a plugin, and the package that has it. Newer
versions of Pillow read some of them by themselves."""

BRANDS = {b"heic": ".heic", b"heix": ".heic", b"mif1": ".heif", b"avif": ".avif", b"avis": ".avif"}
"""How the content of such files says what it is."""

HEAVY = 3
"""How many times more memory than others a JPEG 2000 image takes while it is decoded."""

STRIP = 2**22
"""Number of pixels of a strip of `rgb_strips`."""

LONGEST = 100
"""How many times longer than the other a side of an image may be. The shorter side is resized to
the model's, so the longer one could otherwise grow to millions of pixels."""

TIFF_TAGS = "raytvb grey scale"
"""Key in the `info` of an image, which Pillow hands on to its parts."""

ROTATED = "rotated as their EXIF data say"
BAD_EXIF = "with EXIF data that cannot be read, taken as they are stored"
DROPPED = "with transparent pixels, whose colours are taken as they are"
WHITENED = "with transparent pixels, put on white"
FIRST_FRAME = "with several frames, of which the first is used"
SIXTEEN_BITS = "with 16 bits a channel, scaled to 8"

# Blocks of memory above 32 MB go back to the system when they are freed. Smaller ones, of which
# Pillow would make a large image, stay with the thread that decoded it.
Image.core.set_block_size(2**26)  # type: ignore[attr-defined]

# Drawing programs write long texts into images. Pillow reads none over 1 MB by default.
PngImagePlugin.MAX_TEXT_CHUNK = 2**26

# What Pillow warns of is in the reasons and notes here; `max_pixels` is the limit of sizes.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


@dataclass(frozen=True)
class Unreadable:
    """Why an image cannot be read."""

    reason: str
    kind: str = "damaged images"
    """The reason in a few words without numbers, the same for all images of a kind."""


class RefusedImageError(ValueError):
    """An image that is whole, but cannot be used."""

    def __init__(self, reason: str, kind: str) -> None:
        super().__init__(reason, kind)
        self.reason = reason
        self.kind = kind


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read, those of installed plugins included."""
    Image.init()
    for plugin in ("pillow_avif", "pillow_jxl"):
        with suppress(ImportError):
            __import__(plugin)
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
    others = sorted(set(Image.OPEN) - set(COMMON) - NOT_IMAGES)
    return (*COMMON, *others)


@cache
def image_endings() -> tuple[str, ...]:
    """Endings of the names of image files, in lower case: of all formats that are read, and of
    those that need a plugin.
    """
    readable = set(formats())
    known = [ending for ending, name in Image.registered_extensions().items() if name in readable]
    return tuple(sorted({*known, *NEED_PLUGIN}))


def open_image(row: Row, reading: DataConfig) -> Image.Image:
    """A row's image, not decoded yet. Its size is known and allowed.

    Raises RefusedImageError, and the errors of Pillow, which are of many kinds.
    """
    image = _opened(row)
    _check_size(image, reading)
    if isinstance(image, TiffImagePlugin.TiffImageFile) and image.mode.startswith("I;16"):
        bits, white_is_zero = image.tag_v2.get(258, (16,)), image.tag_v2.get(262) == 0
        image.info[TIFF_TAGS] = (min(16, max(9, int(bits[0]))), white_is_zero)
    return image


def rgb_image(image: Image.Image, reading: DataConfig) -> Image.Image:
    """An opened image with mode RGB or L, upright. Raises as `open_image`."""
    return _rgb(_upright(image, []), image.format, reading, [])


def rgb_strips(image: Image.Image, reading: DataConfig, notes: list[str]) -> Iterator[Image.Image]:
    """As `rgb_image`, in strips of whole rows from top to bottom, so that a large image is in
    memory once only.

    What is unusual about the image is appended to `notes`, each kind once. Raises as `open_image`.
    """
    if getattr(image, "is_animated", False):
        notes.append(FIRST_FRAME)
    upright = _upright(image, notes)
    width, height = upright.size
    rows = max(1, STRIP // width)
    found = dict[str, None]()
    for top in range(0, height, rows):
        strip = upright
        if rows < height:
            strip = upright.crop((0, top, width, min(top + rows, height)))
        in_strip = list[str]()
        yield _rgb(strip, image.format, reading, in_strip)
        found |= dict.fromkeys(in_strip)
    notes += found


def _rgb(
    image: Image.Image, form: str | None, reading: DataConfig, notes: list[str]
) -> Image.Image:
    """A decoded image, or a part of one, with mode RGB or L. form: the image's format."""
    image = _eight_bits(image, form, notes)
    if image.has_transparency_data:
        image = _opaque(image, reading, notes)
    if image.mode not in ("RGB", "L"):
        image = image.convert("RGB")
    return image


def why_unreadable(row: Row, error: Exception) -> Unreadable:
    """The reason that an error of the functions above gives."""
    if isinstance(error, RefusedImageError):
        return Unreadable(error.reason, error.kind)
    if isinstance(error, Image.DecompressionBombError):
        return Unreadable("it has more pixels than Pillow reads", "images with too many pixels")
    if isinstance(error, UnidentifiedImageError):
        return _unknown_format(row)
    return Unreadable(str(error) or "the file is damaged")


def _unknown_format(row: Row) -> Unreadable:
    data = row.image if isinstance(row.image, bytes) else b""
    if not data:
        return Unreadable("it is empty", "empty images")
    ending = BRANDS.get(data[8:12]) if data[4:8] == b"ftyp" else None
    if data.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        ending = ".jxl"
    if ending is None:
        return Unreadable("the image format is not known", "images of an unknown format")
    package = NEED_PLUGIN[ending]
    if Image.registered_extensions().get(ending) in formats():
        return Unreadable("the file is damaged or cut")
    return Unreadable(
        f"this format ({ending}) is read once the package {package} is installed",
        f"images that need the package {package}",
    )


def _opened(row: Row) -> Image.Image:
    """The row's image, not decoded yet."""
    match row.image:
        case Image.Image():
            return row.image
        case bytes():
            return Image.open(io.BytesIO(row.image), formats=formats())
        case Exception():
            raise row.image
        case None:
            raise RefusedImageError("there is no image", "rows without an image")
        case _:
            kind = type(row.image).__name__
            raise RefusedImageError(
                f"the column holds {kind}, not the bytes of an image", "rows without an image"
            )


def weighed_pixels(image: Image.Image) -> int:
    """The pixels of an opened image, as a measure of the memory that decoding it takes."""
    return image.width * image.height * (HEAVY if image.format == "JPEG2000" else 1)


def _check_size(image: Image.Image, reading: DataConfig) -> None:
    width, height = image.size
    if weighed_pixels(image) > reading.max_pixels:
        times = f" (which count {HEAVY} times in JPEG 2000)" if image.format == "JPEG2000" else ""
        raise RefusedImageError(
            f"it has {width} x {height} pixels{times}, more than `data.max_pixels` "
            f"({reading.max_pixels:,}) allows",
            "images with more pixels than data.max_pixels",
        )
    if max(width, height) > LONGEST * min(width, height):
        raise RefusedImageError(
            f"it has {width} x {height} pixels: one side is over {LONGEST} times the other",
            f"images with one side over {LONGEST} times the other",
        )


def _upright(image: Image.Image, notes: list[str]) -> Image.Image:
    """The image, decoded, as its EXIF data say that it is meant to be seen."""
    image.load()  # before anything else: Pillow decodes what failed once as if it were whole
    try:
        if image.getexif().get(ExifTags.Base.Orientation) not in range(2, 9):
            return image  # upright already; transposing it would copy it
        turned = ImageOps.exif_transpose(image)
    except Exception:  # of many kinds; the pixels are decoded and whole
        notes.append(BAD_EXIF)
        return image
    notes.append(ROTATED)
    return turned


def _eight_bits(image: Image.Image, form: str | None, notes: list[str]) -> Image.Image:
    """The image; a grey image of 16 bits is scaled to 8 bits, since Pillow would clip it at 255.

    Raises RefusedImageError for wider pixels, whose range is not known.
    """
    is_grey = image.mode == "I" and form in ("PNG", "PPM")  # these have 16 bits at most
    if image.mode.startswith("I;16") or is_grey:
        notes.append(SIXTEEN_BITS)
        bits, is_inverted = _grey_scale(image)
        scaled = np.asarray(image).astype(np.float32) * (255 / (2**bits - 1)) + 0.5
        grey = np.minimum(scaled, 255).astype(np.uint8)
        return Image.fromarray(255 - grey if is_inverted else grey)
    if image.mode in ("I", "F"):
        kind = "floats" if image.mode == "F" else "32-bit integers"
        raise RefusedImageError(
            f"its pixels are {kind}, whose range is not known: save it with 8 or 16 bits",
            f"images with pixels that are {kind}",
        )
    return image


def _grey_scale(image: Image.Image) -> tuple[int, bool]:
    """The number of bits of a grey image with more than eight, and whether 0 is white in it.

    Pillow gives the numbers of TIFF files as they are stored.
    """
    tags = image.info.get(TIFF_TAGS)
    return tags if tags is not None else (16, False)


def _opaque(image: Image.Image, reading: DataConfig, notes: list[str]) -> Image.Image:
    """The image in RGB, without its transparency."""
    layers = image.convert("RGBA")
    lowest = layers.getchannel("A").getextrema()[0]
    if lowest == 255:
        return layers.convert("RGB")
    if reading.transparency == "drop":
        notes.append(DROPPED)
        return layers.convert("RGB")
    notes.append(WHITENED)
    white = Image.new("RGBA", layers.size, "white")
    return Image.alpha_composite(white, layers).convert("RGB")
