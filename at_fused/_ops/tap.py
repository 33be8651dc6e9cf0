"""The tap: an identity with a second output, the attention map of its input.

    attention_tap_backward     incoming gradient plus the map's, in a new tensor
    attention_tap_backward_    the same, written into the incoming gradient

Both read G, A and dL/dQ once and write G + scale * p * dL/dQ[b, n] * |A|^(p-1) * sign(A). dL/dQ is
(B, N), and ``scale`` is 1/C for ``collapse="mean"``. With "max", ``channels`` (B, N) holds the
argmax channel of each position, and only this channel gets the map's gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from at_fused._layouts import FeatureLayout
from at_fused._ops import ownership
from at_fused._ops.attention import map_gradients_backward
from at_fused._ops.library import (
    apply,
    call_below_autograd,
    define,
    is_transformed,
    needs_graph,
    operators,
    register_autograd,
)
from at_fused.backends import eager

_ARGUMENTS = "Tensor feature, Tensor map_gradient, float p, str collapse, Tensor? channels=None"
define(f"attention_tap_backward(Tensor gradient, {_ARGUMENTS}) -> Tensor")
define(f"attention_tap_backward_(Tensor(a!) gradient, {_ARGUMENTS}) -> ()")


# ---- autograd of the operators -------------------------------------------------------------------


def _gradient_through_map(
    feature: Tensor, map_gradient: Tensor, p: float, collapse: str, channels: Tensor | None = None
) -> Tensor:
    """Compute the feature's gradient through its map."""
    argmax_channels = [] if channels is None else [channels]
    return map_gradients_backward([feature], [map_gradient], p, collapse, [], argmax_channels)[0]


def _backward_autograd(
    gradient: Tensor, feature: Tensor, map_gradient: Tensor, *rest: Any
) -> Tensor:
    if is_transformed() or needs_graph([gradient, feature, map_gradient]):
        return gradient + _gradient_through_map(feature, map_gradient, *rest)
    operator = operators.attention_tap_backward.default
    return call_below_autograd(operator, gradient, feature, map_gradient, *rest)


def _backward_inplace_autograd(gradient: Tensor, *arguments: Any) -> None:
    if is_transformed() or needs_graph([gradient, *arguments[:2]]):
        raise RuntimeError(
            "at_fused::attention_tap_backward_ has no derivative; use attention_tap_backward"
        )
    call_below_autograd(operators.attention_tap_backward_.default, gradient, *arguments)
    if not gradient.is_inference():
        torch.autograd.graph.increment_version(gradient)


attention_tap_backward = register_autograd("attention_tap_backward", _backward_autograd)
attention_tap_backward_ = register_autograd("attention_tap_backward_", _backward_inplace_autograd)


# ---- the tap -------------------------------------------------------------------------------------


class _TapOptions(NamedTuple):
    """Options of the map of a tapped feature."""

    p: float
    collapse: str
    layout: FeatureLayout
    channelwise: bool

    def view(self, x: Tensor) -> Tensor:
        """View x, or its gradient, as (B, C, *spatial) without the skipped tokens."""
        return self.layout.view(x, self.channelwise)

    def restore(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of x from the gradient of ``view(x)``."""
        if self.channelwise:
            gradient = gradient.transpose(1, 2).reshape(self.layout.to_channels_first(x).shape)
        return self.layout.restore(gradient, x)

    def with_all_tokens(self, *maps: Tensor) -> tuple[_TapOptions, list[Tensor]]:
        """Return the options without skipped tokens, and maps padded with zeros for these."""
        padded = [pad(q, (self.layout.skip_tokens, 0)) for q in maps]
        return self._replace(layout=self.layout.all_tokens()), padded


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, options: _TapOptions) -> tuple[Tensor, Tensor]:
        operator, arguments = operators.attention_map.default, options[:2]
        if torch.compiler.is_compiling():
            q, *channels = operator([options.view(x)], *arguments)
        else:
            q, *channels = call_below_autograd(operator, [options.view(x)], *arguments)
        ctx.set_materialize_grads(False)
        ctx.options = options
        ctx.save_for_backward(x, *channels)
        return x.view_as(x), q

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, map_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if map_gradient is None:
            return gradient, None
        x, *channels = ctx.saved_tensors
        options: _TapOptions = ctx.options
        if (
            gradient is not None
            and not torch.compiler.is_compiling()
            and ownership.may_write(gradient, x)
        ):
            target = options.view(gradient)
            if target.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr():
                attention_tap_backward_(
                    target, options.view(x), map_gradient, *options[:2], *channels
                )
                return gradient, None
        skips = options.layout.has_tokens(x) and options.layout.skip_tokens > 0
        if skips and not options.channelwise:
            options, (map_gradient, *channels) = options.with_all_tokens(map_gradient, *channels)
        rest = options.view(x), map_gradient, *options[:2], *channels
        if gradient is None:
            return options.restore(_gradient_through_map(*rest), x), None
        if skips and options.channelwise:  # the map has no tokens to pad
            return gradient + options.restore(_gradient_through_map(*rest), x), None
        return options.restore(attention_tap_backward(options.view(gradient), *rest), x), None


def attention_tap(
    x: Tensor, p: float, collapse: str, layout: FeatureLayout, channelwise: bool
) -> tuple[Tensor, Tensor]:
    """Return the feature for the next layer, and its raw map (B, N)."""
    options = _TapOptions(p, collapse, layout, channelwise)
    if torch.compiler.is_compiling():
        return _Tap.apply(x, options)
    if is_transformed():
        return x, eager.attention_map([options.view(x)], p, collapse)[0]
    if not (x.requires_grad and torch.is_grad_enabled()):
        operator = operators.attention_map.default
        return x, call_below_autograd(operator, [options.view(x)], p, collapse)[0]
    ownership.calibrate(_calibration_tap)
    return apply(_Tap, x, options)


def _calibration_tap(x: Tensor) -> tuple[Tensor, ...]:
    return apply(_Tap, x, _TapOptions(2.0, "sum", FeatureLayout(), False))
