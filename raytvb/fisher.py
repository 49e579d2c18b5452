"""Sensitivity scores: the diagonal Fisher information of every parameter of an image classifier.

Source: Iurada et al., "Efficient Model Editing with Task-Localized Sparse Fine-tuning", ICLR 2025, arXiv 2504.02620:

    F_j = mean over images x of E_{y ~ p(.|x)} [ (d log p(y|x) / d theta_j)^2 ],

with the labels y drawn from the model itself. One forward and one backward pass a batch: the per-sample gradients of a
layer are formed from its input and the gradient of its output when the backward pass gets there, squared, and dropped.
Each sample's gradient is its own because no sample of a batch touches another (batch norm uses running statistics).

Shape suffixes: N images, L positions (tokens, pixels), I and O features in and out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Model = Callable[[Tensor], Tensor]
Draw = Callable[[Tensor], tuple[Tensor, Tensor]]  # logits (N, C) to labels (N, R) and weights (N, R)
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__}
_SUMS = {torch.add, torch.mul, Tensor.add, Tensor.mul, Tensor.__add__, Tensor.__radd__, Tensor.__mul__, Tensor.__rmul__}


def fisher_scores(classifier: nn.Module, images: Tensor, *, draws: int | Literal["exact"] = 1, batch_size: int = 32,
                  generator: torch.Generator | None = None,
                  precision: Literal["fp32", "bf16"] = "fp32") -> dict[str, Tensor]:
    """Diagonal Fisher information of every parameter that requires grad, averaged over the images.

    Linear, convolution, normalisation and attention layers, scales and additive embeddings take one pass a batch. What
    is used in another way is found out on the first image, by comparing with plain autograd, and scored image by image;
    a warning says so.

    Args:
        classifier: images (N, 3, H, W) to logits (N, C); used in the mode it is in (call `.eval()` first).
        images: (N, 3, H, W), without augmentation.
        draws: labels sampled from p(.|x) per image, or "exact" for the expectation over all C classes.
        batch_size: images a forward pass takes.
        generator: seeds the sampled labels (a CPU generator); the default is seeded with 0.
        precision: of the forward and backward pass; "bf16" is autocast to bfloat16. Squares are summed in float32.

    Returns: name -> float32 tensor of the parameter's shape. Raises ValueError where there is nothing to score, and for
    arguments that are none of these.
    """
    if not (draws == "exact" or isinstance(draws, int)) or batch_size < 1 or precision not in ("fp32", "bf16"):
        raise ValueError(f'draws = {draws!r} (a number or "exact"), batch_size = {batch_size} (at least 1), '
                         f'precision = {precision!r} ("fp32" or "bf16")')
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(f"images are {tuple(images.shape)} {images.dtype}; needed are normalised ones (N, 3, H, W) in "
                         f"floating point")
    parameters = {n: p for n, p in classifier.named_parameters() if p.requires_grad}
    if not parameters or len(images) == 0 or (draws != "exact" and draws < 1):
        raise ValueError(f"nothing to score: {len(parameters)} parameters require grad, {len(images)} images, "
                         f"draws = {draws}")
    generator = generator if generator is not None else torch.Generator().manual_seed(0)

    def model(batch: Tensor) -> Tensor:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return classifier(batch)

    def draw(logits: Tensor) -> tuple[Tensor, Tensor]:
        return _labels_and_weights(logits.detach(), draws, generator)

    def draw_first(logits: Tensor) -> tuple[Tensor, Tensor]:
        labels = logits.argmax(dim=1, keepdim=True)
        return labels, torch.ones(labels.shape, device=labels.device)

    # Half precision rounds the two ways differently; a wrong rule is off by more than that.
    whole = all(p.dtype in (torch.float32, torch.float64) for p in parameters.values())
    tolerance: float | None = 1e-4 if whole else 0.25
    scores = {n: torch.zeros(p.shape, device=p.device) for n, p in parameters.items()}
    slow = set[str]()
    if precision == "bf16" and len(images) > 1:  # where rounding may be larger than any tolerance: checked in float32
        _, _, slow = _add_batch(classifier, parameters, images[:2], draw_first, scores, tolerance)
        tolerance = None
        for score in scores.values():
            score.zero_()
    unseen = True
    for batch in images.split(batch_size):
        if len(batch) == 1:  # it cannot be told from other sizes of 1
            with torch.no_grad():
                labels, weights = draw(model(batch))
            _add_each(model, parameters, batch, labels, weights, scores)
            continue
        fast = {n: p for n, p in parameters.items() if n not in slow}
        labels, weights, wrong = _add_batch(model, fast, batch, draw, scores, tolerance if unseen else None)
        if unseen:
            slow, unseen = slow | wrong, False
            _warn(slow, len(parameters))
            for name in wrong:
                scores[name].zero_()
        elif wrong:
            raise RuntimeError(f"the model uses {', '.join(sorted(wrong))} in another way for {len(batch)} images than "
                               f"for the first batch; score it with batch_size=1")
        _add_each(model, {n: parameters[n] for n in slow}, batch, labels, weights, scores)
    return {n: s.div_(len(images)) for n, s in scores.items()}


def _warn(slow: set[str], count: int) -> None:
    if slow:
        warnings.warn(f"{len(slow)} of {count} parameters are used in ways that have no fast rule and are scored image "
                      f"by image: {', '.join(sorted(slow)[:5])}{', …' if len(slow) > 5 else ''}", stacklevel=3)


def _labels_and_weights(logits: Tensor, draws: int | Literal["exact"], generator: torch.Generator | None) -> tuple[
        Tensor, Tensor]:
    """Labels (N, R) to score and their weights (N, R), which sum to 1 over R: sampled ones or every class."""
    probabilities = logits.float().softmax(dim=1)
    if draws == "exact":
        labels = torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1)
        return labels, probabilities
    # The draws are made on the CPU so that a seed means the same labels on every device.
    labels = torch.multinomial(probabilities.cpu(), draws, replacement=True, generator=generator).to(logits.device)
    return labels, torch.full(labels.shape, 1.0 / draws, device=logits.device)


@torch.enable_grad()
def _add_batch(classifier: Model, parameters: Mapping[str, Tensor], images: Tensor, draw: Draw,
               scores: Mapping[str, Tensor], tolerance: float | None) -> tuple[Tensor, Tensor, set[str]]:
    """Add the weighted squares of a batch to `scores`, for labels (N, R) and weights (N, R) drawn from the logits.

    Returns both, and the names of parameters that are used in a way without a rule. With a tolerance, also those whose
    squares for the first image and label are not those of plain autograd on that image: a rule that is wrong here.
    """
    recorder = _Recorder(parameters, scores, len(images))
    with torch.set_grad_enabled(bool(parameters)), recorder:
        logits = classifier(images)
        labels, recorder.weights_NR = draw(logits)
        log_p = logits.float().log_softmax(dim=1).gather(1, labels)
    if tolerance is not None and parameters:
        recorder.expect(_gradients(classifier, parameters, images[:1], labels[0, :1]), tolerance)
    for r in range(labels.shape[1] if recorder.ends else 0):
        recorder.draw = r
        torch.autograd.grad(log_p[:, r].sum(), recorder.ends, allow_unused=True,
                            retain_graph=r + 1 < labels.shape[1])
    return labels, recorder.weights_NR, recorder.unknown | recorder.unmet()


def _gradients(classifier: Model, parameters: Mapping[str, Tensor], image: Tensor, label: Tensor) -> dict[str, Tensor]:
    """d log p(label | image) by name, for those it depends on."""
    log_p = classifier(image).float().log_softmax(dim=1)[0, label[0]]
    found = torch.autograd.grad(log_p, list(parameters.values()), allow_unused=True)
    return {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


@torch.enable_grad()
def _add_each(classifier: Model, parameters: Mapping[str, Tensor], images: Tensor, labels: Tensor,
              weights: Tensor, scores: Mapping[str, Tensor]) -> None:
    """The plain definition, one backward pass for each image and label: right for every model."""
    if not parameters:
        return
    for n in range(len(images)):
        log_p = classifier(images[n:n + 1]).float().log_softmax(dim=1)[0, labels[n]]
        for r, weight in enumerate(weights[n].tolist()):
            gradients = torch.autograd.grad(log_p[r], list(parameters.values()), allow_unused=True,
                                            retain_graph=r + 1 < len(log_p))
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    scores[name].addcmul_(gradient.float(), gradient.float(), value=weight)


class _Recorder(TorchFunctionMode):
    """Watches a forward pass; in the backward pass after it, squares of per-sample gradients go into the scores.

    A layer's weight gets them from a hook on the layer's output. Another parameter is expanded to one copy a sample
    where it meets the batch, so that autograd itself gives its gradient for each sample.
    """

    def __init__(self, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor], count: int) -> None:
        super().__init__()
        self._names = {id(p): n for n, p in parameters.items()}  # and of views of them with the same elements
        self._alive: list[Tensor] = []  # the views, so that no other tensor gets their id
        self._used: set[str] = set()
        self._parameters, self._scores, self._count = parameters, scores, count
        self.ends: list[Tensor] = []  # where the backward pass may stop: what depends on no other parameter
        self.unknown: set[str] = set()
        self.weights_NR, self.draw = torch.empty(0), 0
        self._expected: dict[str, Tensor] = {}
        self._margin: dict[str, float] = {}

    def __torch_function__(self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        rewritten = _REWRITES.get(func)
        if rewritten is not None:
            with self:  # its parts are watched in its place
                return rewritten(*args, **kwargs)
        names = [self._name(a) for a in (*args, *kwargs.values()) if self._name(a)]
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
        """Compare the squares for the first image and draw with those of these gradients, relative to their maximum."""
        # Not in place: gradients of two parameters may share memory.
        self._expected = {n: gradients.pop(n).float().square() for n in list(gradients)}
        most = {n: float(e.max()) for n, e in self._expected.items()}
        largest = max(most.values(), default=0.0)
        self._margin = {n: max(tolerance * most.get(n, 0.0), 1e-9 * largest) for n in self._parameters}

    def _compare(self, name: str, squares: Tensor) -> None:
        """The squares of the first image are as expected, else the name is unknown from now on."""
        if self.draw == 0 and self._margin and name not in self.unknown:
            expected = self._expected.pop(name, None)
            difference = squares if expected is None else squares.reshape(expected.shape) - expected
            if float(difference.abs().max()) > self._margin[name]:
                self.unknown.add(name)

    def unmet(self) -> set[str]:
        """Names with an influence on the first image that no rule has met."""
        return {n for n, e in self._expected.items() if float(e.max()) > self._margin[n]}

    @property
    def weights(self) -> Tensor:
        """Weights (N,) of the draw that is being scored."""
        return self.weights_NR[:, self.draw]

    def _name(self, value: Any) -> str:
        return self._names.get(id(value), "") if isinstance(value, Tensor) else ""

    def _use(self, name: str) -> None:
        if name in self._used:  # gradients of two uses would have to be added before they are squared
            self.unknown.add(name)
        self._used.add(name)

    def _view(self, func: Any, out: Any, names: list[str]) -> Any:
        """A view with a parameter's elements in their order stands for it; one copy a sample is where it is used."""
        name = names[0]
        parameter = self._parameters[name]
        if func is Tensor.to and out.shape == parameter.shape:  # of another precision
            self._names[id(out)] = name
            self._alive.append(out)
            return out
        if isinstance(out, Tensor) and len(names) == 1 and out.data_ptr() == parameter.data_ptr():
            if out.numel() == parameter.numel() and out.is_contiguous():
                self._names[id(out)] = name
                self._alive.append(out)
                return out
            if out.shape[:1] == (self._count,) and out.stride(0) == 0 and out[0].is_contiguous() and (
                    out[0].numel() == parameter.numel()):
                self._expand(name, out)
                return out
        if isinstance(out, Tensor | tuple | list):
            self.unknown.update(names)
        return out

    def _expand(self, name: str, copies: Tensor) -> None:
        """Score a parameter from the gradient of its copies (N, ...), one a sample."""
        self._use(name)
        self.ends.append(copies)
        copies.register_hook(lambda g_N: self._add(name, g_N.reshape(self._count, *self._parameters[name].shape)))

    def _broadcast(self, func: Any, args: tuple[Any, ...], name: str) -> Tensor:
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

    def _layer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """x W' + b, or a convolution with W and b."""
        given = dict(zip(("input", "weight", "bias", "stride", "padding", "dilation", "groups"), args, strict=False))
        given |= kwargs
        source, out = given["input"], func(*args, **kwargs)
        weight, bias = self._name(given["weight"]), self._name(given.get("bias"))
        plain = all(not n or self._parameters[n] is given[k] for n, k in ((weight, "weight"), (bias, "bias")))
        if self._name(source) or not plain or source.shape[0] != self._count or isinstance(
                given.get("padding"), str) or not out.requires_grad:
            self.unknown.update(n for n in (self._name(source), weight, bias) if n)
            return out
        columns = _linear_columns if func is F.linear else _convolution_columns(given, given["weight"].shape[2:])

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

    def _watch(self, source: Tensor, out: Tensor, hook: Callable[[Tensor, Tensor], None]) -> None:
        """Call `hook` with the gradient of a layer's output and the layer's input, which the last draw lets go."""
        held = [source.detach()]

        def called(g: Tensor) -> None:
            hook(g, held.pop() if self.draw + 1 == self.weights_NR.shape[1] else held[0])

        out.register_hook(called)
        if not source.requires_grad:
            self.ends.append(out)

    def _product(self, func: Any, args: tuple[Any, ...], name: str) -> Tensor:
        """x @ p with a matrix p (I, O)."""
        source, out = args[0], func(*args)
        if args[1].dim() != 2 or source.dim() < 2 or source.shape[0] != self._count or not out.requires_grad:
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
        """Add the squares of sum_l g_lo a_li, formed for one sample at a time; G are a convolution's groups."""
        groups, _, positions, features = g_GNLO.shape
        score_GOI = self._scores[name].view(groups, features, a_GNLI.shape[3])
        if positions == 1:  # the square of a product is the product of the squares
            g_GNO, a_GNI = g_GNLO[:, :, 0].float().square(), a_GNLI[:, :, 0].float().square()
            self._compare(name, g_GNO[:, 0, :, None] * a_GNI[:, 0, None])
            score_GOI += (g_GNO * self.weights[:, None]).transpose(1, 2) @ a_GNI
            return
        g_GNOL, a_GNLI, product_GOI = g_GNLO.float().transpose(2, 3), a_GNLI.float(), torch.empty_like(score_GOI)
        # One sample at a time is fastest by far: the product is still in the cache when it is squared.
        for n, weight in enumerate(self.weights.tolist()):
            torch.bmm(g_GNOL[:, n], a_GNLI[:, n], out=product_GOI)
            if n == 0:
                self._compare(name, product_GOI.square())
            score_GOI.addcmul_(product_GOI, product_GOI, value=weight)


def _linear_columns(source: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of a linear layer as (1, N, L, I) and (1, N, L, O)."""
    count = len(source)
    return source.reshape(1, count, -1, source.shape[-1]), g.reshape(1, count, -1, g.shape[-1])


def _convolution_columns(given: Mapping[str, Any],
                         size: tuple[int, ...]) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The same for a convolution, which is a linear layer on patches: (G, N, L, I) and (G, N, L, O)."""
    groups = given.get("groups", 1)
    options = {"stride": given.get("stride", 1), "padding": given.get("padding", 0),
               "dilation": given.get("dilation", 1)}

    def columns(source: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        patches = F.unfold(source, size, **options)
        split = [t.reshape(len(source), groups, -1, patches.shape[-1]).permute(1, 0, 3, 2) for t in (patches, g)]
        return split[0], split[1]

    return columns


def _affine(normalised: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int]) -> Tensor:
    if weight is not None:
        normalised = normalised * weight.view(shape)
    return normalised if bias is None else normalised + bias.view(shape)


def _layer_norm(x: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None,
                eps: float = 1e-5) -> Tensor:
    with torch._C.DisableTorchFunction():
        normalised = F.layer_norm(x, normalized_shape, None, None, eps)
    return _affine(normalised, weight, bias, tuple(normalized_shape))


def _batch_norm(x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None = None,
                bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5) -> Tensor:
    with torch._C.DisableTorchFunction():
        normalised = F.batch_norm(x, mean, var, None, None, training, momentum, eps)
    return _affine(normalised, weight, bias, (-1, *(1,) * (x.dim() - 2)))


def _attention(query: Tensor, key: Tensor, value: Tensor, embed_dim: int, heads: int, in_weight: Tensor | None,
               in_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None, add_zero: bool, dropout: float,
               out_weight: Tensor, out_bias: Tensor | None, training: bool = True,
               key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
               use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None,
               k_proj_weight: Tensor | None = None, v_proj_weight: Tensor | None = None, static_k: Tensor | None = None,
               static_v: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` in steps that are watched, the samples first; without masks and dropout."""
    if any(o is not None for o in (bias_k, bias_v, key_padding_mask, attn_mask, static_k, static_v)) or add_zero or (
            training and dropout > 0) or query.dim() != 3:
        with torch._C.DisableTorchFunction():  # not watched, so the check finds its parameters without scores
            return F.multi_head_attention_forward(
                query, key, value, embed_dim, heads, in_weight, in_bias, bias_k, bias_v, add_zero, dropout, out_weight,
                out_bias, training, key_padding_mask, need_weights, attn_mask, use_separate_proj_weight, q_proj_weight,
                k_proj_weight, v_proj_weight, static_k, static_v, **options)
    inputs = [t.transpose(0, 1) for t in (query, key, value)]
    if query is key is value and in_weight is not None:
        q, k, v = F.linear(inputs[0], in_weight, in_bias).chunk(3, dim=-1)
    else:
        weights: Any = (q_proj_weight, k_proj_weight, v_proj_weight) if in_weight is None else in_weight.chunk(3)
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        q, k, v = (F.linear(t, w, b) for t, w, b in zip(inputs, weights, biases, strict=True))
    split = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
    return F.linear(mixed, out_weight, out_bias).transpose(0, 1), None


_REWRITES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm, F.batch_norm: _batch_norm, F.multi_head_attention_forward: _attention}
