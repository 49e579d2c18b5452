"""Chosen entries of several tensors as one vector: read out, and written back in place."""

import pytest
import torch
from torch import Tensor

from raytvb.maths.flat_parameters import FlatParameters

SHAPES = {"b.weight": (4, 3), "a": (5,), "c": (2, 2, 2), "B": ()}


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in SHAPES.items()}


def mask(density: float) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    chosen = {n: torch.rand(s, generator=generator) < density for n, s in SHAPES.items()}
    chosen["a"][:] = False  # nothing of one tensor, all of another
    chosen["c"][:] = True
    return chosen


def chosen_entries(tensors: dict[str, Tensor], mask: dict[str, Tensor] | None) -> Tensor:
    """The reference: entries by boolean indexing, names sorted."""
    parts = []
    for name in sorted(tensors):
        parts.append(tensors[name].reshape(-1) if mask is None else tensors[name][mask[name]])
    return torch.cat(parts)


@pytest.mark.parametrize("chosen", [None, mask(0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_the_chosen_entries_in_the_order_of_names(
    chosen: dict[str, Tensor] | None, dtype: torch.dtype
) -> None:
    tensors = parameters(dtype)
    flat = FlatParameters(tensors, chosen)
    expected = chosen_entries(tensors, chosen).float()
    assert flat.count == len(expected) and torch.equal(flat.gather(), expected)
    assert [len(part) for part in flat.split(expected)] == flat.sizes
    assert min(flat.sizes) > 0  # a tensor without chosen entries has no part


@pytest.mark.parametrize("chosen", [None, mask(0.5)])
def test_scattering_changes_the_chosen_entries_in_place_and_no_other(
    chosen: dict[str, Tensor] | None,
) -> None:
    tensors, before = parameters(), parameters()
    tensors["b.weight"].requires_grad_(True)  # as a parameter of a model
    values = torch.arange(float(FlatParameters(tensors, chosen).count))
    FlatParameters(tensors, chosen).scatter(values)
    assert torch.equal(chosen_entries(tensors, chosen).detach(), values)
    if chosen is not None:
        others = {name: ~kept for name, kept in chosen.items()}
        assert torch.equal(chosen_entries(tensors, others).detach(), chosen_entries(before, others))
    FlatParameters(tensors, chosen).scatter(chosen_entries(before, chosen))
    assert all(torch.equal(tensors[name], before[name]) for name in SHAPES)


def test_a_vector_of_another_length_is_an_error() -> None:
    flat = FlatParameters(parameters())
    with pytest.raises(RuntimeError):
        flat.scatter(torch.zeros(flat.count + 1))


def test_nothing_chosen_is_an_empty_vector() -> None:
    flat = FlatParameters({"a": torch.ones(3)}, {"a": torch.zeros(3, dtype=torch.bool)})
    assert flat.count == 0 and flat.entries == [] and len(flat.gather()) == 0
