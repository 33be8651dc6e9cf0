"""A call of ``at_loss``: checked, and carried out by the operators.

The plain options are one operator (``at_loss``). The others are two, ``attention_map`` and
``map_loss``, with torch's own operators between them for what concerns the maps alone, a C-th of
the features: their interpolation, masks and sample weights. Where taps made the maps, the second is
all that is left. ``resize="features"`` pools with torch's operator first, and leaves pairs of one
size to whatever the other options take.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from at_fused import _inputs, _ops
from at_fused._checks import pair_weights
from at_fused._inputs import MapSizes, Sides
from at_fused._maps import attention_maps, keeps_sign
from at_fused.backends.results import accumulate_dtype

_SAMPLES = "reduction='sample' takes pairs of one batch size"


class Options(NamedTuple):
    """The options that the operators share."""

    p: float = 2.0
    collapse: str = "mean"
    absolute: bool = True
    form: str = "code"
    reduction: str = "sum"
    eps_mode: str = "max"
    eps: float = 1e-12


class Problem(NamedTuple):
    """A call of ``at_loss``, checked: features (B, C, *spatial), and what to do with them.

    ``tokens`` are both sides' features before any token was cut off, and how many that is.
    """

    students: list[Tensor]
    teachers: list[Tensor]
    tokens: list[tuple[Tensor, int]]
    weights: list[float]
    options: Options
    resize: str | None
    attend: str
    masks: list[Tensor] | None
    sample_weights: Tensor | None

    def plain(self) -> bool:
        """Whether one operator does all of it, for maps that agree in size."""
        options = self.options
        return (
            options.collapse != "max"
            and options.reduction != "sample"
            and options.eps_mode == "max"
            and not keeps_sign(options.p, options.absolute)
            and not self.tokens
            and self.masks is None
            and self.sample_weights is None
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
    student_side, teacher_side = _inputs.sides(channel_dim, skip_tokens, map_size)
    students, teachers = _inputs.pairs(student, teacher, student_side, teacher_side)
    tokens = []
    if student_side.skip_tokens or teacher_side.skip_tokens:
        tokens = _inputs.whole_tokens(student, students, student_side)
        tokens += _inputs.whole_tokens(teacher, teachers, teacher_side)
    masks = None
    if mask is not None:
        if attend != "spatial":
            raise ValueError(f"mask is for attend='spatial', got attend={attend!r}")
        masks = _inputs.check_masks(mask, students)
    if reduction == "sample":
        _inputs.check_one_batch(students, _SAMPLES)
    if sample_weights is not None:
        sample_weights = _inputs.check_sample_weights(sample_weights, students)
    return Problem(
        students,
        teachers,
        tokens,
        pair_weights(weights, len(students)),
        Options(float(p), collapse, absolute, form, reduction, eps_mode, float(eps)),
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
    if resize not in (None, "maps"):
        raise ValueError(f"resize must be None or 'maps' for a loss of maps, got {resize!r}")
    students, teachers = _inputs.map_pairs(student, teacher)
    if reduction == "sample":
        _inputs.check_one_batch(students, _SAMPLES)
    return Problem(
        students,
        teachers,
        [],
        pair_weights(weights, len(students)),
        Options(form=form, reduction=reduction, eps_mode=eps_mode, eps=float(eps)),
        resize,
        "spatial",
        None if mask is None else _inputs.check_masks(mask, students),
        None if sample_weights is None else _inputs.check_sample_weights(sample_weights, students),
    )


def solve(problem: Problem) -> Tensor:
    """The loss."""
    attend, students = problem.attend, problem.students
    if attend == "spatial":
        return _loss(problem)
    _inputs.check_channels(students, problem.teachers)
    # Channel attention is the other layout's spatial attention.
    student_views = [_inputs.channels_as_positions(x) for x in students]
    teacher_views = [_inputs.channels_as_positions(x) for x in problem.teachers]
    if attend == "both" and problem.resize is None and problem.options.reduction == "sum":
        # One call for both.
        both = problem._replace(
            students=students + student_views,
            teachers=problem.teachers + teacher_views,
            tokens=[],
            weights=problem.weights * 2,
        )
        return _loss(both)
    channel = _loss(
        problem._replace(students=student_views, teachers=teacher_views, tokens=[], resize=None)
    )
    return channel if attend == "channel" else channel + _loss(problem)


def _tracked(features: list[Tensor]) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in features)


def _loss(problem: Problem) -> Tensor:
    same = _inputs.check_sizes(problem.students, problem.teachers, problem.resize)
    if problem.resize == "features" and not same:
        problem, same = _pooled(problem), True
    students, teachers, tokens, weights, options, *_ = problem
    p, collapse, absolute, form, reduction, _, eps = options
    if same and problem.plain():
        grads = _tracked(students), _tracked(teachers)
        return _ops.at_loss(students, teachers, weights, p, collapse, form, reduction, eps, *grads)[
            0
        ]
    features = students + teachers
    if tokens:
        # The gradient of all tokens is then written at once, zeros and all; that of a slice would
        # be copied into zeros.
        features = [x for x, _ in tokens]
    maps = attention_maps(features, p, collapse, absolute)
    if tokens:
        maps = [q[:, skip:] for q, (_, skip) in zip(maps, tokens, strict=True)]
    given, targets = ([x.shape[2:] for x in side] for side in (teachers, students))
    return _loss_of_maps(problem, maps, given, targets)


def _pooled(problem: Problem) -> Problem:
    """The same with both features of a pair averaged to the smaller size in each dimension."""
    students, teachers = [], []
    for s, t in zip(problem.students, problem.teachers, strict=True):
        size = [min(n, m) for n, m in zip(s.shape[2:], t.shape[2:], strict=True)]
        students.append(_pool(s, size))
        teachers.append(_pool(t, size))
    return problem._replace(students=students, teachers=teachers, tokens=[])


def _pool(x: Tensor, size: list[int]) -> Tensor:
    """Adaptive average pooling, of 16 bits in fp32: torch would round the means to 16 bits."""
    if list(x.shape[2:]) == size:
        return x
    pools = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
    return pools[len(size)](x.to(accumulate_dtype(x)), size)  # type: ignore[arg-type]


def solve_maps(problem: Problem) -> Tensor:
    """The loss of raw maps, which stand as features of one channel."""
    students, teachers = problem.students, problem.teachers
    _inputs.check_sizes(students, teachers, problem.resize, of_maps=True)
    return _loss_of_maps(
        problem,
        [x.flatten(1) for x in students + teachers],
        [x.shape[2:] for x in teachers],
        [x.shape[2:] for x in students],
    )


def _loss_of_maps(
    problem: Problem, maps: list[Tensor], given: list[torch.Size], targets: list[torch.Size]
) -> Tensor:
    """From raw maps (B, N), the students' first; ``given`` is the teachers' size."""
    n, masks, sample_weights = len(targets), problem.masks, problem.sample_weights
    _, _, _, form, reduction, eps_mode, eps = problem.options
    teacher_maps = zip(maps[n:], given, targets, strict=True)
    maps = maps[:n] + [_interpolate(*each) for each in teacher_maps]
    if masks is not None:
        maps = [
            q * _resized_mask(mask, target, q.dtype)
            for q, mask, target in zip(maps, masks * 2, targets * 2, strict=True)
        ]
    loss, _ = _ops.map_loss(
        maps[:n],
        maps[n:],
        problem.weights,
        form,
        reduction if sample_weights is None else "sample",
        eps_mode,
        eps,
        _tracked(maps[:n]),
        _tracked(maps[n:]),
    )
    if sample_weights is None:
        return loss
    loss = loss * sample_weights.to(loss.dtype)
    if reduction == "sample":
        return loss
    loss = loss.mean(1)
    return loss.sum() if reduction == "sum" else loss


def _interpolate(maps: Tensor, size: Sequence[int], target: Sequence[int]) -> Tensor:
    """Raw maps (B, N) of ``size``, linearly interpolated to ``target``."""
    if size == target:
        return maps
    mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(size)]
    planes = maps.reshape(maps.shape[0], 1, *size)
    return F.interpolate(planes, size=tuple(target), mode=mode, align_corners=False).flatten(1)


def _resized_mask(mask: Tensor, size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """(B, N): the mask's mean over what each position of the map stands for."""
    wide = mask.to(dtype)
    if list(mask.shape[1:]) != list(size):
        wide = F.interpolate(wide.unsqueeze(1), size=tuple(size), mode="area").squeeze(1)
    return wide.flatten(1)
