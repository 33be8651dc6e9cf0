"""The losses as their public functions are called: checked, and carried out by the operators.

Most options are one operator (``at_loss``). ``collapse="max"``, maps of different sizes and signed
powers are two, ``attention_map`` and ``map_loss``, with torch's own operators between them for what
concerns the maps alone. ``resize="features"`` pools with torch's operator before all that.
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
    pair_weights,
    paired,
    savable,
)
from at_fused._layouts import CHANNELS_FIRST, FeatureLayout, channels_as_positions, feature_layouts
from at_fused._maps import attention_maps, interpolate, keeps_sign, pool, resized_mask
from at_fused._options import LossArguments, LossOptions
from at_fused.backends.outputs import accumulate_dtype

_OTHER_DEFAULTS = LossArguments()[len(LossOptions._fields) :]


# ---- the public functions ------------------------------------------------------------------------


def at_loss(student: Any, teacher: Any, arguments: tuple[Any, ...]) -> Tensor:
    """Return the loss of features; ``arguments`` in the order of ``LossArguments``."""
    found = call_unchecked(_ops.at_loss, student, teacher, arguments)
    return found[0] if found else _loss(checked_inputs(student, teacher, LossArguments(*arguments)))


def map_loss(student: Any, teacher: Any, arguments: LossArguments) -> Tensor:
    """Return the loss of raw maps (B, *spatial)."""
    check_options(arguments._asdict(), CHOICES | {"resize": (None, "maps")})
    return map_loss_of_checked_options(student, teacher, arguments)


def map_loss_of_checked_options(student: Any, teacher: Any, arguments: LossArguments) -> Tensor:
    """Return the loss of raw maps, of options that ``check_options`` has let pass before."""
    students, teachers = paired(student, teacher, check_map)
    inputs = _inputs(students, teachers, arguments)
    check_sizes(students, teachers, inputs.resize)
    return _compare(inputs, [x.flatten(1) for x in students + teachers])


# ---- ordinary pairs ------------------------------------------------------------------------------


def call_unchecked(
    call: Callable[..., Any], student: Any, teacher: Any, arguments: tuple[Any, ...], *more: Any
) -> Any:
    """Return what an operator makes of ordinary pairs, handed to it as they are.

    On small features most of a call's time is Python's. The operator checks what memory needs; here
    is what it would take and ``at_loss`` does not. After None ``checked_inputs`` says what is
    wrong, if anything.
    """
    if isinstance(student, Tensor) and isinstance(teacher, Tensor):
        student, teacher = [student], [teacher]
    p, collapse, form, reduction, eps_mode, eps, *others = arguments
    if (
        torch.compiler.is_compiling()
        or type(student) not in (list, tuple)
        or type(teacher) not in (list, tuple)
        or type(p) not in (float, int)
        or type(eps) not in (float, int)
        or not type(collapse) is type(form) is type(reduction) is type(eps_mode) is str
        or collapse == "max"
        or not all(map(operator.is_, others, _OTHER_DEFAULTS))
    ):
        return None
    try:
        for s, t in zip(student, teacher, strict=True):
            size = s.shape[2:]
            if t.shape[2:] != size or size.numel() == 1 or not 3 <= s.dim() <= 5:
                return None
        options = p, collapse, form, reduction, eps_mode, eps
        return call(student, teacher, [], [], [], *options, *more)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


# ---- all others: checked -------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """The checked inputs of a loss: features (B, C, *spatial), and what to do with them.

    ``skip_tokens`` is empty, or holds a number for each feature, students first; ``whole`` are then
    the features before any token was cut off.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    weights: list[float]
    options: LossOptions
    masks: list[Tensor] | None
    sample_weights: Tensor | None
    resize: str | None
    absolute: bool
    attend: str
    layout: FeatureLayout  # the students'
    whole: list[Tensor] = []  # noqa: RUF012 - never changed
    skip_tokens: list[int] = []  # noqa: RUF012

    def is_fused(self) -> bool:
        """Return True where one operator does all of it, for maps that agree in size."""
        return (
            self.options.collapse != "max"
            and not keeps_sign(self.options.p, self.absolute)
            and not (self.masks and any(mask.requires_grad for mask in self.masks))
        )

    def features(self) -> list[Tensor]:
        """Return the features as the operators take them."""
        return self.whole or self.students + self.teachers

    def operator_arguments(self) -> tuple[Any, ...]:
        """Return the arguments of the operator ``at_loss``."""
        n, features = len(self.students), self.features()
        masks = [
            resized_mask(mask, s.shape[2:], accumulate_dtype(s, t))
            for mask, s, t in zip(self.masks or [], self.students, self.teachers, strict=False)
        ]
        lists = features[:n], features[n:], masks, self.weights, self.skip_tokens
        return *lists, *self.operator_options()

    def operator_options(self) -> LossOptions:
        """Return the operators' options: weights of samples come before their mean."""
        weighted = self.sample_weights is not None
        return self.options._replace(reduction="sample") if weighted else self.options


def checked_inputs(student: Any, teacher: Any, arguments: LossArguments) -> LossInputs:
    """Check the arguments of ``at_loss``, and bring its features to (B, C, *spatial)."""
    check_options(arguments._asdict())
    layouts = feature_layouts(
        arguments.channel_dim,
        arguments.skip_tokens,
        arguments.map_size,
        has_tokens=(_may_have_tokens(student), _may_have_tokens(teacher)),
    )
    given = paired(student, teacher)
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
        LossOptions(float(arguments.p), *arguments[1:5], float(arguments.eps)),
        check_masks(arguments.mask, students, layout.skip_tokens),
        check_sample_weights(arguments.sample_weights, students),
        arguments.resize,
        arguments.absolute,
        arguments.attend,
        layout,
    )


# ---- the loss ------------------------------------------------------------------------------------


def _loss(inputs: LossInputs) -> Tensor:
    if inputs.attend == "spatial":
        return _spatial_loss(inputs)
    check_channels(inputs.students, inputs.teachers)
    # Channel attention is spatial attention of the transposed views.
    channel = inputs._replace(
        students=[channels_as_positions(x) for x in inputs.students],
        teachers=[channels_as_positions(x) for x in inputs.teachers],
        whole=[],
        skip_tokens=[],
        resize=None,
    )
    if inputs.attend == "channel":
        return _spatial_loss(channel)
    if inputs.resize is None and inputs.options.reduction == "sum" and not inputs.whole:
        # One call for both.
        both = inputs._replace(
            students=inputs.students + channel.students,
            teachers=inputs.teachers + channel.teachers,
            weights=inputs.weights * 2,
        )
        return _spatial_loss(both)
    return _spatial_loss(channel) + _spatial_loss(inputs)


def _spatial_loss(inputs: LossInputs) -> Tensor:
    same = check_sizes(inputs.students, inputs.teachers, inputs.resize)
    if inputs.resize == "features" and not same:
        inputs, same = _pooled(inputs), True
    if same and inputs.is_fused():
        return reduce_samples(inputs, _ops.at_loss(*inputs.operator_arguments())[0])
    p, collapse = inputs.options[:2]
    return _compare(
        inputs, attention_maps(inputs.features(), p, collapse, inputs.absolute, inputs.skip_tokens)
    )


def _pooled(inputs: LossInputs) -> LossInputs:
    """Average both features of a pair to the smaller size in each dimension."""
    students, teachers = [], []
    for s, t in zip(inputs.students, inputs.teachers, strict=True):
        size = [min(n, m) for n, m in zip(s.shape[2:], t.shape[2:], strict=True)]
        students.append(pool(s, size))
        teachers.append(pool(t, size))
    return inputs._replace(students=students, teachers=teachers, whole=[], skip_tokens=[])


def _compare(inputs: LossInputs, maps: list[Tensor]) -> Tensor:
    """Return the loss of raw maps (B, N), the students' first, resized to theirs and masked."""
    n = len(inputs.students)
    sizes = [x.shape[2:] for x in inputs.students]
    given = [x.shape[2:] for x in inputs.teachers]
    maps = maps[:n] + [interpolate(*each) for each in zip(maps[n:], given, sizes, strict=True)]
    if inputs.masks is not None:
        maps = [
            savable(q) * resized_mask(mask, size, q.dtype)
            for q, mask, size in zip(maps, inputs.masks * 2, sizes * 2, strict=True)
        ]
    options = inputs.operator_options()[2:]
    return reduce_samples(inputs, _ops.map_loss(maps[:n], maps[n:], inputs.weights, *options)[0])


def reduce_samples(inputs: LossInputs, loss: Tensor) -> Tensor:
    """Weigh the losses of samples, and reduce them, where the operator has not."""
    if inputs.sample_weights is None:
        return loss
    loss = loss * inputs.sample_weights.to(loss.dtype)
    reduction = inputs.options.reduction
    if reduction == "sample":
        return loss
    loss = loss.mean(1)
    return loss.sum() if reduction == "sum" else loss
