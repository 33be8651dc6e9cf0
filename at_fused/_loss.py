"""The losses as their public functions are called: checked, and carried out by the operators.

Most options are one operator (``at_loss``). ``collapse="max"``, maps of different sizes and signed
powers are two, ``attention_map`` and ``map_loss``, with torch's own operators between them for what
concerns the maps alone, a C-th of the features. Where taps made the maps, the second is all that is
left. ``resize="features"`` pools with torch's operator first, and leaves pairs of one size to
whatever the other options take.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from at_fused import _ops
from at_fused._arguments import (
    CHOICES,
    check_channels,
    check_map,
    check_masks,
    check_one_batch,
    check_options,
    check_sample_weights,
    check_sizes,
    feature_layouts,
    gradient_scale,
    pair_weights,
    paired,
    savable,
)
from at_fused._maps import (
    attention_maps,
    interpolate,
    keeps_sign,
    pool,
    pool_backward,
    resized_mask,
    signed_gradients,
)
from at_fused._options import (
    CHANNELS_FIRST,
    FeatureLayout,
    LossArguments,
    LossOptions,
    channels_as_positions,
)
from at_fused.backends import eager
from at_fused.backends.outputs import accumulate_dtype, laid_out_as

_FP32_MAX = torch.finfo(torch.float32).max
_OF_OPERATORS = len(LossOptions._fields)  # so many arguments, the first ones
_OTHER_DEFAULTS = LossArguments()[_OF_OPERATORS:]


class LossInputs(NamedTuple):
    """The checked inputs of a loss: features (B, C, *spatial), and what to do with them.

    ``skip_tokens`` is empty, or holds a number for each feature, students first; ``whole`` are then
    the features before any token was cut off.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    weights: list[float]
    options: LossOptions
    masks: list[Tensor] | None = None
    sample_weights: Tensor | None = None
    resize: str | None = None
    absolute: bool = True
    attend: str = "spatial"
    layout: FeatureLayout = CHANNELS_FIRST  # the students'
    whole: list[Tensor] = []  # noqa: RUF012 - never changed
    skip_tokens: list[int] = []  # noqa: RUF012

    def features(self) -> list[Tensor]:
        """Return the features as the operators take them."""
        return self.whole or self.students + self.teachers

    def is_fused(self) -> bool:
        """Return True where one operator does all of it, for maps that agree in size."""
        return (
            self.options.collapse != "max"
            and not keeps_sign(self.options.p, self.absolute)
            and not (self.masks and any(mask.requires_grad for mask in self.masks))
        )

    def operator_options(self) -> LossOptions:
        """Return the operators' options: weights of samples come before their mean."""
        by_sample = self.sample_weights is not None
        return self.options._replace(reduction="sample") if by_sample else self.options


# ---- the public functions ------------------------------------------------------------------------


def at_loss(student: Any, teacher: Any, arguments: LossArguments) -> Tensor:
    """Return the loss of features."""
    loss = _unchecked(_ops.at_loss, student, teacher, arguments)
    return _loss(_checked(student, teacher, arguments)) if loss is None else loss


def at_value_and_grad(
    student: Any, teacher: Any, arguments: LossArguments, scale: float | Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the students' gradients times ``scale``, without a graph."""
    if isinstance(scale, (float, int)) and abs(scale) <= _FP32_MAX and type(scale) is not bool:
        found = _unchecked(_ops.at_value_and_grad, student, teacher, arguments, scale, None)
        if found is not None:
            return found
    inputs = _checked(student, teacher, arguments)
    features = inputs.students + inputs.teachers
    dtype = accumulate_dtype(*features)
    factor, loss_gradient = gradient_scale(scale, features[0].device, dtype)
    given = [student] if isinstance(student, Tensor) else student
    with torch.no_grad():
        loss, gradients = _value_and_grad(inputs, factor, loss_gradient)
        gradients = [
            laid_out_as(x, inputs.layout.restore(g, x))
            for g, x in zip(gradients, given, strict=True)
        ]
    return loss, gradients


def map_loss(student: Any, teacher: Any, arguments: LossArguments) -> Tensor:
    """Return the loss of raw maps (B, *spatial)."""
    check_options(arguments._asdict(), CHOICES | {"resize": (None, "maps")})
    students, teachers = paired(student, teacher, check_map)
    inputs = _inputs(students, teachers, arguments)
    check_sizes(students, teachers, inputs.resize, of_maps=True)
    return _compare(inputs, [x.flatten(1) for x in students + teachers])


# ---- arguments -----------------------------------------------------------------------------------


def _unchecked(
    call: Callable[..., Any], student: Any, teacher: Any, arguments: LossArguments, *more: Any
) -> Any:
    """Return what an operator makes of ordinary pairs, handed to it as they are.

    On small features most of a call's time is Python's. The operator checks what memory needs; here
    is what it would take and ``at_loss`` does not. After None ``_checked`` says what is wrong, if
    anything.
    """
    single = isinstance(student, Tensor) and isinstance(teacher, Tensor)
    students = [student] if single else student
    teachers = [teacher] if single else teacher
    if (
        torch.compiler.is_compiling()
        or type(students) not in (list, tuple)
        or type(teachers) not in (list, tuple)
        or type(arguments.p) not in (float, int)
        or type(arguments.eps) not in (float, int)
        or not type(arguments.collapse) is type(arguments.form) is str
        or not type(arguments.reduction) is type(arguments.eps_mode) is str
        or arguments.collapse == "max"
        or not all(map(operator.is_, arguments[_OF_OPERATORS:], _OTHER_DEFAULTS))
    ):
        return None
    try:
        for s, t in zip(students, teachers, strict=True):
            size = s.shape[2:]
            if t.shape[2:] != size or size.numel() == 1 or not 3 <= s.dim() <= 5:
                return None
            if s.layout is not torch.strided or t.layout is not torch.strided:
                return None
        return call(students, teachers, [], [], [], *arguments[:_OF_OPERATORS], *more)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def _checked(student: Any, teacher: Any, arguments: LossArguments) -> LossInputs:
    """Check the arguments of ``at_loss``, and bring its features to (B, C, *spatial)."""
    check_options(arguments._asdict())
    layouts = feature_layouts(
        arguments.channel_dim,
        arguments.skip_tokens,
        arguments.map_size,
        has_tokens=(_may_have_tokens(student), _may_have_tokens(teacher)),
    )
    given = [*paired(student, teacher)]
    students, teachers = (
        [layout.to_channels_first(x, f"{side} of pair {i}") for i, x in enumerate(features)]
        for side, layout, features in zip(("student", "teacher"), layouts, given, strict=True)
    )
    inputs = _inputs(students, teachers, arguments, layouts[0])
    if not (layouts[0].skip_tokens or layouts[1].skip_tokens):
        return inputs
    of_layout = [(y, x) for y, features in zip(layouts, given, strict=True) for x in features]
    return inputs._replace(
        whole=[
            y.all_tokens().to_channels_first(x) if y.has_tokens(x) else placed
            for (y, x), placed in zip(of_layout, students + teachers, strict=True)
        ],
        skip_tokens=[y.skip_tokens if y.has_tokens(x) else 0 for y, x in of_layout],
    )


def _may_have_tokens(given: Any) -> bool:
    """Return False for features none of which is (B, N, C)."""
    several = given if isinstance(given, (list, tuple)) else [given]
    return any(not isinstance(x, Tensor) or x.dim() == 3 for x in several)


def _inputs(
    students: list[Tensor],
    teachers: list[Tensor],
    arguments: LossArguments,
    layout: FeatureLayout = CHANNELS_FIRST,
) -> LossInputs:
    if arguments.reduction == "sample":
        check_one_batch(students, "reduction='sample' takes pairs of one batch size")
    return LossInputs(
        students,
        teachers,
        pair_weights(arguments.weights, len(students)),
        arguments.options(),
        check_masks(arguments.mask, students, layout.skip_tokens),
        check_sample_weights(arguments.sample_weights, students),
        arguments.resize,
        arguments.absolute,
        arguments.attend,
        layout,
    )


# ---- the loss ------------------------------------------------------------------------------------


def _loss(inputs: LossInputs) -> Tensor:
    parts = _spatial(inputs)
    if len(parts) == 1:
        return _spatial_loss(parts[0])
    spatial, channel = parts
    if inputs.resize is None and inputs.options.reduction == "sum" and not inputs.whole:
        # One call for both.
        both = inputs._replace(
            students=spatial.students + channel.students,
            teachers=spatial.teachers + channel.teachers,
            weights=inputs.weights * 2,
        )
        return _spatial_loss(both)
    return _spatial_loss(channel) + _spatial_loss(spatial)


def _spatial(inputs: LossInputs) -> list[LossInputs]:
    """Return inputs of spatial attention: channel attention is the other layout's."""
    if inputs.attend == "spatial":
        return [inputs]
    check_channels(inputs.students, inputs.teachers)
    channel = inputs._replace(
        students=[channels_as_positions(x) for x in inputs.students],
        teachers=[channels_as_positions(x) for x in inputs.teachers],
        whole=[],
        skip_tokens=[],
        resize=None,
    )
    return [channel] if inputs.attend == "channel" else [inputs, channel]


def _spatial_loss(inputs: LossInputs) -> Tensor:
    same = check_sizes(inputs.students, inputs.teachers, inputs.resize)
    if inputs.resize == "features" and not same:
        inputs, same = _pooled(inputs), True
    n, features = len(inputs.students), inputs.features()
    if same and inputs.is_fused():
        lists = features[:n], features[n:], _flat_masks(inputs), inputs.weights, inputs.skip_tokens
        return _reduce(inputs, _ops.at_loss(*lists, *inputs.operator_options()))
    p, collapse = inputs.options[:2]
    return _compare(
        inputs, attention_maps(features, p, collapse, inputs.absolute, inputs.skip_tokens)
    )


def _compare(inputs: LossInputs, raw: list[Tensor]) -> Tensor:
    """Return the loss of raw maps (B, N), the students' first."""
    n, (_, _, *options) = len(inputs.students), inputs.operator_options()
    maps, _ = _maps_to_compare(inputs, raw)
    return _reduce(inputs, _ops.map_loss(maps[:n], maps[n:], inputs.weights, *options))


def _reduce(inputs: LossInputs, loss: Tensor) -> Tensor:
    """Weigh the losses of samples, and reduce them, where the operator has not."""
    if inputs.sample_weights is None:
        return loss
    loss = loss * inputs.sample_weights.to(loss.dtype)
    reduction = inputs.options.reduction
    if reduction == "sample":
        return loss
    loss = loss.mean(1)
    return loss.sum() if reduction == "sum" else loss


# ---- value and gradient --------------------------------------------------------------------------


def _value_and_grad(
    inputs: LossInputs, scale: float, loss_gradient: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the gradient of its sum for the students, channels first.

    Skipped tokens may be there, in front. The gradient is multiplied by ``scale`` and
    ``loss_gradient``, a scalar.
    """
    if inputs.attend == "spatial":
        return _spatial_value_and_grad(inputs, scale, loss_gradient)
    losses: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for part in _spatial(inputs._replace(whole=[], skip_tokens=[])):
        loss, found = _spatial_value_and_grad(part, scale, loss_gradient)
        if part.students is not inputs.students:  # the transposed views of channel attention
            pairs = zip(found, inputs.students, strict=True)
            found = [g.transpose(1, 2).reshape(x.shape) for g, x in pairs]
        losses.append(loss)
        gradients.append(found)
    return sum(losses[1:], losses[0]), [sum(g[1:], g[0]) for g in zip(*gradients, strict=True)]


def _spatial_value_and_grad(
    inputs: LossInputs, scale: float, loss_gradient: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    same = check_sizes(inputs.students, inputs.teachers, inputs.resize)
    given = inputs.features()
    if inputs.resize == "features" and not same:
        given, inputs, same = inputs.students, _pooled(inputs), True
    n, features = len(inputs.students), inputs.features()
    if inputs.sample_weights is not None:
        weights = inputs.sample_weights.to(accumulate_dtype(*features)).expand(n, -1)
        by_sample = inputs.options.reduction == "sample"
        weights = weights if by_sample else weights / weights.shape[1]
        loss_gradient = weights if loss_gradient is None else weights * loss_gradient
    if same and inputs.is_fused():
        lists = features[:n], features[n:], _flat_masks(inputs), inputs.weights, inputs.skip_tokens
        loss, gradients = _ops.at_value_and_grad(
            *lists, *inputs.operator_options(), scale, loss_gradient
        )
    else:
        loss, gradients = _through_maps(inputs, scale, loss_gradient)
    gradients = [pool_backward(g, x).to(x.dtype) for g, x in zip(gradients, given, strict=False)]
    return _reduce(inputs, loss), gradients


def _through_maps(
    inputs: LossInputs, scale: float, loss_gradient: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the operator's loss and the students' gradients, with what maps alone take between."""
    n, features = len(inputs.students), inputs.features()
    p, collapse, *options = inputs.operator_options()
    signed = keeps_sign(p, inputs.absolute)
    found = (
        attention_maps(features, p, collapse, False, inputs.skip_tokens)
        if signed
        else _ops.attention_map(features, p, collapse, inputs.skip_tokens)
    )
    maps, masks = _maps_to_compare(inputs, found[: 2 * n])
    loss, slopes = _ops.map_value_and_grad(maps[:n], maps[n:], inputs.weights, *options)
    students, skips = features[:n], inputs.skip_tokens[:n]
    coefficients = [
        k * scale * (p * eager.collapse_scale(x, collapse))
        for x, k in zip(students, slopes, strict=True)
    ]
    if masks:
        coefficients = [k * m for k, m in zip(coefficients, masks, strict=False)]
    if signed:
        return loss, signed_gradients(students, coefficients, loss_gradient, p, skips)
    pairs, channels = list(range(n)), found[2 * n : 3 * n]
    return loss, _ops.attention_map_backward(
        students, coefficients, loss_gradient, pairs, p, skips, channels
    )


# ---- between features and maps -------------------------------------------------------------------


def _pooled(inputs: LossInputs) -> LossInputs:
    """Average both features of a pair to the smaller size in each dimension."""
    students, teachers = [], []
    for s, t in zip(inputs.students, inputs.teachers, strict=True):
        size = [min(n, m) for n, m in zip(s.shape[2:], t.shape[2:], strict=True)]
        students.append(pool(s, size))
        teachers.append(pool(t, size))
    return inputs._replace(students=students, teachers=teachers, whole=[], skip_tokens=[])


def _maps_to_compare(inputs: LossInputs, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Bring raw maps to the students' sizes and mask them; also return the masks, if any."""
    n = len(inputs.students)
    sizes = [x.shape[2:] for x in inputs.students]
    given = [x.shape[2:] for x in inputs.teachers]
    maps = maps[:n] + [interpolate(*each) for each in zip(maps[n:], given, sizes, strict=True)]
    if inputs.masks is None:
        return maps, []
    masks = [
        resized_mask(mask, size, q.dtype)
        for mask, size, q in zip(inputs.masks * 2, sizes * 2, maps, strict=True)
    ]
    return [savable(q) * mask for q, mask in zip(maps, masks, strict=True)], masks


def _flat_masks(inputs: LossInputs) -> list[Tensor]:
    """Return each pair's mask as (B, N), as the operator takes it; nothing where there is none."""
    return [
        resized_mask(mask, s.shape[2:], accumulate_dtype(s, t))
        for mask, s, t in zip(inputs.masks or [], inputs.students, inputs.teachers, strict=False)
    ]
