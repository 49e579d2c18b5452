"""Images of every kind: read as the field reads them, or left out with a reason, and never without
a word. One row for each kind.
"""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image

from raytvb.cli.main import main
from raytvb.data import opening
from raytvb.data.decoding import decoded_rows
from raytvb.data.image_source import Row
from raytvb.data.opening import Unreadable
from raytvb.data.preprocess import Preprocess
from raytvb.experiment.sections.data import DataConfig

AS_THEY_ARE = Preprocess(8, (0.5,) * 3, (0.5,) * 3, {"size": 8})
opening.formats()  # lets Pillow write HEIC

LIMIT = 10_000
"""The `max_pixels` of these tests."""


def encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def picture(seed: int = 0, side: int = 8) -> Image.Image:
    """A picture with random pixels, every one of them different."""
    values = np.random.default_rng(seed).permutation(side * side * 3) % 256
    return Image.fromarray(values.reshape(side, side, 3).astype(np.uint8))


def turned(orientation: int) -> bytes:
    """`picture()`, stored with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(picture(), exif=exif)


def see_through() -> Image.Image:
    """A red square, of which all is transparent but a corner."""
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    return image


def huge_png() -> bytes:
    """A valid header of 13,000 x 13,000 pixels with few bytes behind it."""
    header = (13_000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunks = [b"\x89PNG\r\n\x1a\n"]
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")):
        check = zlib.crc32(kind + data).to_bytes(4, "big")
        chunks.append(len(data).to_bytes(4, "big") + kind + data + check)
    return b"".join(chunks)


def animated(form: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    options: dict[str, Any] = {"lossless": True} if form == "WEBP" else {}
    return encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)


def sixteen_bits() -> bytes:
    return encoded(Image.fromarray(np.full((8, 8), 257 * 40, dtype=np.uint16)))


def transparent_palette() -> bytes:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0] * 256)
    return encoded(image, transparency=0)


def solid(colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((3, 8, 8), np.array(colour).reshape(3, 1, 1), dtype=np.uint8)


RED, WHITE = solid((255, 0, 0)), solid((255, 255, 255))
UPRIGHT = np.asarray(picture()).transpose(2, 0, 1)


class Read(NamedTuple):
    """An image that is read: its pixels, and what a plan must say about it."""

    data: bytes
    pixels: np.ndarray
    note: str
    fields: Mapping[str, Any] = MappingProxyType({})
    tolerance: int = 0


READ = {
    "plain": Read(encoded(picture()), UPRIGHT, ""),
    "upright by EXIF": Read(turned(1), UPRIGHT, ""),
    "turned by EXIF": Read(turned(6), np.rot90(UPRIGHT, -1, (1, 2)), "rotated"),
    "upside down": Read(turned(3), np.rot90(UPRIGHT, 2, (1, 2)), "rotated"),
    "mirrored": Read(turned(2), UPRIGHT[:, :, ::-1], "rotated"),
    "an orientation that is none": Read(turned(77), UPRIGHT, ""),
    "transparent": Read(encoded(see_through()), RED, "transparent pixels, whose colours"),
    "transparent on white": Read(
        encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 0))),
        WHITE,
        "put on white",
        {"transparency": "white"},
    ),
    "an alpha channel that hides nothing": Read(
        encoded(Image.new("RGBA", (8, 8), (255, 0, 0, 255))),
        RED,
        "",
        {"transparency": "white"},
    ),
    "a transparent palette": Read(transparent_palette(), RED, "whose colours are taken"),
    "a transparent palette on white": Read(
        transparent_palette(), WHITE, "put on white", {"transparency": "white"}
    ),
    "grey and alpha": Read(encoded(Image.new("LA", (8, 8), (9, 255))), solid((9, 9, 9)), ""),
    "grey": Read(encoded(Image.new("L", (8, 8), 9)), solid((9, 9, 9)), ""),
    "black and white": Read(encoded(Image.new("1", (8, 8), 1)), WHITE, ""),
    "16 bits": Read(sixteen_bits(), solid((40, 40, 40)), "16 bits"),
    "CMYK": Read(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "TIFF"), RED, ""),
    "an animated GIF": Read(animated("GIF"), RED, "several frames"),
    "an animated WebP": Read(animated("WEBP"), RED, "several frames"),
    "an animated PNG": Read(animated("PNG"), RED, "several frames"),
    "BMP": Read(encoded(picture(), "BMP"), UPRIGHT, ""),
    "TIFF": Read(encoded(picture(), "TIFF"), UPRIGHT, ""),
    "TGA": Read(encoded(picture(), "TGA"), UPRIGHT, ""),
    "HEIC": Read(encoded(Image.new("RGB", (16, 16), "red"), "HEIF"), RED, "", tolerance=2),
    "JPEG 2000": Read(encoded(picture(), "JPEG2000"), UPRIGHT, "", tolerance=2),
}

NOT_READ = {
    "empty": (b"", "empty images"),
    "text": (b"<html>404</html>", "images of an unknown format"),
    "cut": (encoded(picture(side=64))[:-500], "damaged images"),
    "cut JPEG": (encoded(picture(side=64), "JPEG")[:-900], "damaged images"),
    "a checksum that is wrong": (encoded(picture())[:-20] + bytes(20), "damaged images"),
    "too many pixels": (encoded(picture(side=101)), "images with more pixels than data.max_pixels"),
    "169 megapixels in 100 bytes": (huge_png(), "images with more pixels than data.max_pixels"),
    "long and thin": (encoded(Image.new("RGB", (2000, 3))), "images with one side over 100 times"),
    "floats": (encoded(Image.new("F", (8, 8)), "TIFF"), "images with pixels that are floats"),
    "32 bits": (encoded(Image.new("I", (8, 8)), "TIFF"), "images with pixels that are 32-bit"),
    "PostScript": (encoded(picture(), "EPS"), "images of an unknown format"),
    "PDF": (encoded(picture(), "PDF"), "images of an unknown format"),
    "JPEG XL": (b"\xff\x0a" + bytes(40), "pillow-jxl-plugin"),
}


@pytest.mark.parametrize("case", READ.values(), ids=READ)
def test_an_image_is_read_as_the_field_reads_it(case: Read) -> None:
    reading = DataConfig.model_validate({"max_pixels": LIMIT, **case.fields})
    rows = iter([Row("image", case.data, 0)])
    ((_, pixels),) = decoded_rows(rows, AS_THEY_ARE, 1, reading)
    assert isinstance(pixels, np.ndarray)
    difference = np.abs(pixels.astype(int) - case.pixels.astype(int))
    assert difference.max() <= case.tolerance


def plan_of(
    folder: Path, data: bytes, fields: Mapping[str, Any], capsys: pytest.CaptureFixture[str]
) -> dict[str, Any]:
    """What `raytvb plan --json` says of two classes, of which one has this image beside others."""
    for number, (split, name) in enumerate(
        [(s, c) for s in ("train", "val", "test") for c in ("cat", "dog")]
    ):
        place = folder / "images" / split / name
        place.mkdir(parents=True)
        (place / "one.png").write_bytes(encoded(picture(100 + number)))
    (folder / "images" / "train" / "cat" / "two.png").write_bytes(data)
    experiment = {
        "store": str(folder / "store"),
        "tasks": [{"name": "animals", "data": str(folder / "images")}],
        "data": {"max_pixels": LIMIT, **fields},
    }
    file = folder / "experiment.yaml"
    file.write_text(yaml.safe_dump(experiment))
    assert main(["plan", str(file), "--json"]) == 0
    tasks = json.loads(capsys.readouterr().out)["tasks"]
    found: dict[str, Any] = tasks["animals"]
    return found


@pytest.mark.parametrize("name", [name for name, case in READ.items() if case.note])
def test_a_plan_says_what_is_done_with_an_unusual_image(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan_of(tmp_path, READ[name].data, READ[name].fields, capsys)
    assert found["classes"]["cat"] == {"train": 2, "val": 1, "test": 1}
    (warning,) = found["warnings"]
    assert READ[name].note in warning and warning.startswith("1 image ")


@pytest.mark.parametrize(("data", "reason"), NOT_READ.values(), ids=NOT_READ)
def test_an_image_that_is_not_read_is_counted_by_its_reason(
    data: bytes, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan_of(tmp_path, data, {}, capsys)
    assert found["classes"]["cat"] == {"train": 1, "val": 1, "test": 1}
    ((kind, count),) = found["left_out"].items()
    assert reason in kind and count == 1


def test_without_its_plugin_an_image_names_the_package(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    heic = encoded(Image.new("RGB", (16, 16)), "HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.delitem(Image.OPEN, "HEIF")
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    opening.formats.cache_clear()
    opening.image_endings.cache_clear()
    try:
        found = plan_of(tmp_path, heic, {}, capsys)
    finally:
        opening.formats.cache_clear()
        opening.image_endings.cache_clear()
    assert found["left_out"] == {"images that need the package pillow-heif": 1}


def test_a_decoder_that_does_not_end_costs_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder is one that users can register with Pillow. It waits for something that comes
    only after the test."""
    import threading

    from PIL import ImageFile

    from raytvb.data import decoding

    end = threading.Event()

    class Endless(ImageFile.ImageFile):
        format = "ENDLESS"

        def _open(self) -> None:
            self._mode, self._size = "RGB", (8, 8)

        def load(self) -> Any:
            end.wait(60)

    Image.register_open("ENDLESS", Endless, lambda prefix: prefix.startswith(b"ENDLESS"))
    monkeypatch.setattr(decoding, "LONGEST_S", 0.5)
    opening.formats.cache_clear()
    try:
        images = [encoded(picture()), b"ENDLESS image", encoded(picture()), encoded(picture())]
        rows = [Row(str(number), image, 0) for number, image in enumerate(images)]
        results = [seen for _, seen in decoded_rows(iter(rows), AS_THEY_ARE, 2)]
    finally:
        end.set()
        del Image.OPEN["ENDLESS"]
        Image.ID.remove("ENDLESS")
        opening.formats.cache_clear()
    slow = results.pop(1)
    assert isinstance(slow, Unreadable) and "longer than 0.5 s" in slow.reason
    for result in results:
        assert isinstance(result, np.ndarray) and np.array_equal(result, UPRIGHT)


Change = Callable[[bytes], bytes]

COPIES: dict[str, tuple[Change, bool]] = {
    "the same file": (lambda data: data, True),
    "another format": (lambda data: encoded(Image.open(io.BytesIO(data)), "BMP"), True),
    "other compression": (
        lambda data: encoded(Image.open(io.BytesIO(data)), compress_level=0),
        True,
    ),
    "another picture": (lambda _: encoded(picture(7)), False),
    "the same pixels in another shape": (
        lambda data: encoded(
            Image.fromarray(np.asarray(Image.open(io.BytesIO(data))).reshape(4, 16, 3))
        ),
        False,
    ),
}


@pytest.mark.parametrize("leaks", ["warn", "error", "ignore"])
@pytest.mark.parametrize(("change", "is_leak"), COPIES.values(), ids=COPIES)
def test_images_in_test_and_in_train(
    change: Change,
    is_leak: bool,
    leaks: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan_of(tmp_path, encoded(picture(1)), {}, capsys)
    copied = (tmp_path / "images" / "train" / "cat" / "one.png").read_bytes()
    (tmp_path / "images" / "test" / "cat" / "one.png").write_bytes(change(copied))
    file = tmp_path / "experiment.yaml"
    experiment = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**experiment, "data": {"leaks": leaks}}))
    code = main(["plan", str(file), "--json"])
    out, err = capsys.readouterr()
    names = "test/cat/one.png is train/cat/one.png of train"
    if is_leak and leaks == "error":
        assert code == 1 and names in err and "data: {leaks: warn}" in err
        return
    assert code == 0
    warnings = json.loads(out)["tasks"]["animals"]["warnings"]
    assert [names in warning for warning in warnings] == [True] * (is_leak and leaks == "warn")
