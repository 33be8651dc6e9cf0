"""Losses for the public functions: checks of the arguments, and calls of the operators.

Most options need one operator, ``at_loss``. ``collapse="max"``, maps of different sizes and signed
powers need two, ``attention_map`` and ``map_loss``; torch resizes and masks the maps in between.
``resize="features"`` first pools the features with torch.
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
    as_pairs,
    check_channels,
    check_map,
    check_masks,
    check_one_batch,
    check_options,
    check_sample_weights,
    check_sizes,
    pair_weights,
    savable,
)
from at_fused._layouts import CHANNELS_FIRST, FeatureLayout, channels_as_positions, feature_layouts
from at_fused._maps import attention_maps, interpolate, keeps_sign, pool, resized_mask
from at_fused._options import LossArguments, LossOptions
from at_fused.backends.outputs import accumulate_dtype

_OTHER_DEFAULTS = LossArguments()[len(LossOptions._fields) :]


# ---- entry points of the public functions --------------------------------------------------------


def at_loss(student: Any, teacher: Any, arguments: tuple[Any, ...]) -> Tensor:
    """Return the loss of features; ``arguments`` have the order of ``LossArguments``."""
    result = call_unchecked(_ops.at_loss, student, teacher, arguments)
    if result:
        return result[0]
    return _checked_loss(checked_inputs(student, teacher, LossArguments(*arguments)))


def map_loss(student: Any, teacher: Any, arguments: LossArguments) -> Tensor:
    """Return the loss of raw maps (B, *spatial)."""
    check_options(arguments._asdict(), CHOICES | {"resize": (None, "maps")})
    return map_loss_of_checked_options(student, teacher, arguments)


def map_loss_of_checked_options(student: Any, teacher: Any, arguments: LossArguments) -> Tensor:
    """Return the loss of raw maps for options that have passed ``check_options``."""
    students, teachers = as_pairs(student, teacher, check_map)
    inputs = _make_inputs(students, teachers, arguments)
    check_sizes(students, teachers, inputs.resize)
    return _loss_of_maps(inputs, [x.flatten(1) for x in students + teachers])


# ---- the fast path -------------------------------------------------------------------------------


def call_unchecked(
    call: Callable[..., Any], student: Any, teacher: Any, arguments: tuple[Any, ...], *more: Any
) -> Any:
    """Call the operator on common arguments without checks in Python; return None for all others.

    For small features, Python takes most of the time. The operator itself checks what memory safety
    needs. The conditions below reject what it would accept but ``at_loss`` does not. After None,
    call ``checked_inputs``, which raises an error if an argument is wrong.
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


# ---- checked inputs ------------------------------------------------------------------------------


class LossInputs(NamedTuple):
    """Checked inputs of a loss: features (B, C, *spatial) and options.

    ``skip_tokens`` is empty, or has a number for each feature, students first. ``full_features``
    are then the features with all their tokens.
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
    full_features: list[Tensor] = []  # noqa: RUF012 - never changed
    skip_tokens: list[int] = []  # noqa: RUF012

    def is_fused(self) -> bool:
        """Return True if one operator computes the loss of maps of equal sizes."""
        return (
            self.options.collapse != "max"
            and not keeps_sign(self.options.p, self.absolute)
            and not (self.masks and any(mask.requires_grad for mask in self.masks))
        )

    def features(self) -> list[Tensor]:
        """Return the features for operators that skip tokens themselves."""
        return self.full_features or self.students + self.teachers

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
        """Return the operators' options; sample weights need the loss of each sample."""
        has_weights = self.sample_weights is not None
        return self.options._replace(reduction="sample") if has_weights else self.options


def checked_inputs(student: Any, teacher: Any, arguments: LossArguments) -> LossInputs:
    """Check the arguments of ``at_loss``, and view its features as (B, C, *spatial)."""
    check_options(arguments._asdict())
    layouts = feature_layouts(
        arguments.channel_dim,
        arguments.skip_tokens,
        arguments.map_size,
        has_tokens=(_may_have_tokens(student), _may_have_tokens(teacher)),
    )
    sides = as_pairs(student, teacher)
    students, teachers = (
        [layout.to_channels_first(x, f"{side} of pair {i}") for i, x in enumerate(features)]
        for side, layout, features in zip(("student", "teacher"), layouts, sides, strict=True)
    )
    inputs = _make_inputs(students, teachers, arguments, layouts[0])
    if not (layouts[0].skip_tokens or layouts[1].skip_tokens):
        return inputs
    originals = [
        (layout, x) for layout, features in zip(layouts, sides, strict=True) for x in features
    ]
    return inputs._replace(
        full_features=[
            layout.all_tokens().to_channels_first(x) if layout.has_tokens(x) else view
            for (layout, x), view in zip(originals, students + teachers, strict=True)
        ],
        skip_tokens=[layout.skip_tokens if layout.has_tokens(x) else 0 for layout, x in originals],
    )


def _may_have_tokens(features: Any) -> bool:
    """Return False if no feature has the rank of tokens (B, N, C)."""
    items = features if isinstance(features, (list, tuple)) else [features]
    return any(not isinstance(x, Tensor) or x.dim() == 3 for x in items)


def _make_inputs(
    students: list[Tensor],
    teachers: list[Tensor],
    arguments: LossArguments,
    layout: FeatureLayout = CHANNELS_FIRST,
) -> LossInputs:
    if arguments.reduction == "sample":
        check_one_batch(students, "reduction='sample' needs pairs of one batch size")
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


def _checked_loss(inputs: LossInputs) -> Tensor:
    if inputs.attend == "spatial":
        return _spatial_loss(inputs)
    check_channels(inputs.students, inputs.teachers)
    # Channel attention is spatial attention of the transposed views.
    channel = inputs._replace(
        students=[channels_as_positions(x) for x in inputs.students],
        teachers=[channels_as_positions(x) for x in inputs.teachers],
        full_features=[],
        skip_tokens=[],
        resize=None,
    )
    if inputs.attend == "channel":
        return _spatial_loss(channel)
    if inputs.resize is None and inputs.options.reduction == "sum" and not inputs.full_features:
        # One call of the operator instead of two.
        combined = inputs._replace(
            students=inputs.students + channel.students,
            teachers=inputs.teachers + channel.teachers,
            weights=inputs.weights * 2,
        )
        return _spatial_loss(combined)
    return _spatial_loss(channel) + _spatial_loss(inputs)


def _spatial_loss(inputs: LossInputs) -> Tensor:
    same_size = check_sizes(inputs.students, inputs.teachers, inputs.resize)
    if inputs.resize == "features" and not same_size:
        inputs, same_size = _pooled(inputs), True
    if same_size and inputs.is_fused():
        return reduce_samples(inputs, _ops.at_loss(*inputs.operator_arguments())[0])
    p, collapse = inputs.options[:2]
    return _loss_of_maps(
        inputs, attention_maps(inputs.features(), p, collapse, inputs.absolute, inputs.skip_tokens)
    )


def _pooled(inputs: LossInputs) -> LossInputs:
    """Pool both features of each pair to the smaller size in each dimension."""
    students, teachers = [], []
    for s, t in zip(inputs.students, inputs.teachers, strict=True):
        size = [min(n, m) for n, m in zip(s.shape[2:], t.shape[2:], strict=True)]
        students.append(pool(s, size))
        teachers.append(pool(t, size))
    return inputs._replace(students=students, teachers=teachers, full_features=[], skip_tokens=[])


def _loss_of_maps(inputs: LossInputs, maps: list[Tensor]) -> Tensor:
    """Resize the teachers' raw maps (B, N), mask all maps and return the loss; students first."""
    n = len(inputs.students)
    sizes = [x.shape[2:] for x in inputs.students]
    teacher_sizes = [x.shape[2:] for x in inputs.teachers]
    resized = [interpolate(*each) for each in zip(maps[n:], teacher_sizes, sizes, strict=True)]
    maps = maps[:n] + resized
    if inputs.masks is not None:
        maps = [
            savable(q) * resized_mask(mask, size, q.dtype)
            for q, mask, size in zip(maps, inputs.masks * 2, sizes * 2, strict=True)
        ]
    options = inputs.operator_options()[2:]
    return reduce_samples(inputs, _ops.map_loss(maps[:n], maps[n:], inputs.weights, *options)[0])


def reduce_samples(inputs: LossInputs, loss: Tensor) -> Tensor:
    """Apply the sample weights, if there are any, and then the reduction of the options."""
    if inputs.sample_weights is None:
        return loss
    loss = loss * inputs.sample_weights.to(loss.dtype)
    reduction = inputs.options.reduction
    if reduction == "sample":
        return loss
    loss = loss.mean(1)
    return loss.sum() if reduction == "sum" else loss
