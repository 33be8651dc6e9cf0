"""Public functions for activation-based attention transfer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from at_fused import _loss, _maps, _value_and_grad
from at_fused._arguments import ATOptions
from at_fused._layouts import check_module_options, layout_of_feature
from at_fused._options import LossArguments, MapSize, MapSizes, Sides

if TYPE_CHECKING:
    from typing_extensions import Unpack

Features = TypeVar("Features", Tensor, Sequence[Tensor])


def at_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    p: float = 2.0,
    collapse: str = "mean",
    form: str = "code",
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    resize: str | None = None,
    attend: str = "spatial",
    channel_dim: Sides = 1,
    skip_tokens: Sides = 0,
    map_size: MapSizes = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    sample_weights: Tensor | None = None,
    absolute: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "max",
) -> Tensor:
    """Compute the attention-transfer loss between the features of a student and a teacher.

    With the raw map ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` over the N = H*W positions and the
    normalised map ``q[b] = Q[b] / max(||Q[b]||_2, eps)``, the loss of a pair is:

        form="code"     1/(B N) * sum_b ||qs[b] - qt[b]||_2^2     the authors' program
        form="paper"    1/B     * sum_b ||qs[b] - qt[b]||_2       the paper's equation (2)

    Gradients of any order flow to all features that require them, the teacher's included.

    Args:
        student: (B, C, H, W), or a list or tuple of such features, one per stage. (B, C, L) and
            (B, C, D, H, W) also work. float32, float64, float16 or bfloat16, any strides; NCHW and
            channels_last are read without a copy.
        teacher: as many features as ``student``. Each has the B of its partner, and its H and W
            unless ``resize`` is set. C and dtype may differ.
        p: exponent, any finite number >= 1. 1, 2 and 4 are the fastest.
        collapse: "mean" divides the sum over channels by C. "sum" does not, which only changes the
            effect of eps. "max" takes ``max_c |A|^p``; its gradient goes to the first maximum.
        form: "code" or "paper", as above.
        weights: one finite factor per pair. None means 1 for all.
        reduction: "sum" over the pairs, "none" for one value per pair, or "sample" for one per
            pair and sample, without the mean over the batch.
        resize: how to compare maps of different sizes. None raises an error. "maps" interpolates
            the teacher's raw map to the student's size, as in the paper (bilinear,
            ``align_corners=False``). "features" pools the larger features to the smaller size in
            each dimension before the power, as in RepDistiller and mdistiller (torch's
            ``adaptive_avg_pool``, in float32 for 16-bit features, which are copied).
        attend: "spatial", or "channel" to swap the roles of channels and positions (one weight per
            channel, ``Q[b, c] = (1/N) sum_n |A[b, c, n]|^p``; C must match, H x W need not).
            "both" is the sum of the two losses.
        channel_dim: 1, or -1 for features of shape (B, H, W, C) and tokens (B, N, C). This option
            and the next two accept a pair (student's, teacher's).
        skip_tokens: number of leading tokens (class, registers) of (B, N, C) to skip.
        map_size: (H, W) of the remaining tokens, for a partner that has H and W.
        mask: (B, H, W), bool or float, or a list with one per pair. It multiplies the raw maps of
            both sides, for example by 0 at padding. Other sizes are averaged to the map's size.
        sample_weights: (B,), a factor for each sample's loss. The mean still divides by B.
        absolute: False for ``A^p`` instead of ``|A|^p`` (integer p only, and not with "max"). An
            odd p then runs in plain PyTorch, slower and with feature-sized temporaries.
        eps: lower bound of the norm, > 0.
        eps_mode: "max" as above, or "add" for ``Q / (||Q||_2 + eps)``.

    Returns:
        A scalar. With ``reduction="none"`` a vector with one value per pair, with "sample" (pairs,
        B). float64 if any feature is float64, else float32 (also under autocast).

    Raises:
        TypeError: an argument has the wrong type (no tensor, an integer, complex or sparse tensor,
            an option that is not a number).
        ValueError: shapes, batch sizes, map sizes, devices or lengths do not match; a tensor or
            list is empty; an option is out of range, or is for tokens and a side has no tokens.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    # A plain tuple in the order of LossArguments: for small features Python dominates the time.
    options = p, collapse, form, reduction, eps_mode, eps, weights, resize, attend
    layout = channel_dim, skip_tokens, map_size
    return _loss.at_loss(student, teacher, (*options, *layout, mask, sample_weights, absolute))


class ATLoss(nn.Module):
    """Module form of ``at_loss``: ``ATLoss(p=2)(student, teacher)``.

    The formula is that of :func:`at_fused.at_loss`. The module has no parameters.

    Args:
        options: keyword arguments of :func:`at_fused.at_loss`, except ``mask`` and
            ``sample_weights``, which belong to a batch and are arguments of the call. The
            constructor checks them and keeps them in the attribute ``options``.

    Raises:
        TypeError, ValueError: an option does not exist, or its value is not allowed.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1.
    """

    def __init__(self, **options: Unpack[ATOptions]) -> None:
        super().__init__()
        self.options = check_module_options("ATLoss", options, ATOptions.__annotations__)

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor] | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss of one pair, or of the pairs of two sequences.

        Args:
            student, teacher, mask, sample_weights: as in :func:`at_fused.at_loss`.

        Returns:
            As :func:`at_fused.at_loss`: a scalar, (pairs,) or (pairs, B), float32 or float64.

        Raises:
            TypeError, ValueError: as :func:`at_fused.at_loss`.
        """
        return at_loss(student, teacher, mask=mask, sample_weights=sample_weights, **self.options)

    def extra_repr(self) -> str:
        """Return the options as keyword arguments."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def at_value_and_grad(
    student: Features,
    teacher: Features,
    *,
    scale: float | Tensor = 1.0,
    mask: Tensor | Sequence[Tensor] | None = None,
    sample_weights: Tensor | None = None,
    **options: Unpack[ATOptions],
) -> tuple[Tensor, Features]:
    """Compute the loss of :func:`at_loss` and its gradient for the student in one call.

    The result is ``(L, scale * dL/dS)``. Separate forward and backward passes would read S twice.
    Use it in training loops that combine gradients themselves:

        loss, gradients = at_value_and_grad(features, teacher_features, scale=beta)
        torch.autograd.backward([task_loss, *features], [None, *gradients])

    Neither result has a graph, and the features need not require gradients. Some options have no
    fused kernel here: ``collapse="max"``, maps of different sizes, channel attention, a mask that
    requires a gradient, and odd powers without ``absolute``. The function then calls ``at_loss``
    and its backward, and can neither be exported nor compiled in one graph.

    Args:
        student, teacher, mask, sample_weights, options: as in :func:`at_loss`.
        scale: factor of the gradient, not of the loss, such as beta or a loss scale. A number in
            the range of float32 (float64 for float64 features), or a tensor of one element on the
            features' device. A tensor is not synchronised; beyond that range it becomes inf.

    Returns:
        The loss, as :func:`at_loss` returns it, and the gradient: a tensor, or a list if
        ``student`` is a sequence. If the loss is not a scalar, the gradient is that of its sum.
        Gradients have the shapes and dtypes of the student's features, and the strides of
        ``torch.empty_like``.

    Raises:
        TypeError, ValueError: as :func:`at_loss`; ``scale`` is not as above.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1; the gradient in closed form.
    """
    for name in options.keys() - ATOptions.__annotations__.keys():
        names = ", ".join(sorted(ATOptions.__annotations__))
        raise TypeError(f"at_value_and_grad has no option {name!r}; it has {names}")
    arguments = LossArguments(mask=mask, sample_weights=sample_weights, **options)
    loss, gradients = _value_and_grad.at_value_and_grad(student, teacher, arguments, scale)
    return loss, gradients[0] if isinstance(student, Tensor) else gradients


def attention_map(
    x: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    normalize: bool = False,
    attend: str = "spatial",
    channel_dim: int = 1,
    skip_tokens: int = 0,
    map_size: MapSize | None = None,
    absolute: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "max",
) -> Tensor:
    """Compute the attention map of a feature: the mean, sum or maximum of |A|^p over channels.

    ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` for ``collapse="mean"``, without 1/C for "sum", and
    ``max_c |A[b, c, n]|^p`` for "max". ``normalize`` divides it by ``max(||Q[b]||_2, eps)``, the
    norm over all positions of a sample. ``attend="channel"`` swaps the roles of channels and
    positions.

    Args:
        x: (B, C, H, W), (B, C, L) or (B, C, D, H, W). With ``channel_dim=-1``: (B, H, W, C), or
            tokens (B, N, C).
        normalize: True to divide by the norm; only then are eps and eps_mode allowed.
        p, collapse, channel_dim, skip_tokens, map_size, absolute, eps, eps_mode: as in
            :func:`at_loss`; one value each.
        attend: "spatial" or "channel".

    Returns:
        (B, H, W), or (B, C) for channel attention. float64 for float64 features, else float32.
        Differentiable to any order.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (F_sum, F_sum^p, F_max^p).
    """
    options = {"p": p, "collapse": collapse, "attend": attend, "absolute": absolute}
    options |= {"normalize": normalize, "eps": eps, "eps_mode": eps_mode}
    layout = layout_of_feature(x, channel_dim, skip_tokens, map_size, options)
    feature = layout.view(x, attend == "channel")
    (raw,) = _maps.attention_maps([feature], float(p), collapse, absolute)
    q = _maps.normalized(raw, float(eps), eps_mode) if normalize else raw
    return q.view(x.shape[0], *feature.shape[2:])


def attention_tap(
    x: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    normalize: bool = False,
    attend: str = "spatial",
    channel_dim: int = 1,
    skip_tokens: int = 0,
    map_size: MapSize | None = None,
    absolute: bool = True,
    eps: float = 1e-12,
    eps_mode: str = "max",
) -> tuple[Tensor, Tensor]:
    """Return a feature unchanged, together with its attention map.

        x, q = attention_tap(x)

    The first result is ``x`` itself, for the next layer. The second is its map Q for
    :func:`map_loss`, as from :func:`attention_map` (q with ``normalize``). The backward pass gets
    both gradients and adds the map's to the other in one sweep:

        dL/dx[b, c, n] = dL/dx' + scale * p * dL/dQ[b, n] * |x|^(p-1) * sign(x)

    ``scale`` is 1/C for ``collapse="mean"``, else 1; for "max" only the largest channel gets a
    gradient. The sum is written in place if no other branch of the graph, hook, view or capture
    holds the incoming gradient, and into a new tensor otherwise or with ``create_graph``. The loss
    thus needs no feature-sized memory, and a teacher's feature can be freed once its map exists.

    Args:
        x: as in :func:`attention_map`.
        p, collapse, normalize, attend, channel_dim, skip_tokens, map_size, absolute, eps, eps_mode:
            as in :func:`attention_map`.

    Returns:
        x, or a view of it if it requires a gradient; do not change that view in place. And the
        map, (B, H, W) or (B, C): float64 for float64 features, else float32. Differentiable to any
        order.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (F_sum, F_sum^p, F_max^p).
    """
    options = {"p": p, "collapse": collapse, "attend": attend, "absolute": absolute}
    options |= {"normalize": normalize, "eps": eps, "eps_mode": eps_mode}
    layout = layout_of_feature(x, channel_dim, skip_tokens, map_size, options)
    y, raw = _maps.attention_tap(x, float(p), collapse, absolute, layout, attend == "channel")
    q = _maps.normalized(raw, float(eps), eps_mode) if normalize else raw
    return y, q if attend == "channel" else q.view(x.shape[0], *layout.size(x.shape))


def map_loss(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    *,
    form: str = "code",
    weights: Sequence[float] | None = None,
    reduction: str = "sum",
    resize: str | None = None,
    mask: Tensor | Sequence[Tensor] | None = None,
    sample_weights: Tensor | None = None,
    eps: float = 1e-12,
    eps_mode: str = "max",
) -> Tensor:
    """Compute the attention-transfer loss between maps from taps or :func:`attention_map`.

    As in :func:`at_loss`, with ``q[b] = Q[b] / max(||Q[b]||_2, eps)``, the loss of a pair is:

        form="code"     1/(B N) * sum_b ||qs[b] - qt[b]||_2^2
        form="paper"    1/B     * sum_b ||qs[b] - qt[b]||_2

    Args:
        student: (B, H, W), or a list or tuple of such maps, one per stage. (B, L), (B, C) and
            (B, D, H, W) also work. float32 or float64. Maps may be raw or normalised, which only
            changes the effect of eps.
        teacher: (B, H, W) as above, as many maps as ``student``. Each has the B of its partner,
            and its size unless ``resize="maps"`` interpolates it (bilinearly) to the student's.
        form, weights, reduction, mask, sample_weights, eps, eps_mode: as in :func:`at_loss`.
        resize: None or "maps".

    Returns:
        As :func:`at_loss`: a scalar, (pairs,) or (pairs, B). float64 if any map is float64, else
        float32.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1.
    """
    args = LossArguments(form=form, reduction=reduction, eps_mode=eps_mode, eps=eps)
    args = args._replace(weights=weights, resize=resize, mask=mask, sample_weights=sample_weights)
    return _loss.map_loss(student, teacher, args)


def at(
    x: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    channel_dim: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    """Compute the normalised, flattened attention map: ``at(x)`` of the authors' program.

    ``q[b] = Q[b] / max(||Q[b]||_2, eps)`` with the raw map Q of :func:`attention_map`.

    Args:
        x, p, collapse, channel_dim, eps: as in :func:`attention_map`.

    Returns:
        (B, H*W), rows of norm 1: float64 for float64 features, else float32.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1; ``at`` of their program.
    """
    q = attention_map(x, p=p, collapse=collapse, normalize=True, channel_dim=channel_dim, eps=eps)
    return q.flatten(1)
