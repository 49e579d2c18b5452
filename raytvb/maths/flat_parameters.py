"""Chosen entries of several parameters as one flat vector: read out, and written back in place.

Fine-tuning, evaluation, learning of coefficients and merging all hold the values of many tensors in
one vector: the entries that a mask keeps, or all entries. The vector has the tensors in the order
of their names, and the chosen entries of each tensor in rising order of position.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class ParameterEntries:
    """The chosen entries of one parameter."""

    indices: Tensor | None = None
    """Flat positions (K,) of the chosen entries, int32 if that is enough, else int64; None if all
    entries are chosen.
    """

    def __init__(self, parameter: Tensor, mask: Tensor | None = None) -> None:
        """parameter: contiguous. mask: bool of its shape; None chooses all entries."""
        self.parameter = parameter
        self.count = parameter.numel() if mask is None else int(mask.sum())
        if mask is not None and self.count < parameter.numel():
            # 4 bytes a position are enough for every tensor of an image tower.
            dtype = torch.int32 if parameter.numel() < 2**31 else torch.int64
            self.indices = mask.to(parameter.device).reshape(-1).nonzero()[:, 0].to(dtype)

    def gather(self, tensor: Tensor, out: Tensor) -> None:
        """Copy the chosen entries of a tensor of the parameter's shape into `out` (K,) float32."""
        flat = tensor.reshape(-1).float()
        if self.indices is None:
            out.copy_(flat)
        else:
            torch.index_select(flat, 0, self.indices, out=out)

    @torch.no_grad()
    def scatter(self, values: Tensor) -> None:
        """Copy `values` (K,) into the chosen entries of the parameter."""
        flat = self.parameter.view(-1)
        if self.indices is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, self.indices.long(), values.to(flat.dtype))


class FlatParameters:
    """The chosen entries of several parameters, as one vector (count,).

    Parameters without chosen entries have no part in it.
    """

    entries: list[ParameterEntries]
    """One item for each parameter that has chosen entries, in the order of the names."""
    sizes: list[int]
    """Number of chosen entries of each item of `entries`."""

    def __init__(
        self, parameters: Mapping[str, Tensor], mask: Mapping[str, Tensor] | None = None
    ) -> None:
        """mask: a bool tensor for every parameter; None chooses all entries of all parameters."""
        self.entries = []
        for name in sorted(parameters):
            entries = ParameterEntries(parameters[name], None if mask is None else mask[name])
            if entries.count:
                self.entries.append(entries)
        self.sizes = [entries.count for entries in self.entries]
        self.count = sum(self.sizes)

    def split(self, values: Tensor) -> tuple[Tensor, ...]:
        """The part (K,) of a vector (count,) that belongs to each of `entries`."""
        parts: tuple[Tensor, ...] = values.split(self.sizes)
        return parts

    @torch.no_grad()
    def gather(self) -> Tensor:
        """The present values (count,) float32, on the parameters' device."""
        device = self.entries[0].parameter.device if self.entries else None
        out = torch.empty(self.count, device=device)
        for entries, part in zip(self.entries, self.split(out), strict=True):
            entries.gather(entries.parameter, part)
        return out

    def scatter(self, values: Tensor) -> None:
        """Write a vector (count,) into the parameters, in place."""
        for entries, part in zip(self.entries, self.split(values), strict=True):
            entries.scatter(part)
