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

from at_fused._ops import ownership
from at_fused._ops.attention import attention_map_backward
from at_fused._ops.library import (
    apply,
    below_autograd,
    check_one_device,
    define,
    entry,
    library,
    operators,
    tracks,
    transformed,
)
from at_fused.backends import eager

_ARGUMENTS = "Tensor feature, Tensor map_gradient, float p, str collapse, Tensor? channels=None"
define(f"attention_tap_backward(Tensor gradient, {_ARGUMENTS}) -> Tensor")
define(f"attention_tap_backward_(Tensor(a!) gradient, {_ARGUMENTS}) -> ()")


# ---- fake kernels --------------------------------------------------------------------------------


@torch.library.register_fake("at_fused::attention_tap_backward", lib=library)
def _(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> Tensor:
    check_one_device([gradient, feature, map_gradient, channels])
    return torch.empty_like(feature)


@torch.library.register_fake("at_fused::attention_tap_backward_", lib=library)
def _(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> None:
    check_one_device([gradient, feature, map_gradient, channels])


# ---- autograd ------------------------------------------------------------------------------------


def _map_gradient(
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None,
) -> Tensor:
    """Compute the map's part alone."""
    return attention_map_backward(
        [feature],
        [map_gradient * (p * eager.collapse_scale(feature, collapse))],
        None,
        [0],
        p,
        [],
        [] if channels is None else [channels],
    )[0]


def _backward_autograd(
    gradient: Tensor,
    feature: Tensor,
    map_gradient: Tensor,
    p: float,
    collapse: str,
    channels: Tensor | None = None,
) -> Tensor:
    options = p, collapse, channels
    if transformed() or tracks([gradient, feature, map_gradient]):
        return gradient + _map_gradient(feature, map_gradient, *options)
    operator = operators.attention_tap_backward.default
    return below_autograd(operator, gradient, feature, map_gradient, *options)


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


class Place(NamedTuple):
    """Where a feature has its channels, and what of it is tapped."""

    channel_dim: int = 1
    skip_tokens: int = 0
    channel_attention: bool = False

    def view(self, x: Tensor, skip: bool = True) -> Tensor:
        """(B, C, *spatial), with all tokens if not ``skip``."""
        if self.channel_dim != 1:
            x = (x[:, self.skip_tokens :] if skip else x).movedim(-1, 1)
        return x.flatten(2).transpose(1, 2) if self.channel_attention else x

    def restore(self, x: Tensor, shape: torch.Size) -> Tensor:
        """What ``view`` was made of, of this shape, all tokens with it."""
        if self.channel_attention:
            x = x.transpose(1, 2).reshape(
                shape if self.channel_dim == 1 else (shape[0], shape[-1], *shape[1:-1])
            )
        return x if self.channel_dim == 1 else x.movedim(1, -1)

    def pad(self, q: Tensor) -> Tensor:
        """A map (B, N), with zeros for the tokens that are not tapped."""
        return torch.nn.functional.pad(q, (self.skip_tokens, 0)) if self.skip_tokens else q


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, p: float, collapse: str, place: Place
    ) -> tuple[Tensor, Tensor]:
        operator = operators.attention_map.default
        if torch.compiler.is_compiling():
            q, *channels = operator([place.view(x)], p, collapse)
        else:
            q, *channels = below_autograd(operator, [place.view(x)], p, collapse)
        ctx.set_materialize_grads(False)
        ctx.options = p, collapse, place
        ctx.save_for_backward(x, *channels)
        return x.view_as(x), q

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor | None, map_gradient: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if map_gradient is None:
            return gradient, None, None, None
        x, *winners = ctx.saved_tensors
        p, collapse, place = ctx.options
        channels = winners[0] if winners else None
        if (
            gradient is not None
            and not torch.compiler.is_compiling()
            and ownership.may_write(gradient, x)
        ):
            target = place.view(gradient)
            if target.untyped_storage().data_ptr() == gradient.untyped_storage().data_ptr():
                attention_tap_backward_(target, place.view(x), map_gradient, p, collapse, channels)
                return gradient, None, None, None
        if place.skip_tokens and place.channel_attention:
            # Channels are the positions here, so that there is no map to pad.
            found = _map_gradient(place.view(x), map_gradient, p, collapse, channels)
            shape = x[:, place.skip_tokens :].shape
            found = torch.nn.functional.pad(
                place.restore(found, shape), (0, 0, place.skip_tokens, 0)
            )
            found = found if gradient is None else found + gradient
            return found, None, None, None
        feature = place.view(x, skip=False)
        if channels is not None:
            channels = place.pad(channels)
        rest = feature, place.pad(map_gradient), p, collapse, channels
        if gradient is None:
            found = _map_gradient(*rest)
        else:
            found = attention_tap_backward(place.view(gradient, skip=False), *rest)
        return place.restore(found, x.shape), None, None, None


def attention_tap(x: Tensor, p: float, collapse: str, place: Place) -> tuple[Tensor, Tensor]:
    """Return the feature, to be used in its own place, and its raw map (B, N)."""
    if torch.compiler.is_compiling():
        return _Tap.apply(x, p, collapse, place)
    if transformed():
        return x, eager.attention_map([place.view(x)], p, collapse)[0]
    if not (x.requires_grad and torch.is_grad_enabled()):
        operator = operators.attention_map.default
        return x, below_autograd(operator, [place.view(x)], p, collapse)[0]
    ownership.calibrate(_probe)
    return apply(_Tap, x, p, collapse, place)


def _probe(x: Tensor) -> tuple[Tensor, ...]:
    return apply(_Tap, x, 2.0, "sum", Place())
