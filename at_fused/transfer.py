"""Attention transfer between two networks without edits to either: hooks compute the maps.

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
    check_spatial_options,
    pair_weights,
)
from at_fused._hooks import TappedNetwork
from at_fused._layouts import check_module_options, check_token_option
from at_fused._models import (
    arguments_of,
    evaluating,
    find_ddp,
    logits_of,
    only_hooks_of,
    precision,
    same_batch,
    tensors_in,
    unwrap,
)
from at_fused._numbers import as_python, check_finite, type_name
from at_fused._observe import format_size
from at_fused._options import LossArguments, MapSizes
from at_fused.balance import AUTO_STEPS, AutoBeta, GradientRatio, check_loss, gradient_ratio
from at_fused.layers import (
    SIDES,
    Pair,
    check_networks,
    layers_to_tap,
    layout_overrides,
    parse_pairs,
)
from at_fused.teacher_cache import TeacherCache, TeacherHash

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AttentionTransfer:
    """Attention transfer from a teacher to a student: ``criterion(student(x), y) + at(x)``.

    Forward hooks tap layers of both networks (:func:`at_fused.attention_tap`), so neither network
    is edited. The hooks keep only the maps: a teacher's feature is freed as soon as its map is
    computed. ``at(x)`` runs the teacher once, in eval mode and without gradients, and returns

        beta * sum_j w_j L_j        L_j of at_loss, between the maps of the j-th pair of layers

    The loss is a mean over the batch. With DistributedDataParallel it is a mean over each process's
    share, and gradients are averaged. So ``beta`` means the same on one device and on eight.

    The student's maps hold its graph up to the tapped layers. ``at(x)`` passes the graph on to the
    loss, and a backward pass through the network frees it as usual. Without either, it lives until
    the student's next pass begins, so evaluate under ``no_grad``.

    Args:
        student: any module, also inside DistributedDataParallel or torch.compile. Its copies,
            pickles and exports have no hooks, unless they are copied together with this object.
        teacher: any module, likewise. It must be on the device of x; nothing in it changes.
        layers: a list of names from ``named_modules()``, for both networks, or of (student's,
            teacher's) names. A layer returns a tensor, or a tuple that begins with one; later
            layers must not change it in place. If a layer runs several times in a pass, its last
            run counts. None: the layers that :func:`match_layers` finds with ``example``.
        example: an input of both networks, such as two images. A mapping gives keyword arguments, a
            tuple positional ones. Both networks run on it in the constructor, in eval mode and
            without gradients, to infer the layout of their features. Without it, named layers take
            one more run, on the first batch, except torch's own convolutions, norms and poolings.
        beta: a finite number, which can be changed at any time. The paper uses 1e3, form="code".
            "auto" makes the gradient of this loss for the student's weights three times that of
            the task loss. It is measured in the first ten calls with gradients, which take
            ``task_loss``, and then fixed. If that loss needs ``teacher_output``, call ``prepare``
            first. Calls with a gradient of 0, inf or nan do not count. Measure both losses as they
            are added: before GradScaler, and not divided by accumulated batches. If the weights
            hardly move in ten calls, as in warm-up, beta comes out smaller, by a factor of up to
            six in docs/results.md (for its ViT, up to two times larger). With several processes,
            ``student`` must be the DistributedDataParallel.
        channel_dim: 1 or -1; None is inferred from the run. This and the next two options may be a
            pair (student's, teacher's).
        skip_tokens: the number of leading tokens to leave out of features (B, N, C); None means
            those that the network put before the patches in the run.
        map_size: (H, W) of tokens; None is inferred from the run, or else is the partner's (H, W).
        cache: a :class:`at_fused.TeacherCache` for the teacher's maps. Not allowed if the teacher's
            ``forward`` was replaced, as accelerate does: its precision is then unknown.
        verbose: whether to print the matched pairs, the layers left out, and a measured beta.
        options: p, collapse, form, weights, resize (None or "maps"), attend ("spatial" or
            "channel"), absolute, eps, eps_mode of :func:`at_fused.at_loss`.

    Attributes:
        pairs: the names of the layers, a list of (student, teacher).
        beta: the value passed; with "auto", the number measured so far, once there is one. To
            resume training after the tenth call, save it with the checkpoint and set it again.
            Calls may still pass ``task_loss`` then.
        teacher_output: the teacher's logits of the last ``at(x)`` or ``prepare``, for ``kd_loss``.
            The output if it is a tensor, else its field ``logits`` or ``out``, else the first item
            of a tuple or the only tensor of a mapping or dataclass, else None. Nothing else of the
            output is kept. A cache keeps only logits (B, K).

    Raises:
        TypeError, ValueError: an argument is invalid, a network has no module of a given name, or
            the layout of a layer's features is unknown. The message says what to pass.

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
            raise ValueError("student and teacher must be two networks, got the same one twice")
        if layers is None and example is None:
            raise ValueError("pass layers (names), or example (an input to find them)")
        if cache is not None and not isinstance(cache, TeacherCache):
            raise TypeError(f"cache must be a TeacherCache or None, got {type_name(cache)}")
        if cache is not None and any("forward" in vars(module) for module in teacher.modules()):
            raise ValueError(
                "cache: the teacher's forward was replaced, as accelerator.prepare does, so its "
                "precision is unknown; pass the original teacher, and call at(x) in torch.autocast"
            )
        self.beta = beta
        choices = CHOICES | {"attend": ("spatial", "channel"), "resize": (None, "maps")}
        checked = check_module_options(
            "AttentionTransfer", options, PairOptions.__annotations__, choices
        )
        self._repr_options = checked
        self._verbose = verbose
        self._arguments = arguments = LossArguments(**checked)
        check_spatial_options(arguments.attend, map_size=map_size)
        tokens = {"skip_tokens": skip_tokens, "map_size": map_size}
        self._token_options = {name: as_python(name, value) for name, value in tokens.items()}
        overrides = layout_overrides(channel_dim, **self._token_options)
        pairs = None if layers is None else parse_pairs(as_python("layers", layers))
        taps = layers_to_tap(networks, pairs, example, overrides, arguments.resize, verbose)
        self.pairs = [Pair(s.name, t.name) for s, t in zip(*taps, strict=True)]
        self._weights = pair_weights(arguments.weights, len(self.pairs)) or [1.0] * len(self.pairs)
        self.cache = cache
        self.teacher_output: Tensor | None = None
        # Everything that the teacher's maps depend on, except the input.
        names = [pair.teacher for pair in self.pairs]
        self._hash = TeacherHash(networks[1])
        map_options = float(arguments.p), arguments.collapse, arguments.absolute, arguments.attend
        self._identity = names, map_options, tuple(overrides[1][:2])
        self._prepared: tuple[Any, Any, list[Tensor], Tensor | None] | None = None
        self._student, self._teacher = self._sides = [
            TappedNetwork(*side, arguments)
            for side in zip(SIDES, (student, teacher), taps, overrides, strict=True)
        ]

    @property
    def beta(self) -> float | Literal["auto"]:
        """The factor of the loss; see the class."""
        if self._auto is None:
            return self._beta
        return self._auto.beta if self._auto.log_ratios else "auto"

    @beta.setter
    def beta(self, beta: float | Literal["auto"]) -> None:
        if isinstance(beta, str) and beta != "auto":
            raise ValueError(f"beta must be a number or 'auto', got {beta!r}")
        self._auto = AutoBeta() if isinstance(beta, str) else None
        # A loop that resumes with a measured number still passes task_loss.
        self._takes_task_loss = isinstance(beta, str) or getattr(self, "_takes_task_loss", False)
        self._beta = 1.0 if isinstance(beta, str) else check_finite("beta", beta)

    def prepare(self, x: Any, index: Tensor | Sequence[int] | None = None, seed: int = 0) -> None:
        """Run the teacher now, for the ``at(x)`` that follows.

        Call it before ``student(x)``: the teacher then runs while the student's graph does not
        exist yet, which lowers peak memory. Only the maps and the output are kept.

        Args:
            x, index, seed: as in ``at(x, index, seed)``, which must then get the same ``x``, or the
                same tensors in another tuple or mapping. May run under ``inference_mode``.

        Raises:
            TypeError, ValueError: as ``at(x)``.
        """
        key = as_python("index", index), seed
        maps, self.teacher_output = self._teacher_maps(x, index, seed)
        self._prepared = x, key, maps, self.teacher_output

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
        """Return the loss between the student's last forward pass and the teacher's pass on ``x``.

        Args:
            x: the teacher's input, with the student's samples in the same order. A mapping (also
                transformers' BatchEncoding) gives keyword arguments, ``teacher(**x)``, a tuple
                positional ones, ``teacher(*x)``. With a cache it must hold exactly one tensor.
            index: with a cache, the samples' numbers in the data set, (B,) int64 or ints.
            seed: with a cache, the seed of the transform that made ``x``.
            mask, sample_weights: as in :func:`at_fused.at_loss`.
            task_loss: the rest of the loss, a scalar from the same pass of the student, for
                ``beta="auto"``. Ignored without gradients, and once beta is fixed.

        Returns:
            A scalar that includes beta: float64 if any map is float64, else float32.

        Raises:
            RuntimeError: the student has not run since the last call; a tensor of ``x`` was in an
                earlier pass and not in the last (compiled passes are not checked); a layer that is
                trained, or follows one that is, ran without gradients.
            TypeError: ``x`` with a cache, ``mask`` or ``sample_weights`` has the wrong type.
            ValueError: the layout of a named layer's features is unknown; the maps of a pair differ
                in batch or size; an argument differs from the one in ``prepare``; an option is for
                tokens, or for a cache, without any; ``mask`` or ``sample_weights`` has the wrong
                shape; ``mask`` with channel attention; ``task_loss`` is missing for "auto", is
                passed with a number, or has no gradient.
        """
        measured_loss = self._check_task_loss(task_loss)
        prepared, self._prepared = self._prepared, None
        students = self._student.take_maps(x)
        self._student.check_graph(students)
        if prepared is None:
            teachers, self.teacher_output = self._teacher_maps(x, index, seed)
        else:
            prepared_x, key, teachers, self.teacher_output = prepared
            is_same_key = (as_python("index", index), seed) in ((None, 0), key)
            if not is_same_key or not same_batch(x, prepared_x):
                name = "x" if is_same_key else "index and seed, if given,"
                raise ValueError(f"{name} must be the same as in at.prepare, got another value")
        self._check_token_options()
        if self._arguments.attend == "channel":
            check_channels(students, teachers)
            if mask is not None:
                raise ValueError("mask is for attend='spatial', got attend='channel'")
        as_grids = any(m.dim() == 3 for m in tensors_in(mask))
        for i, maps in enumerate(zip(students, teachers, strict=True)):
            students[i] = self._to_grid(i, 0, maps, x, as_grids)
            teachers[i] = self._to_grid(i, 1, maps, x, as_grids)
        if mask is not None and (skip := self._student.skip_tokens()):
            check_masks(mask, [q.unsqueeze(1) for q in students], skip)
        beta = self._auto.beta if self._auto and measured_loss is None else self._beta
        weights = [beta * weight for weight in self._weights]
        arguments = self._arguments._replace(
            weights=weights, mask=mask, sample_weights=sample_weights
        )
        loss = _loss.map_loss_of_checked_options(students, teachers, arguments)
        if measured_loss is None:
            return loss
        return self._measure_beta(measured_loss, loss) * loss

    def _check_task_loss(self, task_loss: Tensor | None) -> Tensor | None:
        """Return the task loss if this call measures beta, else None."""
        if not self._takes_task_loss and task_loss is not None:
            raise ValueError(f"task_loss is for beta='auto', got beta={self._beta:g}")
        if self._auto is None or self._auto.is_fixed:
            return None
        if not torch.is_grad_enabled():
            if not self._auto.log_ratios:
                raise ValueError(
                    "beta: 'auto' is not measured yet, and measuring it takes gradients; run a "
                    "training step first, or set beta to a number"
                )
            return None
        if task_loss is None:
            raise ValueError(
                f"task_loss must be given in the first {AUTO_STEPS} calls with beta='auto': "
                "task = criterion(student(x), y), then task + at(x, task_loss=task)"
            )
        check_loss("task_loss", task_loss)
        return task_loss

    def _measure_beta(self, task_loss: Tensor, transfer_loss: Tensor) -> float:
        """Return beta from the gradients so far; ``transfer_loss`` has beta 1."""
        assert self._auto is not None
        if not transfer_loss.requires_grad:
            raise ValueError("beta: 'auto' needs a tapped layer that is trained, got none")
        model = self._student.model
        dist = torch.distributed
        is_parallel = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if is_parallel and find_ddp(model) is None:
            raise ValueError(
                "beta: 'auto' needs the student in its DistributedDataParallel; otherwise "
                "each process measures its own beta; use AttentionTransfer(ddp, ...) or a number"
            )
        self._auto.add(gradient_ratio(task_loss, transfer_loss, model).ratio, model)
        if self._auto.is_fixed and self._verbose:
            print(f"beta {self._auto.beta:.3g}, from the gradients of the first {AUTO_STEPS} calls")
        return self._auto.beta

    def _check_token_options(self) -> None:
        """Raise if an option of tokens was passed for a network without token features."""
        has_tokens = [any(map(side.token_size, range(len(self.pairs)))) for side in self._sides]
        for name, value in self._token_options.items():
            values = [getattr(side.overrides, name) for side in self._sides]
            check_token_option(
                name, value, values, has_tokens, lambda: "no layer of its network returns"
            )

    def _run_teacher(self, x: Any) -> tuple[list[Tensor], Tensor | None]:
        args, kwargs = arguments_of(x)
        # This teacher may be the student of another AttentionTransfer, with hooks of its own.
        with evaluating(self._teacher.model), only_hooks_of(self._teacher.last_pass):
            # Keep only the logits: the output may hold features.
            logits = logits_of(self._teacher.model(*args, **kwargs))
        return self._teacher.take_maps(x), logits

    def _teacher_maps(self, x: Any, index: Any, seed: int) -> tuple[list[Tensor], Tensor | None]:
        if self.cache is None:
            if index is not None or seed != 0:
                raise ValueError(f"index and seed need a cache, got {index!r:.80} and {seed!r}")
            return self._run_teacher(x)
        if index is None:
            raise ValueError("index (the numbers of the samples) is required with a cache")
        args, kwargs = arguments_of(x)
        (rows, *others), name = (*args, *kwargs.values()), next(iter(kwargs), None)
        if others or not isinstance(rows, Tensor):
            kinds = ", ".join(map(type_name, (rows, *others)))
            raise TypeError(f"x must be one tensor with a cache, or a mapping of one, got {kinds}")

        def compute(rows: Tensor) -> tuple[list[Tensor], Tensor | None]:
            maps, logits = self._run_teacher({name: rows} if kwargs else rows)
            return maps, logits if logits is not None and logits.dim() == 2 else None

        if self._teacher.last_pass.needs_layouts:  # a full cache would never run the teacher
            compute(rows[:1])
        identity = self._hash(*self._identity, precision(rows), name)
        return self.cache.fetch(compute, rows, index, identity=identity, seed=seed)

    def _to_grid(self, i: int, side: int, maps: Sequence[Tensor], x: Any, as_grid: bool) -> Tensor:
        """Return a map of a pair; tokens get the grid of their partner or of the images in x."""
        q, partner, network = maps[side], maps[1 - side], self._sides[side]
        map_size, inferred, count = network.overrides.map_size, network.token_size(i), q.shape[1]
        if not inferred or (q.shape == partner.shape and not as_grid and not map_size):
            return q
        images = [image.shape[2:] for image in tensors_in(x) if image.dim() == 4]
        similar = [partner.shape[1:]] if partner.dim() > 2 else images
        sizes = [map_size] if map_size else [*(_grid_like(count, s) for s in similar), inferred]
        size = next((each for each in sizes if each and math.prod(each) == count), None)
        if size is None and partner.dim() == 2 and len(inferred) == 1:
            return q  # text or a signal
        if size is None:
            raise ValueError(
                f"map_size must be (H, W) of {count} tokens, because the other network's map is "
                f"{format_size(tuple(partner.shape[1:]))}, got {map_size}"
            )
        return q.unflatten(1, tuple(size))

    def gradient_ratio(
        self, task_loss: Tensor, transfer_loss: Tensor, *, verbose: bool = True
    ) -> GradientRatio:
        """Compare the gradients of the task loss and of ``at(x)`` for the student's parameters.

            task, transfer = criterion(student(x), y), at(x)
            if step % 100 == 0:
                at.gradient_ratio(task, transfer)
            (task + transfer).backward()

        Args:
            task_loss: the rest of the loss, a scalar with a graph, of any floating dtype.
            transfer_loss: the result of ``at(x)`` for the same pass, beta included; likewise.
            verbose: whether to print the result in one line.

        Returns:
            The norms, their ratio and cosine: see :func:`at_fused.gradient_ratio`.

        Raises:
            TypeError, ValueError: as :func:`at_fused.gradient_ratio`.
        """
        result = gradient_ratio(task_loss, transfer_loss, self._student.model)
        if verbose:
            beta = self.beta if isinstance(self.beta, str) else f"{self.beta:g}"
            print(f"beta {beta}: {result}")
        return result

    def remove(self) -> None:
        """Remove all hooks from both networks."""
        self._student.remove()
        self._teacher.remove()

    def __repr__(self) -> str:
        options = {"beta": self.beta, **self._repr_options}
        pairs = ", ".join(s if s == t else f"{s} <- {t}" for s, t in self.pairs)
        return f"AttentionTransfer({pairs}; {', '.join(f'{k}={v!r}' for k, v in options.items())})"


def _grid_like(count: int, shape: Size) -> tuple[int, ...]:
    """Return the grid of ``count`` positions with the proportions of a map (H, W), or ()."""
    if math.prod(shape) == count or len(shape) != 2:
        return tuple(shape)
    height, width = shape
    h = math.isqrt(count * height // width) or 1
    return (h, count // h) if h * width == count // h * height else ()
