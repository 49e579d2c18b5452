"""The section `model` of an experiment file."""

from __future__ import annotations

import os
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from raytvb.experiment.fields import TINY_MODEL, Frozen, Place, Words
from raytvb.storage.addresses import check_variables
from raytvb.storage.store_errors import StoreError


def _filled_in(place: str) -> str:
    """The place itself, with the path of the home for `~`.

    Raises ValueError for one with a variable that nobody has filled in.
    """
    try:
        check_variables(place)
    except StoreError as error:
        raise ValueError(str(error)) from None
    scheme, separator, path = place.rpartition("local-dir:")
    return f"{scheme}{separator}{os.path.expanduser(path)}"


ModelPlace = Annotated[
    Place, AfterValidator(_filled_in), Words("the name of a model, or a path, without line breaks")
]


class ModelConfig(Frozen):
    """The pretrained open_clip model whose image tower is fine-tuned."""

    name: ModelPlace = Field(
        TINY_MODEL,
        description=(
            f"Name of an open_clip model, hf-hub:OWNER/NAME, local-dir:PATH, or {TINY_MODEL}, the "
            f"model of the embedded suite."
        ),
    )
    pretrained: ModelPlace | None = Field(
        None,
        description=(
            "Weights: a tag of open_clip or a checkpoint file. Give it only with the name of an "
            "open_clip model; the other kinds of models bring their own weights."
        ),
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        has_weights = self.name == TINY_MODEL or self.name.startswith(("hf-hub:", "local-dir:"))
        if self.pretrained is not None and has_weights:
            raise ValueError(f"pretrained: {self.name} brings its own weights; leave this out")
        return self
