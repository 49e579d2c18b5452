"""The Gram matrix from blocks of vectors.

Products are taken in float32 over 1,024 coordinates at a time and added up in float64: exact to
3e-7 of the norms. Over 65,536 it would be 7e-6, as squares of bfloat16 values round the same way
again and again."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

_SUMMED = 1024  # coordinates that are added up in float32


def gram_of_blocks(count: int, blocks: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Sum of rows @ rows.T (count, count) float64 over blocks (start, rows (count, n) float32);
    exactly symmetric.
    """
    gram = torch.zeros(count, count, dtype=torch.float64)
    panel = min(64, 4 * -(-count // 8))  # of the symmetric product about half is computed
    for _, rows in blocks:
        for part in rows.split(BLOCK, dim=1):  # stays in the caches
            chunks = part.shape[1] // _SUMMED
            whole = part[:, : chunks * _SUMMED].unflatten(1, (chunks, _SUMMED))
            for values in (whole, part[:, None, chunks * _SUMMED :]):
                values_ctn = values.transpose(0, 1)
                for i in range(0, count, panel):
                    products = values_ctn[:, i : i + panel] @ values_ctn[:, i:].transpose(1, 2)
                    gram[i : i + panel, i:] += products.sum(dim=0, dtype=torch.float64)
    return gram.triu() + gram.triu(1).T


def grown(gram: Tensor, rows: Tensor) -> Tensor:
    """A Gram matrix (T, T) with the rows (new, T + new) of vectors that came to it."""
    before, total = len(gram), rows.shape[1]
    larger = torch.zeros(total, total, dtype=torch.float64)
    larger[:before, :before] = gram
    larger[before:], larger[:, before:] = rows, rows.T
    return larger


BLOCK = 65536  # coordinates; divides evenly into bytes of a packed mask
