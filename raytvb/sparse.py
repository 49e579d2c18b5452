"""Training the kept entries of a mask only, and packing masks to one bit a parameter.

The optimizer sees one flat float32 parameter with the K kept values, so torch's own fused AdamW does the arithmetic
and its state is 8 bytes a kept entry; what is ours is gathering gradients and scattering values back.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn


def pack_bits(mask: Tensor) -> Tensor:
    """Bool (D,) to uint8 (ceil(D/8),): entry i is bit i % 8, lowest first, of byte i // 8; the rest is zero."""
    return torch.from_numpy(np.packbits(mask.cpu().numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Inverse of `pack_bits`: the first `count` bits as bool (count,)."""
    return torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=count, bitorder="little").view(np.bool_))


class MaskedAdamW:
    """AdamW with decoupled weight decay on the entries a mask keeps; every other entry is never written to.

    Equal to `torch.optim.AdamW` on a model that has only the kept entries. Tensors without kept entries get
    `requires_grad = False`, so autograd skips them. Clipping, like weight decay, looks at the kept entries alone.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor], *, lr: float,
                 weight_decay: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> None:
        """`mask` has a bool tensor for every parameter; its kept entries are trained from their current values."""
        if parameters.keys() != mask.keys():
            raise ValueError(f"mask and parameters differ in {sorted(parameters.keys() ^ mask.keys())}")
        self._entries: list[tuple[nn.Parameter, Tensor]] = []
        for name in sorted(parameters):
            parameter = parameters[name]
            indices = mask[name].to(parameter.device).reshape(-1).nonzero()[:, 0]
            parameter.requires_grad_(len(indices) > 0)
            if len(indices):
                self._entries.append((parameter, indices))
        self.values = nn.Parameter(torch.cat([p.detach().reshape(-1)[i].float() for p, i in self._entries]))
        self._optimizer = torch.optim.AdamW([self.values], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps,
                                            fused=True)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, as CPU tensors: kept values (K,), AdamW's moments (K,) and step count."""
        found = {"values": self.values.detach(), **self._optimizer.state[self.values]}
        return {name: tensor.cpu().clone() for name, tensor in found.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of the same mask, parameters included. Raises ValueError where it has another size."""
        if state["values"].shape != self.values.shape:
            raise ValueError(f"{len(state['values'])} kept entries in the state, {len(self.values)} in the mask")
        with torch.no_grad():
            self.values.copy_(state["values"])
        moments = {n: t.clone() for n, t in state.items() if n != "values"}
        self._optimizer.load_state_dict({"state": {0: moments}, "param_groups":
                                         self._optimizer.state_dict()["param_groups"]})
        self._scatter()

    @torch.no_grad()
    def _scatter(self) -> None:
        """Write the kept values into the parameters."""
        sizes = [len(i) for _, i in self._entries]
        for (parameter, indices), values in zip(self._entries, self.values.split(sizes), strict=True):
            parameter.view(-1)[indices] = values.to(parameter.dtype)

    def step(self, lr: float, clip: float | None = None) -> float:
        """One update from the parameters' gradients, which it then frees. Returns the norm of the kept gradients."""
        gradients = [torch.zeros_like(i, dtype=torch.float32) if p.grad is None else p.grad.reshape(-1)[i].float()
                     for p, i in self._entries]  # None: the forward pass did not use this one
        self.values.grad = torch.cat(gradients)
        norm = self.values.grad.norm()
        if clip is not None:
            self.values.grad *= (clip / (norm + 1e-6)).clamp(max=1.0)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._scatter()
        for parameter, _ in self._entries:
            parameter.grad = None
        return float(norm)
