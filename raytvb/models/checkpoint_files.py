"""Checkpoint files of open_clip models, every tensor compared with the model."""

from __future__ import annotations

from math import prod

from raytvb.errors import UserError
from raytvb.experiment.training import ModelConfig
from raytvb.models.open_clip_package import open_clip_package, tag_options


def check_checkpoint(config: ModelConfig, path: str) -> None:
    """Raise UserError that lists every tensor of a checkpoint file that the model lacks, needs or
    has otherwise.

    open_clip's own check comes after it has resized position embeddings, so it would take those of
    another model.
    """
    if path.endswith((".npz", ".npy")):
        return  # open_clip converts these from another framework, name by name
    from open_clip.factory import convert_state_dict, load_state_dict

    try:
        found = load_state_dict(path)
        model = open_clip_package().create_model(
            config.name, load_weights=False, **tag_options(config)
        )
        found = {n: tuple(t.shape) for n, t in convert_state_dict(model, found).items()}
    except Exception as error:  # what unpickling, safetensors and conversion raise for other files
        kind = type(error).__name__
        reason = (
            "it holds other Python objects"
            if kind == "UnpicklingError"
            else f"{kind}: {error}".splitlines()[0]
        )
        raise UserError(
            f"model.pretrained: {path} cannot be read as a checkpoint: {reason}. Save the model's "
            f"state_dict alone, best as safetensors; nothing else is unpickled"
        ) from error
    if "positional_embedding" in found and not hasattr(model, "positional_embedding"):
        return  # the text tower is named otherwise in older files; open_clip renames it
    expected = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    optional = {"logit_bias"} | {n for n in found if n.endswith("position_ids")}
    scalars = {
        n for n in found.keys() & expected.keys() if prod(found[n]) == prod(expected[n]) == 1
    }
    lines = [
        f"missing: {', '.join(sorted(expected.keys() - found.keys() - optional))}",
        f"not in the model: {', '.join(sorted(found.keys() - expected.keys() - optional))}",
        "of another shape: "
        + ", ".join(
            f"{n} {found[n]} instead of {expected[n]}"
            for n in sorted(found.keys() & expected.keys() - scalars)
            if found[n] != expected[n]
        ),
    ]
    lines = [line for line in lines if not line.endswith(": ")]
    if lines:
        raise UserError(
            f"model.pretrained: {path} is no checkpoint of {config.name}\n  " + "\n  ".join(lines)
        )
