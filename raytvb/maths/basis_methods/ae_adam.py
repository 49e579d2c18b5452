"""The autoencoder as its authors train it, for comparison with `ae`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from raytvb.maths.basis_registry import basis_method

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from raytvb.maths.gram_factor import GramFactor

STEPS = 2000
RATE = 0.02


@basis_method(
    "ae-adam",
    summary="the authors' autoencoder, trained by Adam: for comparison with ae",
    cost="O(T²·M) for each of 2000 steps",
    convex=True,
)
def ae_adam(vectors: GramFactor, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Joint Adam on the logits of B and on W, as in Zeng et al. (arXiv 2502.01015).

    Here it runs on the Gram matrix divided by its trace. The authors' code does not divide by the
    trace, and collapses on small vectors.
    """
    import torch

    F_RT = vectors.F_RT
    tasks = F_RT.shape[1]
    logits_TM = torch.randn(tasks, size, dtype=torch.float64, generator=generator)
    logits_TM.requires_grad_()
    W_MT = torch.randn(size, tasks, dtype=torch.float64, generator=generator) / size
    W_MT.requires_grad_()
    optimizer = torch.optim.Adam([logits_TM, W_MT], lr=RATE)
    with torch.enable_grad():
        for _ in range(STEPS):
            loss = (F_RT @ logits_TM.softmax(0) @ W_MT - F_RT).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return logits_TM.detach().softmax(0), W_MT.detach()
