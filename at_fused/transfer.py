"""Attention transfer between two networks as they are: maps are taken where the layers give them.

::

    at = AttentionTransfer(student, teacher, example=images, beta=1e3)
    for x, y in loader:
        loss = cross_entropy(student(x), y) + at(x)
        loss.backward()
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from at_fused import _inputs
from at_fused._attached import acting
from at_fused._checks import pair_weights
from at_fused._hooks import MapOptions, Watched
from at_fused._models import (
    arguments_of,
    evaluating,
    logits_of,
    modules_named,
    refuse_torchscript,
    same_batch,
    tensors_in,
    unwrap,
)
from at_fused._numbers import as_python, check_finite, kind
from at_fused._observe import Layout, written
from at_fused._options import LossOptions
from at_fused._problem import Problem, solve_maps
from at_fused.functional import PairOptions
from at_fused.layers import SIDES, Pair, check_given, layouts_of, matched, named_pairs
from at_fused.teacher_cache import TeacherCache, TeacherHash

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionTransfer:
    """Attention transfer from a teacher to a student: ``criterion(student(x), y) + at(x)``.

    Forward hooks tap the layers of both networks (:func:`at_fused.attention_tap`), so neither is
    edited, and keep nothing but the maps; a teacher's feature dies as soon as its map is made.
    ``at(x)`` runs the teacher once, in eval mode and without gradients, and returns:

        beta * sum_j w_j L_j        L_j of at_loss, between the maps of the j-th pair of layers

    a mean over the batch, whatever the number of devices: under DataParallel over the whole batch,
    under DistributedDataParallel over each process's part, which it averages. ``beta`` means the
    same on one device and on eight.

    The student's maps hold its graph, up to the layers that gave them. ``at(x)`` hands it on, and a
    backward through the network frees it as ever; after neither it stays until the next pass of the
    student begins: evaluate under ``no_grad``.

    Args:
        student: any module; also in DataParallel, DistributedDataParallel or torch.compile. Its
            copies, pickles and exports have no hooks, but those made together with this object.
        teacher: likewise; put on the device of the x of ``at(x)``. Nothing of it changes.
        layers: a list of names from ``named_modules()``, for both, or of (student's, teacher's)
            names. Each gives a tensor, or a tuple that begins with one. None: those that
            :func:`match_layers` finds with ``example``. A layer that runs several times in a pass
            counts with its last. What follows a tapped layer must not change its output in place.
        example: what both networks take, such as two images: a mapping gives keyword arguments, a
            tuple several. Both run on it now, in eval mode and without gradients, and show how
            their features lie. Without it named layers show it in their first pass, or, where that
            is compiled, in one more.
        beta: a finite number, which may be set anew at any time; 1e3 is the paper's for the form
            "code".
        channel_dim: 1 or -1; None: as the run shows. This and the next two may be a pair
            (student's, teacher's).
        skip_tokens: how many tokens in front are left out of features (B, N, C); None: those that
            were put before the patches in the run.
        map_size: (H, W) of tokens; None: as the run shows, else the partner's H and W.
        cache: a :class:`at_fused.TeacherCache`, from which the teacher's maps then come.
        verbose: whether to print the pairs that were found, and what was left out.
        options: p, collapse, form, weights, resize (None or "maps"), attend ("spatial" or
            "channel"), absolute, eps, eps_mode of :func:`at_fused.at_loss`.

    Attributes:
        pairs: the names of the layers, a list of (student, teacher).
        beta: as given.
        teacher_output: the teacher's logits of the last call, for ``kd_loss``: its output if that
            is a tensor; of any other its field ``logits`` (or ``out``), else of a tuple the first,
            of a mapping or a dataclass the only tensor. None where there is no such tensor; nothing
            else of the output is kept. A cache keeps logits (B, K) alone.

    Raises:
        TypeError, ValueError: an argument is not as above, a name is none of the network's, or how
            a layer's features lie is not known: the message says what to give.

    Source: Zagoruyko & Komodakis, ICLR 2017, section 3.1.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Sequence[str | tuple[str, str]] | None = None,
        *,
        beta: float,
        example: Any = None,
        channel_dim: int | tuple[int, int] | None = None,
        skip_tokens: int | tuple[int, int] | None = None,
        map_size: _inputs.MapSizes = None,
        cache: TeacherCache | None = None,
        verbose: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        layers = as_python("layers", layers)
        channel_dim, skip_tokens, map_size = _inputs.plain_sides(channel_dim, skip_tokens, map_size)
        of_sides = check_given(student, teacher, channel_dim, skip_tokens)
        if unwrap(student) is unwrap(teacher):
            raise ValueError("student and teacher must be two networks, got one")
        check_finite("beta", beta)
        self._given = given = _checked(options)
        self._resize = given.get("resize")
        chosen = LossOptions(**{n: given[n] for n in given if n in LossOptions._fields})
        self._options = chosen._replace(p=float(chosen.p), eps=float(chosen.eps))
        attend = given.get("attend", "spatial")
        _inputs.check_spatial(attend, map_size=map_size)
        self._map_sizes = [side.map_size for side in _inputs.sides(-1, 0, map_size)]
        skips = _inputs.both("skip_tokens", skip_tokens)
        sizes = _inputs.both_maps(map_size)
        of_tokens = ("skip_tokens", skip_tokens, skips), ("map_size", map_size, sizes)
        self._of_tokens = [option for option in of_tokens if any(option[2])]
        if layers is None and example is None:
            raise ValueError("layers or example must be given: names, or inputs to find them with")
        named = None if layers is None else named_pairs(layers)
        networks = [unwrap(student), unwrap(teacher)]
        for i, (side, network) in enumerate(zip(SIDES, networks, strict=True)):
            names = [pair[i] for pair in named] if named else None
            refuse_torchscript(network, names, side)
            if names:
                modules_named(network, names, side)
        layouts: list[list[Layout | None]]
        if named:
            self.pairs = named
            layouts = [[None] * len(named)] * 2
            if example is not None:
                layouts = [
                    layouts_of(side, network, example, self._names(i), of_sides[i])
                    for i, (side, network) in enumerate(zip(SIDES, networks, strict=True))
                ]
        else:
            found = matched(student, teacher, example, of_sides, self._resize, verbose)
            self.pairs = [Pair(s.name, t.name) for s, t in found]
            layouts = [[call.layout for call in side] for side in zip(*found, strict=True)]
        count = len(self.pairs)
        self._weights = pair_weights(given.get("weights"), count) or [1.0] * count
        self.beta = beta
        if cache is not None and not isinstance(cache, TeacherCache):
            raise TypeError(f"cache must be a TeacherCache or None, got {kind(cache)}")
        self.cache = cache
        self._hash, self._layout = TeacherHash(networks[1]), tuple(of_sides[1])
        self.teacher_output: Any = None
        self._prepared: tuple[Any, list[Tensor], Any] | None = None
        self._of_maps = MapOptions(*self._options[:2], given.get("absolute", True), attend)
        self._student, self._teacher = self._sides = [
            Watched(side, model, self._names(i), of_sides[i], layouts[i], self._of_maps)
            for i, (side, model) in enumerate(zip(SIDES, (student, teacher), strict=True))
        ]

    def _names(self, side: int) -> list[str]:
        return [pair[side] for pair in self.pairs]

    @property
    def beta(self) -> float:
        """The weight of the loss."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        value = check_finite("beta", value)
        for i, weight in enumerate(self._weights):
            check_finite(f"beta * weights[{i}]", value * weight)
        self._beta = value

    def prepare(self, x: Any, index: Tensor | Sequence[int] | None = None, seed: int = 0) -> None:
        """Runs the teacher now, for the ``at(x)`` that follows.

        Before ``student(x)`` its pass takes memory that the student's graph does not hold yet; in
        ``at(x)`` it would come on top. Of the pass nothing stays but the maps and the output.

        Args:
            x, index, seed: as in ``at(x, index, seed)``, which then takes the same ``x``, or the
                same tensors in another tuple or mapping. May run under ``inference_mode``.

        Raises:
            TypeError, ValueError: as ``at(x)``.
        """
        self._prepared = (x, index, seed), *self._teacher_maps(x, index, seed)

    def __call__(
        self,
        x: Any,
        index: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        *,
        mask: Tensor | Sequence[Tensor] | None = None,
        sample_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of the student's last forward pass, with the teacher's on ``x``.

        Args:
            x: what the teacher takes, the samples that the student saw, in their order. A mapping
                (also transformers' BatchEncoding) gives keyword arguments, ``teacher(**x)``, a
                tuple several, ``teacher(*x)``; anything else is the only one. For a cache one
                tensor, alone or beside numbers, strings and None.
            index: with a cache, the samples' numbers in the data set, (B,) int64 or ints.
            seed: with a cache, that of the transform that made ``x``.
            mask, sample_weights: as in :func:`at_fused.at_loss`.

        Returns:
            A scalar, beta included: float64 if any map is, else float32.

        Raises:
            RuntimeError: the student has not run since the last call; a tensor of ``x`` went into
                an earlier pass, not into the last (compiled passes are not looked at); a layer
                that is trained, or comes after one that is, ran without gradients.
            TypeError: with a cache, ``x`` is not as above; a factor is none of ``at_loss``.
            ValueError: how a named layer's features lie is not known; the maps of a pair have
                another batch or size, or the arguments are not what ``prepare`` was given; an
                option of tokens without tokens, or of a cache without it; a factor of another
                shape, a mask of channel attention.
        """
        prepared, self._prepared = self._prepared, None
        of_earlier_pass = self._student.of_earlier_pass(x)
        students = self._student.take(x)
        if of_earlier_pass:
            raise RuntimeError(
                "AttentionTransfer: x was the input of an earlier pass of the student, whose last "
                "had another; call at(x) after each student(x)"
            )
        self._check_graph(students)
        if prepared is None:
            teachers, self.teacher_output = self._teacher_maps(x, index, seed)
        else:
            before, teachers, self.teacher_output = prepared
            again = (index is None and seed == 0) or (
                _same_numbers(index, before[1]) and seed == before[2]
            )
            if not same_batch(x, before[0]) or not again:
                name = "x" if again else "index and seed, if given,"
                raise ValueError(f"{name} must be what at.prepare was called with, got another")
        for name, value, each in self._of_tokens:
            tokens = [
                any(side.gives_tokens(i, q) for i, q in enumerate(maps))
                for side, maps in zip(self._sides, (students, teachers), strict=True)
            ]
            _inputs.check_for_tokens(
                name, value, each, tokens, "none of its network's layers gives"
            )
        if self._of_maps.attend == "channel":
            _inputs.check_channels(students, teachers)
        unlike = any(s.shape != t.shape for s, t in zip(students, teachers, strict=True))
        masks = mask if isinstance(mask, (list, tuple)) else [mask]
        of_grids = any(isinstance(m, Tensor) and m.dim() == 3 for m in masks)
        if unlike or of_grids or any(self._map_sizes):
            both = enumerate(zip(students, teachers, strict=True))
            pairs = [
                [self._grid(i, side, each, x, of_grids) for side in (0, 1)] for i, each in both
            ]
            students, teachers = ([pair[side] for pair in pairs] for side in (0, 1))
        return solve_maps(self._problem(students, teachers, mask, sample_weights))

    def _problem(
        self, students: list[Tensor], teachers: list[Tensor], mask: Any, sample_weights: Any
    ) -> Problem:
        """The loss to compute: options were checked before, and are not again in each step."""
        students, teachers = _inputs.map_pairs(students, teachers)
        if mask is not None:
            if self._of_maps.attend == "channel":
                raise ValueError("mask is for attend='spatial', got attend='channel'")
            mask = _inputs.check_masks(mask, students, self._student.skip_tokens())
        if sample_weights is not None:
            sample_weights = _inputs.check_sample_weights(sample_weights, students)
        weights = [self.beta * weight for weight in self._weights]
        options = self._options
        return Problem(
            *(students, teachers, [], [], weights, options, True, self._resize, "spatial"),
            masks=mask,
            sample_weights=sample_weights,
        )

    def _check_graph(self, maps: list[Tensor]) -> None:
        name = self._student.lost_graph(maps) if torch.is_grad_enabled() else None
        if name is not None:
            raise RuntimeError(
                f"AttentionTransfer: the map of the student's layer {name!r} has no graph: it ran "
                "under no_grad, or in a checkpoint with use_reentrant=True, which hides what is "
                "inside; use_reentrant=False does not. To evaluate, call at(x) under no_grad too"
            )

    def _call_teacher(self, x: Any) -> Any:
        args, kwargs = arguments_of(x)
        # Not for the hooks of another, whose student this teacher is.
        with evaluating(self._teacher.model), acting(self._teacher.maps):
            return self._teacher.model(*args, **kwargs)

    def _run_teacher(self, x: Any) -> tuple[list[Tensor], Tensor | None]:
        # The output may hold features, which are not to live on.
        logits = logits_of(self._call_teacher(x))
        return self._teacher.take(x), logits

    def _teacher_maps(self, x: Any, index: Any, seed: int) -> tuple[list[Tensor], Any]:
        if self.cache is None:
            if index is not None or seed != 0:
                raise ValueError(f"index and seed are for a cache, got {index!r:.80} and {seed!r}")
            return self._run_teacher(x)
        if index is None:
            raise ValueError(
                "index must be given, the samples' numbers, for the cache to find them"
            )
        given = x if isinstance(x, (Mapping, tuple)) else (x,)
        items = dict(given) if isinstance(given, Mapping) else dict(enumerate(given))
        tensors = [key for key, value in items.items() if isinstance(value, Tensor)]
        options = {key: value for key, value in items.items() if key not in tensors}
        plain = all(isinstance(value, (int, float, str, type(None))) for value in options.values())
        if len(tensors) != 1 or not plain:
            raise TypeError(
                "x must be a tensor for a cache, or a tuple or mapping of one tensor and of "
                f"numbers, strings and None, got {', '.join(map(kind, items.values()))}"
            )

        def whole(rows: Tensor) -> Any:
            batch = {**items, tensors[0]: rows}
            return batch if isinstance(given, Mapping) else tuple(batch.values())

        def compute(rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
            maps, logits = self._run_teacher(whole(rows))
            return maps, logits if logits is not None and logits.dim() == 2 else None

        rows = items[tensors[0]]
        if self._teacher.maps.undecided:  # and might never run, where all is stored
            self._run_teacher(whole(rows[:1]))
        # All that the teacher's maps depend on, but for the input.
        names = [pair.teacher for pair in self.pairs]
        inside = self._teacher.precision(rows, lambda rows: self._call_teacher(whole(rows)))
        of_call = inside, tensors, options
        identity = self._hash(names, tuple(self._of_maps), self._layout, *of_call)
        return self.cache.fetch(compute, rows, index, identity=identity, seed=seed)

    def _grid(self, i: int, side: int, maps: tuple[Tensor, Tensor], x: Any, grid: bool) -> Tensor:
        """A map of a pair, as a grid where it is one of tokens and its partner is another.

        The grid has the proportions of the partner's map, or else of the images in ``x``.
        """
        q, other, size = maps[side], maps[1 - side], self._map_sizes[side]
        if not self._sides[side].gives_tokens(i, q):
            return q
        count, layout = q.shape[1], self._sides[side].layout(i)
        seen = layout.size if layout else ()
        if size is None:
            if q.shape == other.shape and not grid:
                return q
            images = [image.shape[2:] for image in tensors_in(x) if image.dim() == 4]
            like = [other.shape[1:]] if other.dim() > 2 else images
            size = next((found for each in like if (found := _of_proportions(count, each))), None)
            if size is None and math.prod(seen) == count:
                size = seen
            if size is None and other.dim() == 2 and len(seen) == 1:
                return q  # words, or a signal
        if size is None or math.prod(size) != count:
            raise ValueError(
                f"map_size must be (H, W) of {count} tokens, whose partner's map is "
                f"{written(tuple(other.shape[1:]))}, got {self._map_sizes[side]}"
            )
        return q.unflatten(1, tuple(size))

    def remove(self) -> None:
        """Takes all hooks away: both networks are as they were."""
        self._student.remove()
        self._teacher.remove()

    def __repr__(self) -> str:
        options = {"beta": self.beta, **self._given}
        pairs = ", ".join(s if s == t else f"{s} <- {t}" for s, t in self.pairs)
        return f"AttentionTransfer({pairs}; {', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _of_proportions(count: int, shape: torch.Size) -> tuple[int, ...] | None:
    """A grid of so many positions with the proportions of a map or an image, if there is one."""
    if math.prod(shape) == count or len(shape) != 2:
        return tuple(shape) if math.prod(shape) == count else None
    height, width = shape
    h = math.isqrt(count * height // width)
    fits = h and count % h == 0 and h * width == count // h * height
    return (h, count // h) if fits else None


def _same_numbers(a: Tensor | Sequence[int] | None, b: Tensor | Sequence[int] | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def _checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the pairs, of which some are not for this loss."""
    if options.get("attend") == "both":
        raise ValueError("attend must be 'spatial' or 'channel' here, got 'both'; make two of them")
    if options.get("resize") == "features":
        raise ValueError(
            "resize must be None or 'maps' here, got 'features': only maps leave the networks"
        )
    fewer = {"attend": ("spatial", "channel"), "resize": (None, "maps")}
    return _inputs.check_kept("AttentionTransfer", options, PairOptions.__annotations__, fewer)
