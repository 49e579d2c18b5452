"""The Gram matrix from blocks of vectors.

Products are summed in float32 over 1,024 coordinates at a time, and these sums are added in
float64. The result is exact to 3e-7 of the norms. Float32 sums over 65,536 coordinates would have
an error of 7e-6, because squares of bfloat16 values round the same way again and again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 65536
"""Number of coordinates of a block. It is a multiple of 8, the coordinates in a byte of a packed
mask.
"""

_SUMMED = 1024
"""Number of coordinates whose products are summed in float32."""


def gram_of_blocks(count: int, blocks: Iterable[tuple[int, Tensor]]) -> Tensor:
    """The Gram matrix (count, count) float64, exactly symmetric: the sum of rows @ rows.T.

    blocks: (start, rows), with rows (count, n) float32 the vectors' coordinates from `start` on.
    """
    gram = torch.zeros(count, count, dtype=torch.float64)
    panel = min(64, 4 * -(-count // 8))  # about half of the symmetric product is computed
    for _, rows in blocks:
        for part in rows.split(BLOCK, dim=1):  # a part stays in the processor's caches
            chunks = part.shape[1] // _SUMMED
            whole = part[:, : chunks * _SUMMED].unflatten(1, (chunks, _SUMMED))
            for values in (whole, part[:, None, chunks * _SUMMED :]):
                values_ctn = values.transpose(0, 1)
                for i in range(0, count, panel):
                    products = values_ctn[:, i : i + panel] @ values_ctn[:, i:].transpose(1, 2)
                    gram[i : i + panel, i:] += products.sum(dim=0, dtype=torch.float64)
    return gram.triu() + gram.triu(1).T


def grown(gram: Tensor, rows: Tensor) -> Tensor:
    """The Gram matrix (T + new, T + new) float64 after new vectors have been added.

    gram: (T, T). rows: (new, T + new), the inner products of the new vectors with all vectors.
    """
    before, total = len(gram), rows.shape[1]
    larger = torch.zeros(total, total, dtype=torch.float64)
    larger[:before, :before] = gram
    larger[before:], larger[:, before:] = rows, rows.T
    return larger
