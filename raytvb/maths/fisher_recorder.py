"""The rules of `fisher`: a recorder watches a forward pass and scores each layer in the backward
pass.

Shape suffixes: N images, R draws of a label, L positions (tokens, pixels), I and O features in and
out, G groups of a convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from raytvb.maths.fisher_rewrites import REWRITES

_LAYER_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
"""The arguments of `torch.conv2d`, in their order. `F.linear` has the first three."""

_Columns = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Input and output gradient of a layer as (G, N, L, I) and (G, N, L, O)."""

_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}


_SUMS = {
    torch.add,
    torch.mul,
    Tensor.add,
    Tensor.mul,
    Tensor.__add__,
    Tensor.__radd__,
    Tensor.__mul__,
    Tensor.__rmul__,
}


class Recorder(TorchFunctionMode):
    """Watches a forward pass, and adds the squares of each sample's gradients to the scores in the
    backward passes after it.

    A hook on a layer's output forms the gradients of the layer's weight. Any other parameter is
    expanded to one copy for each sample where it meets the batch, so that autograd itself gives the
    gradient for each sample.

    Use: run the model within the recorder, set `weights_NR`, then for each draw r set `draw` and
    take the gradients of its log-probabilities with respect to `ends`.
    """

    ends: list[Tensor]
    """Watched tensors that depend on no other parameter. A backward pass may stop at them."""
    unknown: set[str]
    """Names of parameters that are used in a way without a rule, or whose rule is wrong."""
    draw: int
    """The draw, 0 to R − 1, that the backward pass is for."""

    def __init__(
        self, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor], count: int
    ) -> None:
        """scores: name -> float32 tensor that is added to. count: N, the images of the batch."""
        super().__init__()
        self._parameters, self._scores, self._count = parameters, scores, count
        self.ends, self.unknown = [], set()
        self.weights_NR = torch.empty(0)  # of the labels; set once they are drawn
        self.draw = 0
        # Names by the id of a parameter, and by the ids of its views that have the same elements.
        # The views are kept alive, so that no other tensor gets their id.
        self._names = {id(p): n for n, p in parameters.items()}
        self._views: list[Tensor] = []
        self._used: set[str] = set()
        self._expected: dict[str, Tensor] = {}
        self._margin: dict[str, float] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        rewritten = REWRITES.get(func)
        if rewritten is not None:
            with self:  # the steps of the rewritten function are watched instead
                return rewritten(*args, **kwargs)
        names = list(filter(None, map(self._name, (*args, *kwargs.values()))))
        if not names:
            return func(*args, **kwargs)
        if func in (F.linear, torch.conv2d):
            return self._layer(func, args, kwargs)
        if func in _PRODUCTS and args[1] is self._parameters.get(names[0]) and len(names) == 1:
            return self._product(func, args, names[0])
        if func in _SUMS and len(args) == 2 and not kwargs and len(names) == 1:
            return self._broadcast(func, args, names[0])
        return self._view(func, func(*args, **kwargs), names)

    def expect(self, gradients: dict[str, Tensor], tolerance: float) -> None:
        """From now on, compare the squares for the first image and draw with those of `gradients`.

        gradients: name -> tensor of the parameter's shape. They are taken out of the dict one by
        one, so that all gradients and all squares are never in memory together. tolerance: the
        largest difference, as a fraction of the parameter's largest square.
        """
        maximum: dict[str, float] = {}
        for name in list(gradients):
            # Not in place: gradients of two parameters may share memory.
            self._expected[name] = gradients.pop(name).float().square()
            maximum[name] = float(self._expected[name].max())
        largest = max(maximum.values(), default=0.0)
        for name in self._parameters:
            self._margin[name] = max(tolerance * maximum.get(name, 0.0), 1e-9 * largest)

    def _compare(self, name: str, squares: Tensor) -> None:
        """Add the name to `unknown` if the squares for the first image are not as expected."""
        if self.draw == 0 and self._margin and name not in self.unknown:
            expected = self._expected.pop(name, None)
            difference = squares if expected is None else squares.reshape(expected.shape) - expected
            if float(difference.abs().max()) > self._margin[name]:
                self.unknown.add(name)

    def unmet(self) -> set[str]:
        """Names of parameters that influence the first image, but that no rule has scored."""
        return {n for n, e in self._expected.items() if float(e.max()) > self._margin[n]}

    @property
    def weights(self) -> Tensor:
        """Weights (N,) of the draw that is being scored."""
        return self.weights_NR[:, self.draw]

    def _name(self, value: Any) -> str:
        """The name of the parameter that `value` is, or is a view of; '' for anything else."""
        return self._names.get(id(value), "") if isinstance(value, Tensor) else ""

    def _use(self, name: str) -> None:
        """Note that the model uses a parameter.

        There is no rule for a second use: the gradients of both must be added before squaring.
        """
        if name in self._used:
            self.unknown.add(name)
        self._used.add(name)

    def _view(self, func: Any, out: Any, names: list[str]) -> Any:
        """The result of an operation on parameters that has no rule of its own.

        A view that has the parameter's elements in their order stands for the parameter from now
        on, and so does a copy in another precision. An expansion to one copy for each sample is a
        use of the parameter. Any other operation makes the parameters unknown.
        """
        name, parameter = names[0], self._parameters[names[0]]
        if func is Tensor.to and out.shape == parameter.shape:
            self._stands_for(name, out)
            return out
        if isinstance(out, Tensor) and len(names) == 1 and out.data_ptr() == parameter.data_ptr():
            if out.numel() == parameter.numel() and out.is_contiguous():
                self._stands_for(name, out)
                return out
            if self._is_copy_per_sample(out, parameter):
                self._expand(name, out)
                return out
        if isinstance(out, Tensor | tuple | list):
            self.unknown.update(names)
        return out

    def _stands_for(self, name: str, view: Tensor) -> None:
        self._names[id(view)] = name
        self._views.append(view)

    def _is_copy_per_sample(self, out: Tensor, parameter: Tensor) -> bool:
        """Whether `out` (N, ...) is the parameter expanded over the samples."""
        if out.shape[:1] != (self._count,) or out.stride(0) != 0:
            return False
        return out[0].is_contiguous() and out[0].numel() == parameter.numel()

    def _expand(self, name: str, copies: Tensor) -> None:
        """Score a parameter from the gradient of its copies (N, ...), one for each sample."""
        self._use(name)
        self.ends.append(copies)
        copies.register_hook(
            lambda g_N: self._add(name, g_N.reshape(self._count, *self._parameters[name].shape))
        )

    def _broadcast(self, func: Callable[..., Tensor], args: tuple[Any, ...], name: str) -> Tensor:
        """x + p or x * p, with p broadcast over the samples."""
        own = 0 if self._name(args[0]) else 1
        other, parameter = args[1 - own], args[own]
        dims = other.dim() - parameter.dim() if isinstance(other, Tensor) else -1
        padded = parameter.reshape((1,) * max(dims, 0) + parameter.shape)
        if dims < 0 or other.shape[0] != self._count or padded.shape[0] != 1:
            self.unknown.add(name)
            return func(*args)
        copies = padded.expand(self._count, *padded.shape[1:])
        self._expand(name, copies)
        return func(copies, other) if own == 0 else func(other, copies)

    def _layer(
        self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """x W' + b, or a convolution with W and b."""
        arguments = dict(zip(_LAYER_ARGUMENTS, args, strict=False)) | kwargs
        source, out = arguments["input"], func(*args, **kwargs)
        weight, bias = self._name(arguments["weight"]), self._name(arguments.get("bias"))
        if not self._has_rule(arguments) or not out.requires_grad:
            self.unknown.update(filter(None, (self._name(source), weight, bias)))
            return out
        columns: _Columns = _linear_columns
        if func is not F.linear:
            columns = _convolution_columns(arguments, arguments["weight"].shape[2:])

        def hook(g: Tensor, source: Tensor) -> None:
            a_GNLI, g_GNLO = columns(source, g)
            if weight:
                self._add_products(weight, g_GNLO, a_GNLI)
            if bias:
                self._add(bias, g_GNLO.sum(dim=2).transpose(0, 1).flatten(1))

        for name in filter(None, (weight, bias)):
            self._use(name)
        self._watch(source, out, hook)
        return out

    def _has_rule(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the rule for layers covers a call with these arguments.

        Its input must be the batch. A weight or bias that is scored must be the parameter itself,
        not a view of it. The padding must be numbers.
        """
        for argument in ("weight", "bias"):
            name = self._name(arguments.get(argument))
            if name and self._parameters[name] is not arguments[argument]:
                return False
        source = arguments["input"]
        if self._name(source) or source.shape[0] != self._count:
            return False
        return not isinstance(arguments.get("padding"), str)

    def _watch(self, source: Tensor, out: Tensor, hook: Callable[[Tensor, Tensor], None]) -> None:
        """Call `hook` with the gradient of a layer's output and the layer's input.

        The input is released with the last draw, since the backward pass needs the memory.
        """
        held = [source.detach()]

        def called(g: Tensor) -> None:
            last = self.draw + 1 == self.weights_NR.shape[1]
            hook(g, held.pop() if last else held[0])

        out.register_hook(called)
        if not source.requires_grad:
            self.ends.append(out)

    def _product(self, func: Callable[..., Tensor], args: tuple[Any, ...], name: str) -> Tensor:
        """x @ p with a matrix p (I, O)."""
        source, out = args[0], func(*args)
        if (
            args[1].dim() != 2
            or source.dim() < 2
            or source.shape[0] != self._count
            or not out.requires_grad
        ):
            self.unknown.add(name)
            return out

        def hook(g: Tensor, source: Tensor) -> None:
            a_GNLI, g_GNLO = _linear_columns(source, g)
            self._add_products(name, a_GNLI, g_GNLO)

        self._use(name)
        self._watch(source, out, hook)
        return out

    def _add(self, name: str, gradients: Tensor) -> None:
        """Add per-sample gradients (N, *shape)."""
        squares = gradients.float().square()
        self._compare(name, squares[0])
        self._scores[name].add_(torch.tensordot(self.weights, squares, 1))

    def _add_products(self, name: str, g_GNLO: Tensor, a_GNLI: Tensor) -> None:
        """Add the squares of sum_l g_lo a_li, which are formed for one sample at a time."""
        groups, _, positions, features = g_GNLO.shape
        score_GOI = self._scores[name].view(groups, features, a_GNLI.shape[3])
        if positions == 1:  # the square of a product is the product of the squares
            g_GNO, a_GNI = g_GNLO[:, :, 0].float().square(), a_GNLI[:, :, 0].float().square()
            self._compare(name, g_GNO[:, 0, :, None] * a_GNI[:, 0, None])
            score_GOI += (g_GNO * self.weights[:, None]).transpose(1, 2) @ a_GNI
            return
        g_GNOL, a_GNLI = g_GNLO.float().transpose(2, 3), a_GNLI.float()
        product_GOI = torch.empty_like(score_GOI)
        # One sample at a time is fastest by far: the product is still in the cache when it is
        # squared.
        for n, weight in enumerate(self.weights.tolist()):
            torch.bmm(g_GNOL[:, n], a_GNLI[:, n], out=product_GOI)
            if n == 0:
                self._compare(name, product_GOI.square())
            score_GOI.addcmul_(product_GOI, product_GOI, value=weight)


def _linear_columns(source: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of a linear layer as (1, N, L, I) and (1, N, L, O)."""
    count = len(source)
    return source.reshape(1, count, -1, source.shape[-1]), g.reshape(1, count, -1, g.shape[-1])


def _convolution_columns(arguments: Mapping[str, Any], size: tuple[int, ...]) -> _Columns:
    """Like `_linear_columns` for a convolution, which is a linear layer on patches.

    Returns a function that maps the layer's input and output gradient to (G, N, L, I) and
    (G, N, L, O).
    """
    groups = arguments.get("groups", 1)
    options = {
        "stride": arguments.get("stride", 1),
        "padding": arguments.get("padding", 0),
        "dilation": arguments.get("dilation", 1),
    }

    def columns(source: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.unfold(source, size, **options)
        shape = (len(source), groups, -1, patches.shape[-1])
        a_NGIL, g_NGOL = patches.reshape(shape), g.reshape(shape)
        return a_NGIL.permute(1, 0, 3, 2), g_NGOL.permute(1, 0, 3, 2)

    return columns
