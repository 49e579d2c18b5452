"""The section `data` of an experiment file: how images are read, for all tasks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from raytvb.experiment.fields import Frozen, Whole
from raytvb.storage.contract import JsonObject


class DataConfig(Frozen):
    """How images are read. `docs/data.md` says what is done with each image."""

    leaks: Literal["warn", "error", "ignore"] = Field(
        "warn",
        description=(
            "What to do about images that are in test and also in train or val: warn; error, which "
            "refuses the task; or ignore, which does not look for them. Looking for them decodes "
            "every image once before the run."
        ),
    )
    max_pixels: Whole = Field(
        50_000_000,
        ge=1,
        le=178_956_970,
        description=(
            "Width times height up to which an image is decoded. A larger one counts as "
            "unreadable. Decoding takes up to 12 bytes a pixel. The largest value is Pillow's own."
        ),
    )
    transparency: Literal["drop", "white"] = Field(
        "drop",
        description=(
            "Transparent pixels. drop: take their colours as they are, as open_clip does. white: "
            "put the image on a white background."
        ),
    )

    def identity(self) -> JsonObject:
        """What changes pixels, or which images are used; {} for the defaults.

        Stores that were made before these fields existed have no such part.
        """
        return self.model_dump(mode="json", exclude={"leaks"}, exclude_defaults=True)
