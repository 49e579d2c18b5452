"""Training the kept entries of a mask only, and packing masks to one bit a parameter.

The optimizer sees one flat float32 parameter with the K kept values, so torch's own fused AdamW
does the arithmetic; what is ours is gathering gradients and scattering values back. Values, two
moments and positions are 16 bytes a kept entry; a dense AdamW has 8 bytes for every entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn


class _Entries:
    """The kept entries of one parameter: their flat positions, or None where all are kept."""

    def __init__(self, parameter: nn.Parameter, mask: Tensor) -> None:
        self.parameter, self.indices = parameter, None
        self.count = int(mask.sum())
        self.filled = False  # a gradient has been taken since the last step
        if self.count < parameter.numel():
            # 4 bytes a position; no tensor of an image tower has 2^31 entries, but nothing would
            # break.
            dtype = torch.int32 if parameter.numel() < 2**31 else torch.int64
            self.indices = mask.to(parameter.device).reshape(-1).nonzero()[:, 0].to(dtype)

    def gather(self, tensor: Tensor, out: Tensor) -> None:
        """Kept entries of a tensor of the parameter's shape into `out` (K,) float32."""
        flat = tensor.reshape(-1).float()
        if self.indices is None:
            out.copy_(flat)
        else:
            torch.index_select(flat, 0, self.indices, out=out)

    def scatter(self, values: Tensor) -> None:
        """`values` (K,) into the kept entries of the parameter."""
        flat = self.parameter.view(-1)
        if self.indices is None:
            flat.copy_(values)
        else:
            flat.index_copy_(0, self.indices.long(), values.to(flat.dtype))


class MaskedAdamW:
    """AdamW with decoupled weight decay on the entries a mask keeps; every other entry is never
    written to.

    Equal to `torch.optim.AdamW` on a model that has only the kept entries. Tensors without kept
    entries get `requires_grad = False`, so autograd skips them. Clipping, like weight decay, looks
    at the kept entries alone.

    As soon as the backward pass has a parameter's gradient, its kept entries are added to the flat
    gradient and the whole one is freed; several backward passes before a step add up.
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
        """`mask` has a bool tensor for every parameter; its kept entries are trained from their
        current values.
        """
        if parameters.keys() != mask.keys():
            raise ValueError(
                f"mask and parameters differ in {sorted(parameters.keys() ^ mask.keys())}"
            )
        self._entries: list[_Entries] = []
        for name in sorted(parameters):
            entries = _Entries(parameters[name], mask[name])
            parameters[name].requires_grad_(entries.count > 0)
            if entries.count:
                self._entries.append(entries)
        sizes = [e.count for e in self._entries]
        self.values = nn.Parameter(
            torch.empty(sum(sizes), device=self._entries[0].parameter.device)
        )
        self.values.grad = torch.empty_like(self.values)
        self._values, self._gradients = (
            self.values.detach().split(sizes),
            self.values.grad.split(sizes),
        )
        for entries, part in zip(self._entries, self._values, strict=True):
            entries.gather(entries.parameter.detach(), part)
        self._hooks = [
            e.parameter.register_post_accumulate_grad_hook(partial(_take, e, part))
            for e, part in zip(self._entries, self._gradients, strict=True)
        ]
        self._optimizer = torch.optim.AdamW(
            [self.values], lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, fused=True
        )

    def close(self) -> None:
        """Leave the parameters' gradients alone from now on."""
        for hook in self._hooks:
            hook.remove()

    def take_gradients(self) -> None:
        """Take gradients that no backward pass has made but that were put into `.grad`."""
        for entries, part in zip(self._entries, self._gradients, strict=True):
            if entries.parameter.grad is not None:
                _take(entries, part, entries.parameter)

    @property
    def state_bytes(self) -> int:
        """Bytes held for the kept entries: values, moments (there after the first step) and
        positions.
        """
        held = [self.values, *self._optimizer.state[self.values].values()]
        held += [e.indices for e in self._entries if e.indices is not None]
        return sum(t.numel() * t.element_size() for t in held)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, as CPU tensors: kept values (K,), AdamW's moments (K,) and
        step count.
        """
        found = {"values": self.values.detach(), **self._optimizer.state[self.values]}
        return {name: tensor.cpu().clone() for name, tensor in found.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state` of the same mask, parameters included. Raises ValueError where it
        has another size.
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
        self._scatter()

    @torch.no_grad()
    def _scatter(self) -> None:
        """Write the kept values into the parameters."""
        for entries, part in zip(self._entries, self._values, strict=True):
            entries.scatter(part)

    @torch.no_grad()
    def step(self, lr: float, clip: float | None = None) -> float:
        """One update from the gradients of all backward passes since the last. Returns the norm of
        the kept gradients.

        A norm that is not finite is returned too, but nothing is updated then: the values stay
        those of the last step.
        """
        gradient = self.values.grad
        assert gradient is not None
        for entries, part in zip(self._entries, self._gradients, strict=True):
            if not entries.filled:  # no backward pass has come by
                part.zero_()
            entries.filled = False
        norm = gradient.norm()
        if torch.isfinite(norm):
            if clip is not None:
                gradient *= (clip / (norm + 1e-6)).clamp(max=1.0)
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
            self._scatter()
        return float(norm)


@torch.no_grad()
def _take(entries: _Entries, part: Tensor, parameter: Tensor) -> None:
    """Add the kept entries of a parameter's gradient to their part of the flat one, and free it."""
    assert parameter.grad is not None
    if entries.filled:
        more = torch.empty_like(part)
        entries.gather(parameter.grad, more)
        part += more
    else:
        entries.gather(parameter.grad, part)
    entries.filled, parameter.grad = True, None
