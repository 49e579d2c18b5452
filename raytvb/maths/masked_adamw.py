"""AdamW that trains only the entries that a mask keeps.

The optimizer sees one flat float32 parameter with the K kept values, so torch's own fused AdamW
does the arithmetic. This module only gathers gradients and scatters values back. Values, two
moments and positions take 16 bytes for a kept entry; a dense AdamW takes 8 bytes for every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from raytvb.maths.flat_parameters import FlatParameters


class MaskedAdamW:
    """AdamW with decoupled weight decay on the entries that a mask keeps; others are never written.

    It equals `torch.optim.AdamW` on a model that has only the kept entries. Tensors without kept
    entries get `requires_grad = False`, so autograd skips them. Clipping and weight decay look at
    the kept entries alone.

    As soon as the backward pass has a parameter's gradient, its kept entries are added to the flat
    gradient, and the parameter's own gradient is freed. Several backward passes before a step add
    up.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        mask: Mapping[str, Tensor],
        *,
        lr: float,
        weight_decay: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        """mask: a bool tensor for every parameter. Kept entries start from their present values.

        Raises ValueError where mask and parameters have different names.
        """
        if parameters.keys() != mask.keys():
            raise ValueError(
                f"mask and parameters differ in {sorted(parameters.keys() ^ mask.keys())}"
            )
        flat = FlatParameters(parameters, mask)
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for entries in flat.entries:
            entries.parameter.requires_grad_(True)
        self._flat = flat
        self.values = nn.Parameter(flat.gather())
        self.values.grad = torch.empty_like(self.values)
        self._gradients = flat.split(self.values.grad)
        # Whether a gradient of the parameter was taken since the last step.
        self._filled = [False] * len(flat.entries)
        self._hooks = []
        for number, entries in enumerate(flat.entries):
            hook = partial(self._take, number)
            self._hooks.append(entries.parameter.register_post_accumulate_grad_hook(hook))
        self._optimizer = torch.optim.AdamW(
            [self.values], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True
        )

    def close(self) -> None:
        """Remove the hooks: from now on the parameters keep their gradients."""
        for hook in self._hooks:
            hook.remove()

    def take_gradients(self) -> None:
        """Take the gradients that were put into `.grad` by hand rather than by a backward pass."""
        for number, entries in enumerate(self._flat.entries):
            if entries.parameter.grad is not None:
                self._take(number, entries.parameter)

    @property
    def state_bytes(self) -> int:
        """Bytes held for the kept entries: values, positions and, after a step, moments."""
        held = [self.values, *self._optimizer.state[self.values].values()]
        held += [e.indices for e in self._flat.entries if e.indices is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on, as CPU tensors.

        These are the kept values (K,), AdamW's moments (K,) and its number of steps.
        """
        tensors = {"values": self.values.detach(), **self._optimizer.state[self.values]}
        return {name: tensor.cpu().clone() for name, tensor in tensors.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned. Its values are written into the parameters too.

        Raises ValueError where the state is of a mask with another number of kept entries.
        """
        if state["values"].shape != self.values.shape:
            raise ValueError(
                f"{len(state['values'])} kept entries in the state, {len(self.values)} in the mask"
            )
        with torch.no_grad():
            self.values.copy_(state["values"])
        moments = {n: t.clone() for n, t in state.items() if n != "values"}
        self._optimizer.load_state_dict(
            {"state": {0: moments}, "param_groups": self._optimizer.state_dict()["param_groups"]}
        )
        self._flat.scatter(self.values.detach())

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None) -> float:
        """One update from the gradients of all backward passes since the last update.

        clip: the largest norm of the kept gradients; a larger norm is scaled down to it. Returns
        the norm before clipping. If it is not finite, nothing is updated.
        """
        gradient = self.values.grad
        assert gradient is not None
        for number, part in enumerate(self._gradients):
            if not self._filled[number]:  # no backward pass has reached this parameter
                part.zero_()
            self._filled[number] = False
        norm = gradient.norm()
        if torch.isfinite(norm):
            if clip is not None:
                gradient *= (clip / (norm + 1e-6)).clamp(max=1.0)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._flat.scatter(self.values.detach())
        return float(norm)

    @torch.no_grad()
    def _take(self, number: int, parameter: Tensor) -> None:
        """Add the kept entries of a parameter's gradient to their part of the flat gradient. Then
        free the parameter's gradient.

        number: position of the parameter in `FlatParameters.entries`.
        """
        assert parameter.grad is not None
        entries, part = self._flat.entries[number], self._gradients[number]
        if self._filled[number]:
            more = torch.empty_like(part)
            entries.gather(parameter.grad, more)
            part += more
        else:
            entries.gather(parameter.grad, part)
        self._filled[number], parameter.grad = True, None
