"""The Gram matrix of vector files, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import torch
from torch import Tensor

from raytvb.maths.gram_blocks import BLOCK, gram_of_blocks
from raytvb.storage.vector_set import VectorSet
from raytvb.storage.vectors import VectorFile


def gram_matrix(paths: Sequence[str | PathLike[str]], *, block: int = BLOCK) -> Tensor:
    """G (T, T) float64 of vector files; paths are local or URLs.

    block: number of coordinates of all vectors that are read at a time. The default stands for as
    many as fill 64 MB. Memory: two such buffers, whatever the length and number of the vectors.
    Entries may differ in their last float32 bits with the order of the paths. (The Gram matrix of
    an experiment does not depend on the order.)

    Raises VectorError for files that are damaged, do not belong together, or hold NaN or infinite
    values (the message names file and tensor), and ValueError for a path that is not in a list.
    """
    if isinstance(paths, (str, PathLike)):
        raise ValueError(f"gram_matrix takes a list of paths, not one: {paths}")
    vectors = VectorSet([VectorFile.open(p) for p in paths])
    gram = gram_of_blocks(len(paths), vectors.blocks(None if block == BLOCK else block))
    for index in (~torch.isfinite(gram.diagonal())).nonzero()[:, 0].tolist():
        raise vectors.files[index].complain()
    return gram
