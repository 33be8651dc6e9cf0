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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Size, Tensor, nn

from at_fused import _loss
from at_fused._arguments import (
    CHOICES,
    PairOptions,
    check_channels,
    check_masks,
    check_spatial,
    pair_weights,
)
from at_fused._hooks import TappedNetwork
from at_fused._layouts import check_for_tokens, check_kept
from at_fused._models import (
    arguments_of,
    distributed,
    evaluating,
    logits_of,
    only_hooks_of,
    precision,
    same_batch,
    tensors_in,
    unwrap,
)
from at_fused._numbers import as_python, check_finite, kind
from at_fused._observe import written
from at_fused._options import LossArguments, MapSizes
from at_fused.balance import AUTO_STEPS, AutoBeta, GradientRatio, check_loss, gradient_ratio
from at_fused.layers import (
    SIDES,
    Pair,
    check_networks,
    given_layouts,
    layers_to_tap,
    named_pairs,
)
from at_fused.teacher_cache import TeacherCache, TeacherHash

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionTransfer:
    """Attention transfer from a teacher to a student: ``criterion(student(x), y) + at(x)``.

    Forward hooks tap the layers of both networks (:func:`at_fused.attention_tap`), so neither is
    edited, and keep nothing but the maps; a teacher's feature dies as soon as its map is made.
    ``at(x)`` runs the teacher once, in eval mode and without gradients, and returns:

        beta * sum_j w_j L_j        L_j of at_loss, between the maps of the j-th pair of layers

    a mean over the batch, under DistributedDataParallel over each process's part, which it
    averages: ``beta`` means the same on one device and on eight.

    The student's maps hold its graph, up to the layers that gave them. ``at(x)`` hands it on, and a
    backward through the network frees it as ever; after neither it stays until the next pass of the
    student begins: evaluate under ``no_grad``.

    Args:
        student: any module; also in DistributedDataParallel or torch.compile. Its copies, pickles
            and exports have no hooks, but those made together with this object.
        teacher: likewise; put on the device of the x of ``at(x)``. Nothing of it changes.
        layers: a list of names from ``named_modules()``, for both, or of (student's, teacher's)
            names. Each gives a tensor, or a tuple that begins with one. None: those that
            :func:`match_layers` finds with ``example``. A layer that runs several times in a pass
            counts with its last. What follows a tapped layer must not change its output in place.
        example: what both networks take, such as two images: a mapping gives keyword arguments, a
            tuple several. Both run on it now, in eval mode and without gradients, and show how
            their features lie. Without it named layers, but for torch's own convolutions, norms and
            poolings, show it in one more run on the first batch.
        beta: a finite number, which may be set anew at any time; 1e3 is the paper's for the form
            "code". "auto": the one that makes the gradient of this loss three times that of the
            task for the student's weights, measured in the first ten calls with gradients and then
            fixed; these take ``task_loss``. Where that needs ``teacher_output``, call ``prepare``
            before. Calls in which a gradient is 0, inf or nan do not count. Both losses are as
            they would be added: before GradScaler, and not divided by accumulated batches. Where
            the weights hardly move in ten calls, as with warm-up, beta comes out smaller, by a
            factor of up to six in docs/results.md (for its ViT, up to two times larger). In
            several processes the student must be given in its DistributedDataParallel.
        channel_dim: 1 or -1; None: as the run shows. This and the next two may be a pair
            (student's, teacher's).
        skip_tokens: how many tokens in front are left out of features (B, N, C); None: those that
            were put before the patches in the run.
        map_size: (H, W) of tokens; None: as the run shows, else the partner's H and W.
        cache: a :class:`at_fused.TeacherCache`, from which the teacher's maps then come. Not for a
            teacher whose ``forward`` was replaced, as accelerate does: its precision is not known.
        verbose: whether to print the pairs that were found, what was left out, and a beta that was
            chosen.
        options: p, collapse, form, weights, resize (None or "maps"), attend ("spatial" or
            "channel"), absolute, eps, eps_mode of :func:`at_fused.at_loss`.

    Attributes:
        pairs: the names of the layers, a list of (student, teacher).
        beta: as given; with "auto" the number that was measured, once there is one. Save it with a
            checkpoint from the tenth call on, and set it where training goes on; calls may still
            pass ``task_loss``.
        teacher_output: the teacher's logits of the last ``at(x)`` or ``prepare``, for ``kd_loss``:
            its output if that is a tensor; of any other its field ``logits`` (or ``out``), else of
            a tuple the first, of a mapping or a dataclass the only tensor. None where there is no
            such tensor; nothing else of the output is kept. A cache keeps logits (B, K) alone.

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
        beta: float | Literal["auto"],
        example: Any = None,
        channel_dim: int | tuple[int, int] | None = None,
        skip_tokens: int | tuple[int, int] | None = None,
        map_size: MapSizes = None,
        cache: TeacherCache | None = None,
        verbose: bool = True,
        **options: Unpack[PairOptions],
    ) -> None:
        check_networks(student, teacher)
        networks = [unwrap(student), unwrap(teacher)]
        if networks[0] is networks[1]:
            raise ValueError("student and teacher must be two networks, got one")
        if layers is None and example is None:
            raise ValueError("layers or example must be given: names, or inputs to find them with")
        if cache is not None and not isinstance(cache, TeacherCache):
            raise TypeError(f"cache must be a TeacherCache or None, got {kind(cache)}")
        if cache is not None and any("forward" in vars(module) for module in teacher.modules()):
            raise ValueError(
                "cache: the teacher's forward was replaced, as by accelerator.prepare, which hides "
                "its precision: give the teacher as it was, and call at(x) in torch.autocast"
            )
        self.beta = beta
        choices = CHOICES | {"attend": ("spatial", "channel"), "resize": (None, "maps")}
        kept = check_kept("AttentionTransfer", options, PairOptions.__annotations__, choices)
        self._given = {"beta": self.beta, **kept}
        self._verbose = verbose
        self._options = made = LossArguments(**kept)
        check_spatial(made.attend, map_size=map_size)
        tokens = {"skip_tokens": skip_tokens, "map_size": map_size}
        self._tokens = {name: as_python(name, value) for name, value in tokens.items()}
        given = given_layouts(channel_dim, **self._tokens)
        pairs = None if layers is None else named_pairs(as_python("layers", layers))
        taps = layers_to_tap(networks, pairs, example, given, made.resize, verbose)
        self.pairs = [Pair(s.name, t.name) for s, t in zip(*taps, strict=True)]
        self._weights = pair_weights(made.weights, len(self.pairs)) or [1.0] * len(self.pairs)
        self.cache = cache
        self.teacher_output: Tensor | None = None
        # All that the teacher's maps depend on, but for the input.
        names = [pair.teacher for pair in self.pairs]
        self._hash = TeacherHash(networks[1])
        of_maps = float(made.p), made.collapse, made.absolute, made.attend
        self._identity = names, of_maps, tuple(given[1][:2])
        self._prepared: tuple[Any, Any, list[Tensor], Tensor | None] | None = None
        self._student, self._teacher = self._sides = [
            TappedNetwork(*side, made)
            for side in zip(SIDES, (student, teacher), taps, given, strict=True)
        ]

    @property
    def beta(self) -> float | Literal["auto"]:
        """See the class."""
        if self._auto is None:
            return self._beta
        return self._auto.beta if self._auto.logarithms else "auto"

    @beta.setter
    def beta(self, beta: float | Literal["auto"]) -> None:
        if isinstance(beta, str) and beta != "auto":
            raise ValueError(f"beta must be a number or 'auto', got {beta!r}")
        self._auto = AutoBeta() if isinstance(beta, str) else None
        # A number that was measured may be set again in a loop that passes task_loss.
        self._measures = isinstance(beta, str) or getattr(self, "_measures", False)
        self._beta = 1.0 if isinstance(beta, str) else check_finite("beta", beta)

    def prepare(self, x: Any, index: Tensor | Sequence[int] | None = None, seed: int = 0) -> None:
        """Run the teacher now, for the ``at(x)`` that follows.

        Before ``student(x)`` its pass takes memory that the student's graph does not hold yet; in
        ``at(x)`` it would come on top. Of the pass nothing stays but the maps and the output.

        Args:
            x, index, seed: as in ``at(x, index, seed)``, which then takes the same ``x``, or the
                same tensors in another tuple or mapping. May run under ``inference_mode``.

        Raises:
            TypeError, ValueError: as ``at(x)``.
        """
        numbers = as_python("index", index), seed
        maps, self.teacher_output = self._teacher_maps(x, index, seed)
        self._prepared = x, numbers, maps, self.teacher_output

    def __call__(
        self,
        x: Any,
        index: Tensor | Sequence[int] | None = None,
        seed: int = 0,
        *,
        mask: Tensor | Sequence[Tensor] | None = None,
        sample_weights: Tensor | None = None,
        task_loss: Tensor | None = None,
    ) -> Tensor:
        """Return the loss of the student's last forward pass, with the teacher's on ``x``.

        Args:
            x: what the teacher takes, the samples that the student saw, in their order. A mapping
                (also transformers' BatchEncoding) gives keyword arguments, ``teacher(**x)``, a
                tuple several, ``teacher(*x)``; anything else is the only one. For a cache it holds
                one tensor and nothing else.
            index: with a cache, the samples' numbers in the data set, (B,) int64 or ints.
            seed: with a cache, that of the transform that made ``x``.
            mask, sample_weights: as in :func:`at_fused.at_loss`.
            task_loss: the rest of the loss, a scalar of the same pass of the student, for
                ``beta="auto"``; not looked at without gradients, or once beta is fixed.

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
                shape, a mask of channel attention; ``task_loss`` is missing for "auto", is given
                for a number, or has no gradient.
        """
        measured = self._check_task_loss(task_loss)
        prepared, self._prepared = self._prepared, None
        students = self._student.take_maps(x)
        self._student.check_graph(students)
        if prepared is None:
            teachers, self.teacher_output = self._teacher_maps(x, index, seed)
        else:
            before, numbers, teachers, self.teacher_output = prepared
            again = (as_python("index", index), seed) in ((None, 0), numbers)
            if not again or not same_batch(x, before):
                name = "x" if again else "index and seed, if given,"
                raise ValueError(f"{name} must be what at.prepare was called with, got another")
        self._check_token_options()
        if self._options.attend == "channel":
            check_channels(students, teachers)
            if mask is not None:
                raise ValueError("mask is for attend='spatial', got attend='channel'")
        as_grids = any(each.dim() == 3 for each in tensors_in(mask))
        for i, maps in enumerate(zip(students, teachers, strict=True)):
            students[i] = self._grid(i, 0, maps, x, as_grids)
            teachers[i] = self._grid(i, 1, maps, x, as_grids)
        if mask is not None and (skip := self._student.skip_tokens()):
            check_masks(mask, [q.unsqueeze(1) for q in students], skip)
        beta = self._auto.beta if self._auto and measured is None else self._beta
        weights = [beta * weight for weight in self._weights]
        arguments = self._options._replace(
            weights=weights, mask=mask, sample_weights=sample_weights
        )
        loss = _loss.map_loss_of_checked_options(students, teachers, arguments)
        if measured is None:
            return loss
        return self._chosen_by(measured, loss) * loss

    def _check_task_loss(self, task_loss: Tensor | None) -> Tensor | None:
        """Return the loss that is measured in this call, if one is."""
        if not self._measures and task_loss is not None:
            raise ValueError(f"task_loss is for beta='auto', got beta={self._beta:g}")
        if self._auto is None or self._auto.chosen:
            return None
        if not torch.is_grad_enabled():
            if not self._auto.logarithms:
                raise ValueError(
                    "beta: 'auto' is not measured yet, and cannot be without gradients: train a "
                    "step first, or give a number"
                )
            return None
        if task_loss is None:
            raise ValueError(
                f"task_loss must be given in the first {AUTO_STEPS} calls for beta='auto': "
                "task = criterion(student(x), y), then task + at(x, task_loss=task)"
            )
        check_loss("task_loss", task_loss)
        return task_loss

    def _chosen_by(self, task_loss: Tensor, transfer_loss: Tensor) -> float:
        """Return beta by the gradients so far, of a transfer loss at beta 1."""
        assert self._auto is not None
        if not transfer_loss.requires_grad:
            raise ValueError("beta: 'auto' needs a tapped layer that is trained, got none")
        model = self._student.model
        group = torch.distributed
        several = group.is_available() and group.is_initialized() and group.get_world_size() > 1
        if several and distributed(model) is None:
            raise ValueError(
                "beta: 'auto' needs the student in its DistributedDataParallel, as each of the "
                "processes would measure another beta: AttentionTransfer(ddp, ...), or a number"
            )
        self._auto.add(gradient_ratio(task_loss, transfer_loss, model).ratio, model)
        if self._auto.chosen and self._verbose:
            print(f"beta {self._auto.beta:.3g}, by the gradients of the first {AUTO_STEPS} calls")
        return self._auto.beta

    def _check_token_options(self) -> None:
        """Refuse an option of tokens for a side without any."""
        tokens = [any(map(side.token_size, range(len(self.pairs)))) for side in self._sides]
        for name, value in self._tokens.items():
            each = [getattr(side.given, name) for side in self._sides]
            check_for_tokens(name, value, each, tokens, "none of its network's layers gives")

    def _run_teacher(self, x: Any) -> tuple[list[Tensor], Tensor | None]:
        args, kwargs = arguments_of(x)
        # Not for the hooks of another, whose student this teacher is.
        with evaluating(self._teacher.model), only_hooks_of(self._teacher.last):
            # The output may hold features, which are not to live on.
            logits = logits_of(self._teacher.model(*args, **kwargs))
        return self._teacher.take_maps(x), logits

    def _teacher_maps(self, x: Any, index: Any, seed: int) -> tuple[list[Tensor], Tensor | None]:
        if self.cache is None:
            if index is not None or seed != 0:
                raise ValueError(f"index and seed are for a cache, got {index!r:.80} and {seed!r}")
            return self._run_teacher(x)
        if index is None:
            raise ValueError("index must be given for a cache: the samples' numbers")
        args, kwargs = arguments_of(x)
        (rows, *others), name = (*args, *kwargs.values()), next(iter(kwargs), None)
        if others or not isinstance(rows, Tensor):
            found = ", ".join(map(kind, (rows, *others)))
            raise TypeError(f"x must be one tensor for a cache, also in a mapping, got {found}")

        def compute(rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
            maps, logits = self._run_teacher({name: rows} if kwargs else rows)
            return maps, logits if logits is not None and logits.dim() == 2 else None

        if self._teacher.last.undecided:  # and might never run, where all is stored
            compute(rows[:1])
        identity = self._hash(*self._identity, precision(rows), name)
        return self.cache.fetch(compute, rows, index, identity=identity, seed=seed)

    def _grid(self, i: int, side: int, maps: tuple[Tensor, Tensor], x: Any, grid: bool) -> Tensor:
        """Return a map of a pair; one of tokens as a grid, as its partner or the images in x."""
        q, other, own = maps[side], maps[1 - side], self._sides[side]
        given, seen, count = own.given.map_size, own.token_size(i), q.shape[1]
        if not seen or (q.shape == other.shape and not grid and not given):
            return q
        images = [image.shape[2:] for image in tensors_in(x) if image.dim() == 4]
        like = [other.shape[1:]] if other.dim() > 2 else images
        sizes = [given] if given else [*(_of_proportions(count, each) for each in like), seen]
        size = next((each for each in sizes if each and math.prod(each) == count), None)
        if size is None and other.dim() == 2 and len(seen) == 1:
            return q  # words, or a signal
        if size is None:
            raise ValueError(
                f"map_size must be (H, W) of {count} tokens, whose partner's map is "
                f"{written(tuple(other.shape[1:]))}, got {given}"
            )
        return q.unflatten(1, tuple(size))

    def gradient_ratio(
        self, task_loss: Tensor, transfer_loss: Tensor, *, verbose: bool = True
    ) -> GradientRatio:
        """Compare the gradients of the task and of ``at(x)`` for the student's parameters.

            task, transfer = criterion(student(x), y), at(x)
            if step % 100 == 0:
                at.gradient_ratio(task, transfer)
            (task + transfer).backward()

        Args:
            task_loss: the rest of the loss, a scalar with a graph, of any floating dtype.
            transfer_loss: the result of ``at(x)``, beta included, for the same pass; likewise.
            verbose: whether to print a line of it.

        Returns:
            The norms, their ratio and cosine: see :func:`at_fused.gradient_ratio`.

        Raises:
            TypeError, ValueError: as :func:`at_fused.gradient_ratio`.
        """
        found = gradient_ratio(task_loss, transfer_loss, self._student.model)
        if verbose:
            beta = self.beta if isinstance(self.beta, str) else f"{self.beta:g}"
            print(f"beta {beta}: {found}")
        return found

    def remove(self) -> None:
        """Take all hooks away: both networks are as they were."""
        self._student.remove()
        self._teacher.remove()

    def __repr__(self) -> str:
        options = {**self._given, "beta": self.beta}
        pairs = ", ".join(s if s == t else f"{s} <- {t}" for s, t in self.pairs)
        return f"AttentionTransfer({pairs}; {', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _of_proportions(count: int, shape: Size) -> tuple[int, ...]:
    """Return a grid of so many positions, if there is one, with the proportions of a map (H, W)."""
    if math.prod(shape) == count or len(shape) != 2:
        return tuple(shape)
    height, width = shape
    h = math.isqrt(count * height // width) or 1
    return (h, count // h) if h * width == count // h * height else ()
