"""What the header of one Parquet file says: its columns and its class names."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from raytvb.errors import UserError, listed, shortened
from raytvb.experiment.sections.tasks import TaskConfig

IMAGE_COLUMN, LABEL_COLUMN = "image", "label"
"""Names of the columns if the task gives none."""

USUAL_IMAGES = ("img", "jpg", "jpeg", "png", "webp", "image_bytes", "pixel_values", "images")
USUAL_LABELS = ("labels", "fine_label", "cls", "target", "class", "category", "class_label")
"""Other names that data sets use, which are found without being given."""


@dataclass(frozen=True)
class Columns:
    """The names of the columns that are read."""

    image: str
    label: str


@dataclass(frozen=True)
class Header:
    """What the header of a file says."""

    key: str
    rows: int
    columns: Columns
    names: tuple[str, ...] | None
    """Class names by label; None if the file has none."""
    has_texts: bool
    """Whether the labels are texts."""


def read_header(task: TaskConfig, key: str, schema: pa.Schema, rows: int, place: str) -> Header:
    """The header of a file.

    place: task and file, for messages. Raises UserError for a missing column or one that is there
    twice, for columns that hold neither images nor labels, and for unusable class names, unless the
    task gives names.
    """
    columns = Columns(
        _column(schema, task.image_column, IMAGE_COLUMN, USUAL_IMAGES, "image", place),
        _column(schema, task.label_column, LABEL_COLUMN, USUAL_LABELS, "label", place),
    )
    _check_images(schema.field(columns.image).type, columns.image, place)
    has_texts = _check_labels(schema.field(columns.label).type, columns.label, place)
    try:
        names = _names(schema.metadata or {}, columns.label, place)
    except UserError:
        if task.classes is None:
            raise
        names = None  # those of the task replace them
    return Header(key, rows, columns, names, has_texts)


def _column(
    schema: pa.Schema, given: str, default: str, usual: Sequence[str], kind: str, place: str
) -> str:
    """The name of the column of images or labels: the given one, or a usual one in its place."""
    names = Counter(schema.names)
    found = [given] if given in names else []
    if not found and given == default:
        found = [name for name in usual if name in names]
    if len(found) > 1:
        raise UserError(
            f"{place} has several columns that may be the {kind}s ({', '.join(found)}): name one, "
            f"as in `{kind}_column: {found[0]}` of the task"
        )
    if not found:
        raise UserError(
            f"{place} has no column {given}; it has {listed(names, 20) or 'no columns'}: say which "
            f"holds the {kind}s with `{kind}_column: NAME` of the task"
        )
    if names[found[0]] > 1:
        raise UserError(
            f"{place} has {names[found[0]]} columns that are called {found[0]}: write the file "
            f"again with one name for each column"
        )
    return found[0]


def _check_images(kind: pa.DataType, column: str, place: str) -> None:
    """Raise UserError unless a column of this type can hold encoded images."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_struct(kind):
        if kind.get_field_index("bytes") >= 0:
            return
    elif _is_binary(kind) or pa.types.is_null(kind):
        return
    if pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
        raise UserError(
            f"{place}: column {column} holds only the paths of images: write the bytes of the "
            f"files into it (field `bytes`), or use the folder of the images as `data:`"
        )
    raise UserError(
        f"{place}: column {column} holds {kind!s:.80}, not encoded images (bytes, or a struct with "
        f"the field `bytes`): name the column of the images with `image_column: NAME` of the task, "
        f"or write the bytes of JPEG or PNG files into it"
    )


def _is_binary(kind: pa.DataType) -> bool:
    names = ("is_binary", "is_large_binary", "is_fixed_size_binary", "is_binary_view")
    return any(getattr(pa.types, name)(kind) for name in names if hasattr(pa.types, name))


def _check_labels(kind: pa.DataType, column: str, place: str) -> bool:
    """Whether a column of this type holds texts. Raises UserError for other types than integers
    and texts.
    """
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    texts = ("is_string", "is_large_string", "is_string_view")
    if any(getattr(pa.types, name)(kind) for name in texts if hasattr(pa.types, name)):
        return True
    if pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return False
    raise UserError(
        f"{place}: column {column} holds {kind!s:.80}, and labels are integers or names of "
        f"classes: name the column of the labels with `label_column: NAME` of the task"
    )


def _names(metadata: dict[bytes, bytes], column: str, place: str) -> tuple[str, ...] | None:
    """The class names in the `huggingface` entry of a schema's metadata; None if there are none.

    Raises UserError for names that are no list of texts.
    """
    try:
        features = json.loads(metadata.get(b"huggingface", b"null"))["info"]["features"]
        names = features[column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if names is None:
        return None
    way_out = "give them as `classes: [...]` of the task"
    if not isinstance(names, list):
        raise UserError(
            f"{place}: its class names are {shortened(names)} in the metadata, not a list: "
            f"{way_out}"
        )
    for number, name in enumerate(names):
        if not isinstance(name, str):
            raise UserError(
                f"{place}: the name of class {number} is {shortened(name)} in the metadata, not a "
                f"text: {way_out}"
            )
    return tuple(names)
