"""The Gram matrix G = V'V of task vectors, from their files, in bounded memory.

Products are taken in float32 over 1,024 coordinates at a time and added up in float64: exact to 3e-7 of the norms. Over
65,536 it would be 7e-6, as squares of bfloat16 values round the same way again and again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike

import torch
from torch import Tensor

from raytvb.masks import BLOCK
from raytvb.vectors import VectorFile, VectorSet

_SUMMED = 1024  # coordinates that are added up in float32


def gram_matrix(paths: Sequence[str | PathLike[str]], *, block: int = BLOCK) -> Tensor:
    """G (T, T) float64 of vector files; paths are local or URLs.

    `block` coordinates of all vectors are read at a time; the default stands for as many as fill 64 MB. Memory: two
    such buffers, whatever the length and number of the vectors. Entries may differ in their last float32 bits with the
    order of the paths (those of a run's own Gram matrix do not). Raises VectorError for files that are damaged, do not
    belong together, or hold NaN or infinite values (it names file and tensor).
    """
    if isinstance(paths, (str, PathLike)):
        raise ValueError(f"gram_matrix takes a list of paths, not one: {paths}")
    vectors = VectorSet([VectorFile.open(p) for p in paths])
    gram = gram_of_blocks(len(paths), vectors.blocks(None if block == BLOCK else block))
    for index in (~torch.isfinite(gram.diagonal())).nonzero()[:, 0].tolist():
        raise vectors.files[index].complain()
    return gram


def gram_of_blocks(count: int, blocks: Iterable[tuple[int, Tensor]]) -> Tensor:
    """Sum of rows @ rows.T (count, count) float64 over blocks (start, rows (count, n) float32); exactly symmetric."""
    gram = torch.zeros(count, count, dtype=torch.float64)
    panel = min(64, 4 * -(-count // 8))  # of the symmetric product about half is computed
    for _, rows in blocks:
        for part in rows.split(BLOCK, dim=1):  # stays in the caches
            chunks = part.shape[1] // _SUMMED
            whole = part[:, :chunks * _SUMMED].unflatten(1, (chunks, _SUMMED))
            for values in (whole, part[:, None, chunks * _SUMMED:]):
                values_ctn = values.transpose(0, 1)
                for i in range(0, count, panel):
                    products = values_ctn[:, i:i + panel] @ values_ctn[:, i:].transpose(1, 2)
                    gram[i:i + panel, i:] += products.sum(dim=0, dtype=torch.float64)
    return gram.triu() + gram.triu(1).T
