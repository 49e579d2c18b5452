"""Reads the tensors of a checkpoint file, and refuses tensors that are no plain weights.

A file is read twice. First come the names, shapes and dtypes, without the values: `describe`. When
they fit the model, the values follow: `read_values`. So a file that does not fit is refused within
moments, however large it is, and no code in a file is ever run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raytvb.errors import UserError, listed
from raytvb.models.file_kinds import (
    LEGACY,
    NUMPY,
    SAFETENSORS,
    SAVE,
    TORCH,
    check_sums,
    file_kind,
    is_compressed,
    record_sizes,
    unusable,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes of weights. Others are quantised, and mean nothing without their scales."""

_WHOLE = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
_COUNTERS = ("position_ids", "num_batches_tracked")
"""Ends of the names of tensors that hold whole numbers in a model that is not quantised."""

_WRAPPERS = (
    *("state_dict", "model", "model_state_dict", "module", "net", "network", "clip"),
    *("ema", "model_ema", "state_dict_ema", "ema_state_dict"),
)
"""Names under which training programs store the weights, beside their own state."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "clip_model.")
"""What programs put before all names."""

OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""Three numbers that only OpenAI's own files have among the weights."""


def describe(path: str) -> dict[str, Tensor]:
    """The tensors of a file by name, without wrappers and prefixes. Values may be missing.

    Tensors of a safetensors file are on the device "meta"; the others are mapped into memory, which
    reads no values. Raises UserError for a file that is no checkpoint, for one that holds other
    Python objects, and for tensors that are no weights, by name.
    """
    kind = file_kind(path)
    if kind == NUMPY:
        raise unusable(path, "it is a NumPy archive", "only SigLIP's archives of NumPy are read")
    if kind == SAFETENSORS:
        tensors = _described_safetensors(path)
    else:
        tensors = unwrapped(_loaded(path, kind, mapped=kind == TORCH), path)
        _check_strided(tensors, path)
        _check_views(tensors, path)
        if kind == TORCH:
            _check_records(tensors, path)
    _check_dtypes(tensors, path)
    return tensors


def read_values(path: str) -> dict[str, Tensor]:
    """The same tensors with their values, on the CPU. Tied names share a tensor.

    Call it for a file that `describe` accepts. Raises UserError for a file that is damaged.
    """
    kind = file_kind(path)
    if kind == SAFETENSORS:
        from safetensors.torch import load_file

        try:
            tensors = load_file(path)
        except Exception as error:  # of Rust and of the operating system
            raise _damaged(path) from error
        tensors |= {name: tensors[kept] for name, kept in _ties(path).items() if kept in tensors}
        return without_prefix(tensors)
    if kind == TORCH:
        check_sums(path)
    return unwrapped(_loaded(path, kind, mapped=False), path)


# safetensors --------------------------------------------------------------------------------------


def _described_safetensors(path: str) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    from safetensors import safe_open

    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise _not_weights(path, name, part.get_dtype())
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except UserError:
        raise
    except Exception as error:  # of Rust, and of torch for shapes that no tensor has
        raise _damaged(path) from error
    tensors |= {name: tensors[kept] for name, kept in _ties(path).items() if kept in tensors}
    if not tensors:
        raise unusable(path, "it holds no tensors", SAVE)
    return without_prefix(tensors)


_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}


def _ties(path: str) -> dict[str, str]:
    """Names that share a tensor with another name, by the convention of `save_model`.

    The metadata of a file has the names that were left out, each with the name of its tensor.
    """
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        metadata = file.metadata() or {}
    return {name: kept for name, kept in metadata.items() if kept in names and name not in names}


def tied_apart(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors without those that are tied to an earlier one, and the names of those left out.

    The second result gives each name that was left out the name of its tensor, as `save_model` of
    safetensors does. Raises UserError that names tensors that overlap without being equal.
    """
    kept: dict[tuple[Any, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    for name in sorted(state):
        tensor = state[name]
        place = _place(tensor)
        if tensor.numel() and place in kept:
            ties[name] = kept[place]
        else:
            kept[place] = name
            tensors[name] = tensor
    _check_views(tensors, "the model")
    return tensors, ties


# PyTorch ------------------------------------------------------------------------------------------


def _loaded(path: str, kind: str, *, mapped: bool) -> Any:
    """What a file of torch.save holds: tensors and plain containers only, never code.

    open_clip takes the entry `state_dict` out if there is one. mapped: the values are read from the
    disk when they are used, and not now.
    """
    from open_clip.factory import load_state_dict
    from torch.utils import serialization

    reading: Any = serialization.config
    if path.endswith(".safetensors"):
        raise unusable(path, "it is a file of torch.save", "rename it to end in .pt")
    try:
        with reading.patch("load.mmap", mapped and not is_compressed(path)):
            return load_state_dict(path)
    except (AttributeError, StopIteration) as error:
        raise unusable(path, "it holds no tensors by name", SAVE) from error
    # Unpickling raises errors of many kinds for files that are none.
    except Exception as error:
        if type(error).__name__ == "UnpicklingError" or kind == LEGACY:
            raise unusable(
                path,
                "it holds other Python objects than tensors, or is damaged",
                f"{SAVE}; nothing else is unpickled",
            ) from error
        raise _damaged(path) from error


def unwrapped(content: Any, path: str) -> dict[str, Tensor]:
    """The tensors by name, taken out of the dictionaries that training programs put around them.

    Raises UserError for a dictionary with other things, or with weights under several names.
    """
    for _ in range(4):
        if not isinstance(content, Mapping) or not content:
            raise unusable(path, "it holds no tensors by name", SAVE)
        if all(isinstance(value, Tensor) for value in content.values()):
            break
        content = _inner(content, path)
    others = [key for key in content if not isinstance(content[key], Tensor)]
    others += [key for key in content if not isinstance(key, str)]
    if others:
        raise unusable(path, f"beside tensors it holds {listed(others, 5)}", SAVE)
    return without_prefix(content)


def _inner(content: Mapping[Any, Any], path: str) -> Any:
    """What stands under the one name for weights that a dictionary has."""
    # open_clip cuts off "module", also where it is the whole name.
    names = [name for name in (*_WRAPPERS, "") if isinstance(content.get(name), Mapping)]
    if "state_dict" in names:
        return content["state_dict"]
    if "" in content and not names:
        raise unusable(path, "its weights stand under the name `module`", SAVE)
    if len(names) > 1:
        raise unusable(path, f"it holds several sets of weights: {listed(names)}", SAVE)
    if not names:
        others = [key for key in content if not isinstance(content[key], Tensor)]
        raise unusable(path, f"beside tensors it holds {listed(others, 5)}", SAVE)
    return content[names[0]]


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before all names, such as `module.`."""
    found = dict(tensors)
    prefix = _common_prefix(found)
    while prefix:
        found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
        prefix = _common_prefix(found)
    return found


def _common_prefix(tensors: Mapping[str, Tensor]) -> str:
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) and name != prefix for name in tensors):
            return prefix
    return ""


# Checks -------------------------------------------------------------------------------------------


def _check_strided(tensors: Mapping[str, Tensor], path: str) -> None:
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = tensor.dtype if tensor.is_quantized else tensor.layout
            raise _not_weights(path, name, str(kind).removeprefix("torch."))
        if tensor.is_meta:
            raise unusable(path, f"{name:.200} has no values", SAVE)


def _check_dtypes(tensors: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError that names the tensors of a dtype that no weight has."""
    bad: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        counts = name.endswith(_COUNTERS) or name in OPENAI_NUMBERS
        if tensor.dtype not in (*FLOATS, *(_WHOLE if counts else ())):
            bad.setdefault(str(tensor.dtype).removeprefix("torch."), []).append(name)
    if bad:
        dtype, names = next(iter(bad.items()))
        raise _not_weights(path, listed(names, 3), dtype)


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where the values of a tensor lie. Tensors of one place and shape are tied."""
    return (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def _check_views(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError that names tensors that overlap without being equal.

    Equal ones are tied, and parts of a buffer that lie one after the other are as good as others.
    """
    spans: list[tuple[int, int, str]] = []
    for name, tensor in tensors.items():
        if not tensor.numel():
            continue
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        if tensor.numel() > extent:
            raise _overlapping(where, f"several values of {name:.200} share a place in memory")
        begin = tensor.data_ptr()
        spans.append((begin, begin + extent * tensor.element_size(), name))
    last, stop = "", 0
    for begin, end, name in sorted(spans):
        if begin < stop and not _same_values(tensors[name], tensors[last]):
            raise _overlapping(where, f"{last:.200} and {name:.200} share a part of their values")
        if end > stop:
            last, stop = name, end


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Whether tensors that overlap have the same values in the same order."""
    if _place(one) == _place(other):
        return True
    equal = one.data_ptr() == other.data_ptr() and one.numel() == other.numel()
    return equal and one.is_contiguous() and other.is_contiguous() and one.dtype == other.dtype


def _check_records(tensors: Mapping[str, Tensor], path: str) -> None:
    """Raise UserError if the index of an archive describes other sizes than its entries have."""
    described: dict[int, int] = {}
    for tensor in tensors.values():
        storage = tensor.untyped_storage()
        described[storage.data_ptr()] = storage.nbytes()
    if Counter(described.values()) - Counter(record_sizes(path)):
        raise unusable(path, "its index and its values have different sizes", "copy it again")


def _overlapping(where: str, what: str) -> UserError:
    return UserError(
        f"{where} cannot be read as weights: {what}; save a copy of each tensor, as in "
        f"`{{name: tensor.clone() for name, tensor in state_dict.items()}}`"
    )


def _not_weights(path: str, names: str, dtype: str) -> UserError:
    return unusable(
        path,
        f"the dtype of {names:.400} is {dtype}",
        "weights must be plain tensors of float32, float16, bfloat16 or float64; use the "
        "checkpoint that is not quantised",
    )


def _damaged(path: str) -> UserError:
    return unusable(path, "it is damaged, or was copied in part", f"copy it again, or {SAVE}")
