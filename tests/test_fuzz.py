"""Files of users, changed at random: each is read, or refused by name within seconds and within a
bounded memory. Nothing else may happen.
"""

from __future__ import annotations

import datetime
import io
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hostile_files import ODD, YAMLS, altered_bytes, altered_tensor_file, altered_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from test_input_images import AS_THEY_ARE, animated, encoded, picture, turned

from raytvb.data.census import take_census
from raytvb.data.decoding import AS_USUAL, decoded_rows, inspected_rows
from raytvb.data.image_source import Row
from raytvb.data.opening import Unreadable
from raytvb.errors import UserError
from raytvb.experiment.config import Experiment
from raytvb.experiment.parsing import load_experiment
from raytvb.experiment.sections.model import ModelConfig
from raytvb.experiment.sections.tasks import TaskConfig
from raytvb.models.pretrained_files import check_checkpoint
from raytvb.storage.store_errors import StoreError

pytestmark = pytest.mark.fuzz

REFUSED = (UserError, StoreError)

FUZZ = settings(
    derandomize=True,
    database=None,
    deadline=datetime.timedelta(seconds=20),
    suppress_health_check=list(HealthCheck),
)

FORMS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO", "PCX")
IMAGES = [encoded(picture(side=24), form) for form in FORMS]
IMAGES += [animated("GIF"), animated("WEBP"), animated("PNG"), turned(6)]
IMAGES += [encoded(picture(side=24).convert("P"), "GIF"), encoded(picture().convert("RGBA"))]


@pytest.mark.parametrize(
    "image", IMAGES, ids=[*FORMS, "GIFs", "WEBPs", "PNGs", "EXIF", "P", "RGBA"]
)
@settings(FUZZ, max_examples=120)
@given(data=st.data())
def test_images(image: bytes, data: st.DataObject) -> None:
    changed = data.draw(altered_bytes(image))
    rows = [Row("image", changed, 0)] * 2
    for _, seen in decoded_rows(iter(rows), AS_THEY_ARE, 1):
        if isinstance(seen, Unreadable):
            assert seen.reason and seen.kind
        else:
            assert seen.shape == (3, 8, 8) and seen.dtype == np.uint8
    for _, inspected in inspected_rows(iter(rows), 1, AS_USUAL):
        assert isinstance(inspected, Unreadable) or len(inspected.digest) == 16


def table_bytes() -> bytes:
    """A Parquet file with four images of two classes, which are named in the metadata."""
    images = [{"bytes": encoded(picture(seed)), "path": "image.png"} for seed in range(4)]
    names = b'{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}'
    table = pa.table({"image": images, "label": [0, 1, 0, 1]})
    buffer = io.BytesIO()
    pq.write_table(table.replace_schema_metadata({"huggingface": names}), buffer)
    return buffer.getvalue()


TABLE = table_bytes()


@settings(FUZZ, max_examples=250)
@given(data=st.data())
def test_parquet(data: st.DataObject) -> None:
    changed = data.draw(altered_bytes(TABLE))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train-00000-of-00001.parquet").write_bytes(changed)
        (Path(folder) / "test-00000-of-00001.parquet").write_bytes(TABLE)
        task = TaskConfig(name="own", data=folder)
        try:
            census = take_census(task, AS_USUAL, 1)
        except OSError as error:
            assert "train-00000-of-00001.parquet" in str(error)  # worth another try
        except REFUSED as error:
            assert "own" in str(error)
        else:
            assert census.count("test") == 4 and list(census.classes) == ["cat", "dog"]


@settings(FUZZ, max_examples=60)
@given(names=st.one_of(st.sampled_from(ODD), st.lists(st.sampled_from(ODD), max_size=4)))
def test_class_names_of_any_kind(names: Any) -> None:
    metadata = {"info": {"features": {"label": {"names": names}}}}
    try:
        text = json.dumps(metadata).encode()
    except UnicodeEncodeError:
        return
    table = pa.table({"image": [encoded(picture(seed)) for seed in range(2)], "label": [0, 1]})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": text}), path)
        try:
            census = take_census(TaskConfig(name="own", data=folder), AS_USUAL, 1)
        except UserError as error:
            assert "train.parquet" in str(error) or folder in str(error)
        else:
            assert list(census.classes) == names


EXPERIMENT = yaml.safe_dump(
    {
        "store": "/tmp/store",
        "tasks": [{"name": "own", "data": "/data", "classes": ["cat", "dog"]}, "glyphs/greek-blur"],
        "talos": {"density": 0.1, "mask": "shared"},
        "finetune": {"epochs": 2, "lr": 0.001},
        "search": {"sizes": [1, 2]},
        "evaluate": {"additions": [["own", "glyphs/greek-blur"]]},
    }
)


def load(text: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "experiment.yaml"
        path.write_bytes(text)
        try:
            experiment = load_experiment(path)
        except UserError as error:
            assert str(path) in str(error) and len(str(error)) < 20_000
            assert "Input should" not in str(error) and "pydantic" not in str(error)
        else:
            assert isinstance(experiment, Experiment)


@settings(FUZZ, max_examples=150)
@given(data=st.data())
def test_yaml_with_other_fields_or_bytes(data: st.DataObject) -> None:
    load(data.draw(altered_yaml(EXPERIMENT.encode())))


@settings(FUZZ, max_examples=40)
@given(text=st.sampled_from(YAMLS))
def test_yaml_that_is_no_experiment(text: bytes) -> None:
    load(text)


FIELDS = [*Experiment.model_fields, "unknown", 1, None]


@settings(FUZZ, max_examples=200)
@given(
    section=st.sampled_from(FIELDS),
    field=st.sampled_from(["name", "seed", "epochs", "sizes", "method", "preset", "lr", "data"]),
    value=st.sampled_from(ODD),
    is_nested=st.booleans(),
)
def test_fields_with_odd_values(section: Any, field: str, value: Any, is_nested: bool) -> None:
    values = yaml.safe_load(EXPERIMENT)
    values[section] = {field: value} if is_nested else value
    try:
        text = yaml.safe_dump(values).encode()
    except (RecursionError, UnicodeEncodeError):
        return
    load(text)


CHECKPOINT = save({"visual.proj": np.ones((4, 4), dtype=np.float32)})


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_checkpoints(data: st.DataObject) -> None:
    changed = data.draw(altered_tensor_file(CHECKPOINT))
    config = ModelConfig(name="RN50", pretrained="given by a file")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(changed)
        with pytest.raises(UserError) as raised:  # it never is a whole model
            check_checkpoint(config, str(path))
    assert str(path) in str(raised.value) and str(raised.value).count("\n") < 20
