"""A call of ``at_loss``: checked, and carried out by the operators.

Most options are one operator (``at_loss``). ``collapse="max"``, maps of different sizes and signed
powers are two, ``attention_map`` and ``map_loss``, with torch's own operators between them for what
concerns the maps alone, a C-th of the features. Where taps made the maps, the second is all that is
left. ``resize="features"`` pools with torch's operator first, and leaves pairs of one size to
whatever the other options take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused import _inputs, _ops
from at_fused._checks import check_choice, pair_weights, savable
from at_fused._inputs import MapSizes, Sides
from at_fused._maps import attention_maps, keeps_sign, signed_gradients
from at_fused._options import LossOptions
from at_fused.backends import eager
from at_fused.backends.results import accumulate_dtype

_FP32_POSITIONS = 32  # in a dimension; up to here weights in fp32 are right to 2e-6
_LISTS, _NUMBERS = (list, tuple), (float, int)
_SAMPLES = "reduction='sample' takes pairs of one batch size"


class Problem(NamedTuple):
    """A call of ``at_loss``, checked: features (B, C, *spatial), and what to do with them.

    ``skip_tokens`` is empty, or holds a number for each feature, students first; ``whole`` are then
    the features before any token was cut off.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    whole: list[Tensor]
    skip_tokens: list[int]
    weights: list[float]
    options: LossOptions
    absolute: bool
    resize: str | None
    attend: str
    masks: list[Tensor] | None
    sample_weights: Tensor | None

    def features(self) -> list[Tensor]:
        """Return the features as the operators take them."""
        return self.whole or self.students + self.teachers

    def one_operator(self) -> bool:
        """Return True where one operator does all of it, for maps that agree in size."""
        return (
            self.options.collapse != "max"
            and not keeps_sign(self.options.p, self.absolute)
            and not (self.masks and any(mask.requires_grad for mask in self.masks))
        )


def prepare(
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
) -> Problem:
    """Checks the arguments of ``at_loss``."""
    _inputs.check_options(
        p=p,
        eps=eps,
        absolute=absolute,
        collapse=collapse,
        form=form,
        reduction=reduction,
        resize=resize,
        attend=attend,
        eps_mode=eps_mode,
    )
    channel_dim, skip_tokens, map_size = _inputs.plain_sides(channel_dim, skip_tokens, map_size)
    student_side, teacher_side = _inputs.sides(channel_dim, skip_tokens, map_size)
    students, teachers = _inputs.pairs(student, teacher, student_side, teacher_side)
    given = ("student", student, student_side), ("teacher", teacher, teacher_side)
    _inputs.check_tokens(given, skip_tokens, map_size)
    _inputs.check_spatial(attend, map_size=map_size)
    whole: list[Tensor] = []
    skips: list[int] = []
    if student_side.skip_tokens or teacher_side.skip_tokens:
        whole, skips = _inputs.whole_tokens(
            (student, students, student_side), (teacher, teachers, teacher_side)
        )
    masks = None
    if mask is not None:
        if attend != "spatial":
            raise ValueError(f"mask is for attend='spatial', got attend={attend!r}")
        masks = _inputs.check_masks(mask, students, student_side.skip_tokens)
    if reduction == "sample":
        _inputs.check_one_batch(students, _SAMPLES)
    if sample_weights is not None:
        sample_weights = _inputs.check_sample_weights(sample_weights, students)
    return Problem(
        students,
        teachers,
        whole,
        skips,
        pair_weights(weights, len(students)),
        LossOptions(float(p), collapse, form, reduction, eps_mode, float(eps)),
        absolute,
        resize,
        attend,
        masks,
        sample_weights,
    )


def prepare_maps(
    student: Tensor | Sequence[Tensor],
    teacher: Tensor | Sequence[Tensor],
    form: str,
    weights: Sequence[float] | None,
    reduction: str,
    resize: str | None,
    mask: Tensor | Sequence[Tensor] | None,
    sample_weights: Tensor | None,
    eps: float,
    eps_mode: str,
) -> Problem:
    """Checks the arguments of ``map_loss``; the maps become features of one channel."""
    _inputs.check_options(eps=eps, form=form, reduction=reduction, eps_mode=eps_mode)
    check_choice("resize", resize, (None, "maps"))
    students, teachers = _inputs.map_pairs(student, teacher)
    if reduction == "sample":
        _inputs.check_one_batch(students, _SAMPLES)
    return Problem(
        students,
        teachers,
        [],
        [],
        pair_weights(weights, len(students)),
        LossOptions(form=form, reduction=reduction, eps_mode=eps_mode, eps=float(eps)),
        True,
        resize,
        "spatial",
        None if mask is None else _inputs.check_masks(mask, students),
        None if sample_weights is None else _inputs.check_sample_weights(sample_weights, students),
    )


def straight(operator: Any, student: Any, teacher: Any, options: LossOptions, *more: Any) -> Any:
    """Return what an operator makes of ordinary pairs, handed to it as they are.

    On small features most of a call's time is Python's. The operator checks what memory needs; here
    is what it would take and ``at_loss`` does not. After None ``prepare`` says what is wrong, if
    anything.
    """
    single = isinstance(student, Tensor) and isinstance(teacher, Tensor)
    students = [student] if single else student
    teachers = [teacher] if single else teacher
    if (
        type(students) not in _LISTS
        or type(teachers) not in _LISTS
        or type(options.p) not in _NUMBERS
        or type(options.eps) not in _NUMBERS
        or any(type(option) is not str for option in options[1:5])
        or options.collapse == "max"
        or torch.compiler.is_compiling()
    ):
        return None
    try:
        for s, t in zip(students, teachers, strict=True):
            size = s.shape[2:]
            if t.shape[2:] != size or size.numel() == 1 or not 3 <= s.dim() <= 5:
                return None
            if s.layout is not torch.strided or t.layout is not torch.strided:
                return None
        return operator(students, teachers, [], [], [], *options, *more)
    except (AttributeError, RuntimeError, TypeError, ValueError):
        return None


def solve(problem: Problem) -> Tensor:
    """Return the loss."""
    parts = _spatial(problem)
    if len(parts) == 1:
        return _loss(parts[0])
    spatial, channel = parts
    if problem.resize is None and problem.options.reduction == "sum" and not problem.whole:
        # One call for both.
        both = problem._replace(
            students=spatial.students + channel.students,
            teachers=spatial.teachers + channel.teachers,
            weights=problem.weights * 2,
        )
        return _loss(both)
    return _loss(channel) + _loss(spatial)


def _spatial(problem: Problem) -> list[Problem]:
    """Return problems of spatial attention: channel attention is the other layout's."""
    if problem.attend == "spatial":
        return [problem]
    _inputs.check_channels(problem.students, problem.teachers)
    channel = problem._replace(
        students=[_inputs.channels_as_positions(x) for x in problem.students],
        teachers=[_inputs.channels_as_positions(x) for x in problem.teachers],
        whole=[],
        skip_tokens=[],
        resize=None,
    )
    return [channel] if problem.attend == "channel" else [problem, channel]


def _loss(problem: Problem) -> Tensor:
    same = _inputs.check_sizes(problem.students, problem.teachers, problem.resize)
    if problem.resize == "features" and not same:
        problem, same = _pooled(problem), True
    n, features, options = len(problem.students), problem.features(), problem.options
    if same and problem.one_operator():
        loss = _ops.at_loss(
            features[:n],
            features[n:],
            _flat_masks(problem),
            problem.weights,
            problem.skip_tokens,
            *options._replace(reduction=_operator_reduction(problem)),
        )
        return _reduce(problem, loss)
    maps = attention_maps(
        features, options.p, options.collapse, problem.absolute, problem.skip_tokens
    )
    return _loss_of_maps(problem, maps)


def _operator_reduction(problem: Problem) -> str:
    """Return the reduction that is the operators': weights of samples come before a mean."""
    return problem.options.reduction if problem.sample_weights is None else "sample"


def _reduce(problem: Problem, loss: Tensor) -> Tensor:
    """Weigh the losses of samples, and reduce them, where the operator has not."""
    if problem.sample_weights is None:
        return loss
    loss = loss * problem.sample_weights.to(loss.dtype)
    reduction = problem.options.reduction
    if reduction == "sample":
        return loss
    loss = loss.mean(1)
    return loss.sum() if reduction == "sum" else loss


def _flat_masks(problem: Problem) -> list[Tensor]:
    """Return each pair's mask as (B, N), as the operator takes it; nothing where there is none."""
    if problem.masks is None:
        return []
    return [
        _resized_mask(mask, s.shape[2:], accumulate_dtype(s, t))
        for mask, s, t in zip(problem.masks, problem.students, problem.teachers, strict=True)
    ]


def _pooled(problem: Problem) -> Problem:
    """The same with both features of a pair averaged to the smaller size in each dimension."""
    students, teachers = [], []
    for s, t in zip(problem.students, problem.teachers, strict=True):
        size = [min(n, m) for n, m in zip(s.shape[2:], t.shape[2:], strict=True)]
        students.append(_pool(s, size))
        teachers.append(_pool(t, size))
    return problem._replace(students=students, teachers=teachers, whole=[], skip_tokens=[])


def _pool(x: Tensor, size: list[int]) -> Tensor:
    """Adaptive average pooling, of 16 bits in fp32: torch would round the means to 16 bits."""
    if list(x.shape[2:]) == size:
        return x
    pools = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return pools[len(size)](x.to(accumulate_dtype(x)), size)  # type: ignore[arg-type]


def _pool_backward(gradient: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of ``_pool`` for x, of which only shape, strides and dtype are read."""
    if gradient.shape == x.shape:
        return gradient
    if gradient.dtype != x.dtype:  # 16 bits, pooled in fp32
        x = torch.empty_like(x, dtype=gradient.dtype)
    aten = torch.ops.aten
    if x.dim() == 3:
        row = aten._adaptive_avg_pool2d_backward(gradient.unsqueeze(2), x.unsqueeze(2))
        return row.squeeze(2)
    if x.dim() == 4:
        return aten._adaptive_avg_pool2d_backward(gradient, x)
    return aten._adaptive_avg_pool3d_backward(gradient, x)


def value_and_grad(
    problem: Problem, scale: float, loss_gradient: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the loss, and the gradient of its sum for the students as ``prepare`` placed them.

    Skipped tokens may be there, in front. The gradient is multiplied by ``scale`` and
    ``loss_gradient``, a scalar.
    """
    if problem.attend == "spatial":
        return _value_and_grad(problem, scale, loss_gradient)
    losses: list[Tensor] = []
    gradients: list[list[Tensor]] = []
    for part in _spatial(problem._replace(whole=[], skip_tokens=[])):
        loss, found = _value_and_grad(part, scale, loss_gradient)
        if part.students is not problem.students:  # the transposed views of channel attention
            pairs = zip(found, problem.students, strict=True)
            found = [g.transpose(1, 2).reshape(x.shape) for g, x in pairs]
        losses.append(loss)
        gradients.append(found)
    if len(losses) == 1:
        return losses[0], gradients[0]
    return losses[0] + losses[1], [a + b for a, b in zip(*gradients, strict=True)]


def _value_and_grad(
    problem: Problem, scale: float, loss_gradient: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    same = _inputs.check_sizes(problem.students, problem.teachers, problem.resize)
    given = problem.features()
    if problem.resize == "features" and not same:
        given, problem, same = problem.students, _pooled(problem), True
    n, features, options = len(problem.students), problem.features(), problem.options
    if problem.sample_weights is not None:
        weights = problem.sample_weights.to(accumulate_dtype(*features)).expand(n, -1)
        weights = weights if options.reduction == "sample" else weights / weights.shape[1]
        loss_gradient = weights if loss_gradient is None else weights * loss_gradient
    operator_options = options._replace(reduction=_operator_reduction(problem))
    if same and problem.one_operator():
        loss, gradients = _ops.at_value_and_grad(
            features[:n],
            features[n:],
            _flat_masks(problem),
            problem.weights,
            problem.skip_tokens,
            *operator_options,
            scale,
            loss_gradient,
        )
    else:
        loss, gradients = _through_maps(problem, operator_options, scale, loss_gradient)
    gradients = [_pool_backward(g, x).to(x.dtype) for g, x in zip(gradients, given, strict=False)]
    return _reduce(problem, loss), gradients


def _through_maps(
    problem: Problem, options: LossOptions, scale: float, loss_gradient: Tensor | None
) -> tuple[Tensor, list[Tensor]]:
    """Return the operator's loss and the students' gradients, with what maps alone take between."""
    n, features = len(problem.students), problem.features()
    p, collapse, form, reduction, eps_mode, eps = options
    signed = keeps_sign(p, problem.absolute)
    found = (
        attention_maps(features, p, collapse, False, problem.skip_tokens)
        if signed
        else _ops.attention_map(features, p, collapse, problem.skip_tokens)
    )
    maps, masks = _maps_to_compare(problem, found[: 2 * n])
    loss, slopes = _ops.map_value_and_grad(
        maps[:n], maps[n:], problem.weights, form, reduction, eps_mode, eps
    )
    students, skips = features[:n], problem.skip_tokens[:n]
    coefficients = [
        k * scale * (p * eager.collapse_scale(x, collapse))
        for x, k in zip(students, slopes, strict=True)
    ]
    if masks:
        coefficients = [k * m for k, m in zip(coefficients, masks, strict=False)]
    pairs = list(range(n))
    if signed:
        return loss, signed_gradients(students, coefficients, loss_gradient, p, skips)
    channels = found[2 * n : 3 * n]
    return loss, _ops.attention_map_backward(
        students, coefficients, loss_gradient, pairs, p, skips, channels
    )


def solve_maps(problem: Problem) -> Tensor:
    """Return the loss of raw maps, which stand as features of one channel."""
    students, teachers = problem.students, problem.teachers
    _inputs.check_sizes(students, teachers, problem.resize, of_maps=True)
    return _loss_of_maps(problem, [x.flatten(1) for x in students + teachers])


def _loss_of_maps(problem: Problem, maps: list[Tensor]) -> Tensor:
    """Return the loss of raw maps (B, N), the students' first."""
    n, (_, _, form, _, eps_mode, eps) = len(problem.students), problem.options
    maps, _ = _maps_to_compare(problem, maps)
    reduction = _operator_reduction(problem)
    loss = _ops.map_loss(maps[:n], maps[n:], problem.weights, form, reduction, eps_mode, eps)
    return _reduce(problem, loss)


def _maps_to_compare(problem: Problem, maps: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Bring raw maps to the students' sizes and mask them; also return the masks, if any."""
    n = len(problem.students)
    sizes = [x.shape[2:] for x in problem.students]
    given = [x.shape[2:] for x in problem.teachers]
    maps = maps[:n] + [_interpolate(*each) for each in zip(maps[n:], given, sizes, strict=True)]
    if problem.masks is None:
        return maps, []
    masks = [
        _resized_mask(mask, size, q.dtype)
        for mask, size, q in zip(problem.masks * 2, sizes * 2, maps, strict=True)
    ]
    return [savable(q) * mask for q, mask in zip(maps, masks, strict=True)], masks


def _interpolate(maps: Tensor, size: Sequence[int], target: Sequence[int]) -> Tensor:
    """Interpolate raw maps (B, N) of ``size`` linearly to ``target``."""
    if size == target:
        return maps
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    planes = maps.reshape(maps.shape[0], 1, *size)
    # torch computes a position's weights in the maps' dtype: in fp32 they are off by the rounding
    # of the position's number.
    wide = eager.wide(planes) if max(*size, *target) > _FP32_POSITIONS else planes
    found = F.interpolate(wide, size=tuple(target), mode=mode, align_corners=False)
    return found.flatten(1).to(maps.dtype)


def _resized_mask(mask: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(B, N): the mask's mean over what each position of the map stands for."""
    wide = mask.to(dtype)
    if list(mask.shape[1:]) != list(size):
        wide = F.interpolate(wide.unsqueeze(1), size=tuple(size), mode="area").squeeze(1)
    return wide.flatten(1)
