"""Attention transfer between two networks as they are: maps are taken where the layers give them.

::

    at = AttentionTransfer(student, teacher, example=images, beta=1e3)
    for x, y in loader:
        loss = cross_entropy(student(x), y) + at(x)
        loss.backward()
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from at_fused import _inputs
from at_fused._checks import check_finite, kind, pair_weights
from at_fused._hooks import MapOptions, Watched
from at_fused._match import written
from at_fused._models import evaluating, modules_named, precision, refuse_torchscript, unwrap
from at_fused._options import LossOptions
from at_fused._problem import Problem, solve_maps
from at_fused.functional import PairOptions
from at_fused.layers import layouts_of, match_layers, named_pairs
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

    Args:
        student: any module; also in DataParallel, DistributedDataParallel or torch.compile. Its
            copies, pickles and exports have no hooks, but those made together with this object.
        teacher: likewise; put on the device of the x of ``at(x)``. Nothing of it changes.
        layers: a list of names from ``named_modules()``, for both, or of (student's, teacher's)
            names. Each gives a tensor, or a tuple that begins with one. None: those that
            :func:`match_layers` finds with ``example``. A layer that runs several times in a pass
            counts with its last. What follows a tapped layer must not change its output in place.
        example: what both networks take, such as two images; in place of ``layers``.
        beta: a finite number, which may be set anew at any time; 1e3 is the paper's for the form
            "code".
        channel_dim: 1 or -1; None: -1 for features of three dimensions (tokens), else 1. This and
            the next two may be a pair (student's, teacher's).
        skip_tokens: how many tokens in front are left out; None: those that the network declares
            (``num_prefix_tokens`` in timm), 1 where it has a ``class_token``, else 0.
        map_size: (H, W) of tokens; None: a square, where the partner has H and W.
        cache: a :class:`at_fused.TeacherCache`, from which the teacher's maps then come.
        verbose: whether automatic pairs are printed.
        options: p, collapse, form, weights, resize (None or "maps"), attend ("spatial" or
            "channel"), absolute, eps, eps_mode of :func:`at_fused.at_loss`.

    Attributes:
        pairs: the names of the layers, a list of (student, teacher).
        beta: as given.
        teacher_output: what the teacher returned in the last call, of a tuple the first: its
            logits, for ``kd_loss``. A cache keeps logits (B, K); None for any other output.

    Raises:
        TypeError, ValueError: an argument is not as above, a name is none of the network's.

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
        layouts = layouts_of(student, teacher, channel_dim, skip_tokens)
        if unwrap(student) is unwrap(teacher):
            raise ValueError("student and teacher must be two networks, got one")
        check_finite("beta", beta)
        given: dict[str, Any] = {**options}
        self._resize = _check(given)
        self._given = given
        chosen = LossOptions(**{n: given[n] for n in given if n in LossOptions._fields})
        self._options = chosen._replace(p=float(chosen.p), eps=float(chosen.eps))
        attend = given.get("attend", "spatial")
        _inputs.check_spatial(attend, map_size=map_size)
        self._map_sizes = [side.map_size for side in _inputs.sides(-1, 0, map_size)]
        skips = _inputs.both("skip_tokens", skip_tokens)
        sizes = _inputs.both_maps(map_size)
        if attend == "channel":  # whose maps do not show what they were made of
            last = [dim == -1 for dim in _inputs.both("channel_dim", channel_dim)]
            rule = "take channel_dim=-1 with attend='channel'"
            _inputs.check_for_tokens("skip_tokens", skip_tokens, skips, last, rule)
        of_tokens = ("skip_tokens", skip_tokens, skips), ("map_size", map_size, sizes)
        self._of_tokens = [option for option in of_tokens if any(option[2])]
        if (layers is None) == (example is None):
            raise ValueError("layers or example must be given, not both: names, or inputs")
        named = None if layers is None else named_pairs(layers)
        sides = ("student", unwrap(student)), ("teacher", unwrap(teacher))
        for i, (side, network) in enumerate(sides):
            names = [pair[i] for pair in named] if named else None
            refuse_torchscript(network, names, side)
        self.pairs = named or match_layers(
            student,
            teacher,
            example,
            channel_dim=channel_dim,
            skip_tokens=skip_tokens,
            verbose=verbose,
        )
        count = len(self.pairs)
        self._weights = pair_weights(given.get("weights"), count) or [1.0] * count
        self.beta = beta
        if cache is not None and not isinstance(cache, TeacherCache):
            raise TypeError(f"cache must be a TeacherCache or None, got {kind(cache)}")
        self.cache = cache
        self._hash, self._layout = TeacherHash(unwrap(teacher)), tuple(layouts[1])
        self.teacher_output: Any = None
        self._prepared: tuple[Any, list[Tensor], Any] | None = None
        for i, (side, network) in enumerate(sides):
            modules_named(network, self._names(i), side)
        self._of_maps = MapOptions(*self._options[:2], given.get("absolute", True), attend)
        self._student = Watched("student", student, self._names(0), layouts[0], self._of_maps)
        self._teacher = Watched("teacher", teacher, self._names(1), layouts[1], self._of_maps)

    def _names(self, side: int) -> list[str]:
        return [pair[side] for pair in self.pairs]

    @property
    def beta(self) -> float:
        """The weight of the loss."""
        return self._beta

    @beta.setter
    def beta(self, value: float) -> None:
        check_finite("beta", value)
        for i, weight in enumerate(self._weights):
            check_finite(f"beta * weights[{i}]", value * weight)
        self._beta = value

    def prepare(self, x: Any, index: Tensor | Sequence[int] | None = None, seed: int = 0) -> None:
        """Runs the teacher now, for the ``at(x)`` that follows.

        Before ``student(x)`` its pass takes memory that the student's graph does not hold yet; in
        ``at(x)`` it would come on top. Of the pass nothing stays but the maps and the output.

        Args:
            x, index, seed: as in ``at(x, index, seed)``, which then takes the same ``x``.

        Raises:
            TypeError, ValueError: as ``at(x)``.
        """
        self._prepared = (x, index, seed), *self._teacher_maps(x, index, seed)

    def __call__(
        self, x: Any, index: Tensor | Sequence[int] | None = None, seed: int = 0
    ) -> Tensor:
        """The loss of the student's last forward pass, with the teacher's on ``x``.

        Args:
            x: what the teacher takes, the samples that the student saw, in their order.
            index: with a cache, the samples' numbers in the data set, (B,) int64 or ints.
            seed: with a cache, that of the transform that made ``x``.

        Returns:
            A scalar, beta included: float64 if any map is, else float32.

        Raises:
            RuntimeError: the student has not run since the last call, or without a graph.
            TypeError: with a cache, ``x`` is no tensor.
            ValueError: the maps of a pair have another batch or size, or the arguments are not what
                ``prepare`` was given; an option of tokens without tokens, or of a cache without it.
        """
        prepared, self._prepared = self._prepared, None
        students = self._student.take()
        self._check_graph(students)
        if prepared is None:
            teachers, self.teacher_output = self._teacher_maps(x, index, seed)
        else:
            before, teachers, self.teacher_output = prepared
            again = (index is None and seed == 0) or (
                _same_numbers(index, before[1]) and seed == before[2]
            )
            if x is not before[0] or not again:
                name = "x" if again else "index and seed, if given,"
                raise ValueError(f"{name} must be what at.prepare was called with, got another")
        for name, value, each in self._of_tokens:
            tokens = [any(q.dim() == 2 for q in side) for side in (students, teachers)]
            _inputs.check_for_tokens(
                name, value, each, tokens, "none of its network's layers gives"
            )
        if self._of_maps.attend == "channel":
            _inputs.check_channels(students, teachers)
        unlike = any(s.shape != t.shape for s, t in zip(students, teachers, strict=True))
        if unlike or any(self._map_sizes):
            pairs = [self._alike(*each) for each in zip(students, teachers, strict=True)]
            students, teachers = ([pair[side] for pair in pairs] for side in (0, 1))
        return solve_maps(self._problem(students, teachers))

    def _problem(self, students: list[Tensor], teachers: list[Tensor]) -> Problem:
        """The loss to compute: options were checked before, and are not again in each step."""
        students, teachers = _inputs.map_pairs(students, teachers)
        weights = [self.beta * weight for weight in self._weights]
        options = self._options
        return Problem(
            *(students, teachers, [], [], weights, options, True, self._resize, "spatial"),
            masks=None,
            sample_weights=None,
        )

    def _check_graph(self, maps: list[Tensor]) -> None:
        model = self._student.model
        if (
            torch.is_grad_enabled()
            and model.training
            and not any(q.requires_grad for q in maps)
            and any(p.requires_grad for p in model.parameters())
        ):
            raise RuntimeError(
                "AttentionTransfer: the student's maps have no graph: it ran under no_grad, or in "
                "a checkpoint with use_reentrant=True, which hides what is inside; "
                "use_reentrant=False does not"
            )

    def _run_teacher(self, x: Any) -> tuple[list[Tensor], Any]:
        with evaluating(self._teacher.model):
            output = self._teacher.model(x)
        # The rest of a tuple may be the features, which are not to live on.
        return self._teacher.take(), output[0] if isinstance(output, tuple) else output

    def _teacher_maps(self, x: Any, index: Any, seed: int) -> tuple[list[Tensor], Any]:
        if self.cache is None:
            if index is not None or seed != 0:
                raise ValueError(f"index and seed are for a cache, got {index!r:.80} and {seed!r}")
            return self._run_teacher(x)
        if index is None:
            raise ValueError(
                "index must be given, the samples' numbers, for the cache to find them"
            )
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a tensor for a cache, got {kind(x)}")

        def compute(rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
            maps, output = self._run_teacher(rows)
            return maps, output if isinstance(output, Tensor) and output.dim() == 2 else None

        return self.cache.fetch(compute, x, index, identity=self._identity(x), seed=seed)

    def _identity(self, x: Tensor) -> str:
        """A hash of all that the teacher's maps depend on, but for the input."""
        names = [pair.teacher for pair in self.pairs]
        return self._hash(names, tuple(self._of_maps), self._layout, precision(x))

    def _alike(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both maps with as many dimensions: tokens become the map that they fill."""
        rank = max(student.dim(), teacher.dim(), *(1 + len(size or ()) for size in self._map_sizes))
        maps = []
        for q, other, given in zip(
            (student, teacher), (teacher, student), self._map_sizes, strict=True
        ):
            if q.dim() < rank:
                n = math.isqrt(q.shape[1])
                size = given or (n, n)
                if math.prod(size) != q.shape[1] or len(size) != rank - 1:
                    raise ValueError(
                        f"map_size must be (H, W) of {q.shape[1]} tokens, whose partner's map is "
                        f"{written(tuple(other.shape[1:]))}, got {given}"
                    )
                q = q.unflatten(1, tuple(size))
            maps.append(q)
        return maps[0], maps[1]

    def remove(self) -> None:
        """Takes all hooks away: both networks are as they were."""
        self._student.remove()
        self._teacher.remove()

    def __repr__(self) -> str:
        options = {"beta": self.beta, **self._given}
        pairs = ", ".join(s if s == t else f"{s} <- {t}" for s, t in self.pairs)
        return f"AttentionTransfer({pairs}; {', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _same_numbers(a: Tensor | Sequence[int] | None, b: Tensor | Sequence[int] | None) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(torch.as_tensor(a), torch.as_tensor(b))


def _check(options: dict[str, Any]) -> str | None:
    """Checks the options of the pairs; returns ``resize``."""
    _inputs.check_kept("AttentionTransfer", options, PairOptions.__annotations__)
    if options.get("attend") == "both":
        raise ValueError("attend must be 'spatial' or 'channel' here, got 'both'; make two of them")
    resize: str | None = options.get("resize")
    if resize == "features":
        raise ValueError(
            "resize must be None or 'maps' here, got 'features': only maps leave the networks"
        )
    return resize
