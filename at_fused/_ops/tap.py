"""The tap: an identity whose second output is the attention map of what passes.

    attention_tap_backward     the incoming gradient plus the map's, in a new tensor
    attention_tap_backward_    the same, written into the incoming gradient

Both read G, A and dL/dQ once and write G + scale * p * dL/dQ[b, n] * |A|^(p-1) * sign(A), where
dL/dQ is (B, N) and ``scale`` is 1/C for ``collapse="mean"``. With "max", ``channels`` (B, N) names
the channels that have the map's gradient.
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
    below_autograd,
    define,
    entry,
    operators,
    tracks,
    transformed,
)
from at_fused.backends import eager

_ARGUMENTS = "Tensor feature, Tensor map_gradient, float p, str collapse, Tensor? channels=None"
define(f"attention_tap_backward(Tensor gradient, {_ARGUMENTS}) -> Tensor")
define(f"attention_tap_backward_(Tensor(a!) gradient, {_ARGUMENTS}) -> ()")


# ---- autograd of the operators -------------------------------------------------------------------


def _map_part(
    feature: Tensor, map_gradient: Tensor, p: float, collapse: str, channels: Tensor | None = None
) -> Tensor:
    """Compute what the map adds to the gradient."""
    winners = [] if channels is None else [channels]
    return map_gradients_backward([feature], [map_gradient], p, collapse, [], winners)[0]


def _backward_autograd(
    gradient: Tensor, feature: Tensor, map_gradient: Tensor, *rest: Any
) -> Tensor:
    if transformed() or tracks([gradient, feature, map_gradient]):
        return gradient + _map_part(feature, map_gradient, *rest)
    operator = operators.attention_tap_backward.default
    return below_autograd(operator, gradient, feature, map_gradient, *rest)


def _backward_inplace_autograd(gradient: Tensor, *arguments: Any) -> None:
    if transformed() or tracks([gradient, *arguments[:2]]):
        raise RuntimeError(
            "at_fused::attention_tap_backward_ has no derivative; attention_tap_backward has"
        )
    below_autograd(operators.attention_tap_backward_.default, gradient, *arguments)
    if not gradient.is_inference():
        torch.autograd.graph.increment_version(gradient)


attention_tap_backward = entry("attention_tap_backward", _backward_autograd)
attention_tap_backward_ = entry("attention_tap_backward_", _backward_inplace_autograd)


# ---- the tap -------------------------------------------------------------------------------------


class _Tapped(NamedTuple):
    """The map that is made of a feature."""

    p: float
    collapse: str
    layout: FeatureLayout
    of_channels: bool

    def view(self, x: Tensor) -> Tensor:
        """Return x, or its gradient, as (B, C, *spatial) of the map, without skipped tokens."""
        return self.layout.view(x, self.of_channels)

    def restore(self, gradient: Tensor, x: Tensor) -> Tensor:
        """Return the gradient of ``view(x)`` as that of x."""
        if self.of_channels:
            gradient = gradient.transpose(1, 2).reshape(self.layout.to_channels_first(x).shape)
        return self.layout.restore(gradient, x)

    def of_all_tokens(self, *maps: Tensor) -> tuple[_Tapped, list[Tensor]]:
        """Return the tap of all tokens, and maps with zeros for the skipped ones."""
        padded = [pad(q, (self.layout.skip_tokens, 0)) for q in maps]
        return self._replace(layout=self.layout.all_tokens()), padded


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tapped: _Tapped) -> tuple[Tensor, Tensor]:
        operator, arguments = operators.attention_map.default, tapped[:2]
        if torch.compiler.is_compiling():
            q, *channels = operator([tapped.view(x)], *arguments)
        else:
            q, *channels = below_autograd(operator, [tapped.view(x)], *arguments)
        ctx.set_materialize_grads(False)
        ctx.tapped = tapped
        ctx.save_for_backward(x, *channels)
        return x.view_as(x), q

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, map_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if map_gradient is None:
            return gradient, None
        x, *channels = ctx.saved_tensors
        tapped: _Tapped = ctx.tapped
        if (
            gradient is not None
            and not torch.compiler.is_compiling()
            and ownership.may_write(gradient, x)
        ):
            target = tapped.view(gradient)
            if target.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr():
                attention_tap_backward_(
                    target, tapped.view(x), map_gradient, *tapped[:2], *channels
                )
                return gradient, None
        skips = tapped.layout.has_tokens(x) and tapped.layout.skip_tokens > 0
        if skips and not tapped.of_channels:
            tapped, (map_gradient, *channels) = tapped.of_all_tokens(map_gradient, *channels)
        rest = tapped.view(x), map_gradient, *tapped[:2], *channels
        if gradient is None:
            return tapped.restore(_map_part(*rest), x), None
        if skips and tapped.of_channels:  # channels are the positions here: no map to pad
            return gradient + tapped.restore(_map_part(*rest), x), None
        return tapped.restore(attention_tap_backward(tapped.view(gradient), *rest), x), None


def attention_tap(
    x: Tensor, p: float, collapse: str, layout: FeatureLayout, of_channels: bool
) -> tuple[Tensor, Tensor]:
    """Return the feature, to be used in its own place, and its raw map (B, N)."""
    tapped = _Tapped(p, collapse, layout, of_channels)
    if torch.compiler.is_compiling():
        return _Tap.apply(x, tapped)
    if transformed():
        return x, eager.attention_map([tapped.view(x)], p, collapse)[0]
    if not (x.requires_grad and torch.is_grad_enabled()):
        operator = operators.attention_map.default
        return x, below_autograd(operator, [tapped.view(x)], p, collapse)[0]
    ownership.calibrate(_probe)
    return apply(_Tap, x, tapped)


def _probe(x: Tensor) -> tuple[Tensor, ...]:
    return apply(_Tap, x, _Tapped(2.0, "sum", FeatureLayout(), False))
