"""The public functions of activation-based attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from at_fused import _loss, _maps, _value_and_grad
from at_fused._arguments import ATOptions
from at_fused._layouts import check_kept, layout_of_one
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
    """Attention-transfer loss between the features of a student and of a teacher.

    With the raw map ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` over the N = H*W positions and the
    normalised map ``q[b] = Q[b] / max(||Q[b]||_2, eps)``, the loss of a pair is:

        form="code"     1/(B N) * sum_b ||qs[b] - qt[b]||_2^2     the authors' program
        form="paper"    1/B     * sum_b ||qs[b] - qt[b]||_2       the paper's equation (2)

    Gradients flow to every feature that requires them, student's or teacher's, to any order.

    Args:
        student: (B, C, H, W), or a list or tuple of such features, one per stage. Also (B, C, L)
            and (B, C, D, H, W). float32, float64, float16 or bfloat16, any strides; NCHW and
            channels_last are read as they lie.
        teacher: as many features, each with the B of its partner, and its H and W unless ``resize``
            says otherwise; C and dtype may differ.
        p: exponent, any finite number >= 1; 1, 2 and 4 are fastest.
        collapse: "mean" divides the sum over channels by C, "sum" does not (which changes but what
            eps means), "max" takes ``max_c |A|^p``; its gradient goes to the first of the largest.
        form: "code" or "paper", as above.
        weights: one finite factor per pair; None is 1 for all.
        reduction: "sum" over the pairs, "none" for one value per pair, or "sample" for one per
            pair and sample, without the mean over the batch.
        resize: what to do with maps of different sizes. None raises; "maps" interpolates the
            teacher's raw map (bilinearly, ``align_corners=False``) to the student's size (the
            paper); "features" pools the larger features to the smaller size in each dimension
            before the power (torch's ``adaptive_avg_pool``, as RepDistiller and mdistiller), in
            float32 at least, for which 16-bit features are copied.
        attend: "spatial"; "channel" swaps the roles of channels and positions (one weight per
            channel, ``Q[b, c] = (1/N) sum_n |A[b, c, n]|^p``: equal C, any H x W); "both" is the
            sum of the two.
        channel_dim: 1, or -1 for features of shape (B, H, W, C) and tokens (B, N, C). This and the
            next two may be a pair (student's, teacher's).
        skip_tokens: how many tokens in front (class, registers) are left out of (B, N, C).
        map_size: (H, W) of the remaining tokens, for a partner that has H and W.
        mask: (B, H, W), bool or float, or a list of one per pair: a factor for the raw maps of
            both sides, such as 0 at padding. Another size is averaged to the map's.
        sample_weights: (B,), a factor for each sample's loss; the mean still divides by B.
        absolute: False for ``A^p`` in place of ``|A|^p`` (whole p only, and not with "max"). An odd
            p is plain PyTorch then, with its time and its temporaries of the features' size.
        eps: lower bound of the norm, > 0.
        eps_mode: "max" as above, or "add" for ``Q / (||Q||_2 + eps)``.

    Returns:
        A scalar; with ``reduction="none"`` a vector with one value per pair, with "sample" (pairs,
        B): float64 if any feature is, else float32 (also under autocast).

    Raises:
        TypeError: an argument is not of the kind above (not a tensor, an integer, complex or
            sparse one, a number that is none).
        ValueError: shapes, batch sizes, map sizes, devices or lengths that do not match, an empty
            tensor or list, an option out of its range or of tokens for a side without any.

    Source: Zagoruyko & Komodakis, "Paying More Attention to Attention", ICLR 2017, section 3.1.
    """
    # A plain tuple in the order of LossArguments: of a tiny pair's time most is Python's.
    options = p, collapse, form, reduction, eps_mode, eps, weights, resize, attend
    layout = channel_dim, skip_tokens, map_size
    return _loss.at_loss(student, teacher, (*options, *layout, mask, sample_weights, absolute))


class ATLoss(nn.Module):
    """Keep the options of ``at_loss``: ``ATLoss(p=2)(student, teacher)``.

    The formula is that of :func:`at_fused.at_loss`. Has no parameters.

    Args:
        options: keyword arguments of :func:`at_fused.at_loss`, but for ``mask`` and
            ``sample_weights``, which belong to a batch and are given in the call. They are checked
            here, once, and can be read back from the attribute of this name.

    Raises:
        TypeError, ValueError: an option that does not exist, or is not allowed.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1.
    """

    def __init__(self, **options: Unpack[ATOptions]) -> None:
        super().__init__()
        self.options = check_kept("ATLoss", options, ATOptions.__annotations__)

    def forward(
        self,
        student: Tensor | Sequence[Tensor],
        teacher: Tensor | Sequence[Tensor],
        mask: Tensor | Sequence[Tensor] | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of one pair, or of all pairs of two sequences.

        Args:
            student, teacher, mask, sample_weights: as in :func:`at_fused.at_loss`.

        Returns:
            As :func:`at_fused.at_loss`: a scalar, (pairs,) or (pairs, B), float32 or float64.

        Raises:
            TypeError, ValueError: as :func:`at_fused.at_loss`.
        """
        return at_loss(student, teacher, mask=mask, sample_weights=sample_weights, **self.options)

    def extra_repr(self) -> str:
        """Return the options that were given, as in the call."""
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
    """The loss of :func:`at_loss` and its gradient for the student, in one call.

    ``(L, scale * dL/dS)``, where forward and backward one after the other would read S twice. For
    loops that put gradients together themselves:

        loss, gradients = at_value_and_grad(features, teacher_features, scale=beta)
        torch.autograd.backward([task_loss, *features], [None, *gradients])

    Neither result is part of a graph: nothing is differentiated through this call. It does not
    matter whether the features require gradients. It is ``at_loss`` and its backward, and cannot be
    exported nor compiled in one graph, with ``collapse="max"``, maps of different sizes, channel
    attention, a mask that requires a gradient, and odd powers without ``absolute``.

    Args:
        student, teacher, mask, sample_weights, options: as in :func:`at_loss`.
        scale: factor of the gradient, not of the loss: beta, a loss scale. A number in the range of
            float32 (of float64 for such features), or a tensor of one element on the features'
            device, which is not waited for: beyond that range it is inf.

    Returns:
        The loss, as :func:`at_loss` gives it (with ``reduction="none"`` the gradient is that of the
        sum), and the gradient: a tensor, or a list where ``student`` is a sequence. Gradients have
        the students' shapes and dtypes, and the strides of ``torch.empty_like``.

    Raises:
        TypeError, ValueError: as :func:`at_loss`, and for a ``scale`` that is not as above.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1; the gradient in closed form.
    """
    for name in options.keys() - ATOptions.__annotations__.keys():
        raise TypeError(f"at_value_and_grad takes no option {name!r}")
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
    """Attention map of a feature: the p-power mean, sum or maximum over its channels.

    ``Q[b, n] = (1/C) sum_c |A[b, c, n]|^p`` with ``collapse="mean"``, without 1/C with "sum",
    ``max_c |A[b, c, n]|^p`` with "max"; with ``normalize`` divided by ``max(||Q[b]||_2, eps)``, the
    norm over all positions of a sample. ``attend="channel"`` swaps the roles of channels and
    positions.

    Args:
        x: (B, C, H, W), (B, C, L) or (B, C, D, H, W); or (B, H, W, C) or tokens (B, N, C) with
            ``channel_dim=-1``.
        normalize: whether to divide by the norm, which alone eps and eps_mode are for.
        p, collapse, channel_dim, skip_tokens, map_size, absolute, eps, eps_mode: as in
            :func:`at_loss`; one value each.
        attend: "spatial" or "channel".

    Returns:
        (B, H, W), or (B, C) of channels: float64 for float64 features, else float32.
        Differentiable to any order.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (F_sum, F_sum^p, F_max^p).
    """
    options = {"p": p, "collapse": collapse, "attend": attend, "absolute": absolute}
    options |= {"normalize": normalize, "eps": eps, "eps_mode": eps_mode}
    layout = layout_of_one(x, channel_dim, skip_tokens, map_size, options)
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
    """A feature on its way through a network, and its attention map.

        x, q = attention_tap(x)

    The first result is ``x`` itself, for the next layer; the second its map Q (``normalize``: q),
    as :func:`attention_map` has it, for :func:`map_loss`. The backward gets both gradients, and
    adds the map's into the other in one sweep:

        dL/dx[b, c, n] = dL/dx' + scale * p * dL/dQ[b, n] * |x|^(p-1) * sign(x)

    with a scale of 1/C for ``collapse="mean"``, else 1, and for "max" in the largest channel alone;
    in place where no other branch of the graph, hook, view or capture holds that gradient, else,
    and with ``create_graph``, in a new tensor. So the loss costs no feature-sized memory, and a
    teacher's feature need not outlive its map.

    Args:
        x: as in :func:`attention_map`.
        p, collapse, normalize, attend, channel_dim, skip_tokens, map_size, absolute, eps, eps_mode:
            as in :func:`attention_map`.

    Returns:
        x (a view of it where it requires a gradient, which must not be changed in place), and the
        map, (B, H, W) or (B, C): float64 for float64 features, else float32. Differentiable to any
        order. Without gradients the map is all that is kept.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1 (F_sum, F_sum^p, F_max^p).
    """
    options = {"p": p, "collapse": collapse, "attend": attend, "absolute": absolute}
    options |= {"normalize": normalize, "eps": eps, "eps_mode": eps_mode}
    layout = layout_of_one(x, channel_dim, skip_tokens, map_size, options)
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
    """Attention-transfer loss between attention maps, which taps or :func:`attention_map` made.

    With ``q[b] = Q[b] / max(||Q[b]||_2, eps)`` the loss of a pair is, as in :func:`at_loss`:

        form="code"     1/(B N) * sum_b ||qs[b] - qt[b]||_2^2
        form="paper"    1/B     * sum_b ||qs[b] - qt[b]||_2

    Args:
        student: (B, H, W), or a list or tuple of such maps, one per stage; also (B, L), (B, C) and
            (B, D, H, W). float32 or float64, raw or normalised, which changes nothing but what eps
            means.
        teacher: (B, H, W) as above, as many maps, each with the B of its partner, and its size
            unless ``resize="maps"`` interpolates it (bilinearly) to the student's.
        form, weights, reduction, mask, sample_weights, eps, eps_mode: as in :func:`at_loss`.
        resize: None or "maps".

    Returns:
        As :func:`at_loss`: a scalar, (pairs,) or (pairs, B); float64 if any map is, else float32.

    Raises:
        TypeError, ValueError: as :func:`at_loss`.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1.
    """
    given = LossArguments(form=form, reduction=reduction, eps_mode=eps_mode, eps=eps)
    given = given._replace(weights=weights, resize=resize, mask=mask, sample_weights=sample_weights)
    return _loss.map_loss(student, teacher, given)


def at(
    x: Tensor,
    *,
    p: float = 2.0,
    collapse: str = "mean",
    channel_dim: int = 1,
    eps: float = 1e-12,
) -> Tensor:
    """Normalised, flattened attention map, the ``at(x)`` of the authors' program.

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
