"""Calls of AttentionTransfer: batches, outputs, modes, factors and the order of passes."""

from __future__ import annotations

import weakref
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from transfer_networks import BETA, GROUPS, by_hand, call, gradients, networks, task_loss

import at_fused
from at_fused import AttentionTransfer, TeacherCache

# ---- what a teacher returns ----------------------------------------------------------------------


@dataclass
class Output:
    logits: Tensor
    hidden_states: Any = None


@dataclass(slots=True)
class Single:
    scores: Tensor
    note: str = ""


class Dict(dict[str, Any]):
    """A mapping that is weakly referred to, as a ModelOutput."""


Named = namedtuple("Named", "loss logits")


class Net(nn.Module):
    """A small network whose output is wrapped, and whose inputs may be several."""

    def __init__(self, width: int = 4, wrap: Callable[[Tensor, Tensor], Any] | None = None) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, width, 3), nn.Linear(width, 5)
        self.wrap = wrap

    def forward(self, x: Tensor, mask: Tensor | None = None, scale: float = 1.0) -> Any:
        x = self.conv(scale * x if mask is None else scale * x * mask)
        logits = self.head(torch.relu(x).mean((2, 3)))
        return logits if self.wrap is None else self.wrap(logits, x)


def images(n: int = 4) -> Tensor:
    return torch.randn(n, 3, 8, 8)


def by_eager(student: Net, teacher: Net, *args: Any, **kwargs: Any) -> Tensor:
    """Eager lines: the loss of the features of both."""
    features = []
    for net in (student, teacher):
        handle = net.conv.register_forward_hook(lambda m, a, y: features.append(y))
        net(*args, **kwargs)
        handle.remove()
    return at_fused.at_loss(features[0], features[1].detach())


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], bool]] = {
    "tuple": (lambda logits, x: (logits, x), True),
    "dict": (lambda logits, x: Dict(features=x, logits=logits), True),
    "segmentation": (lambda logits, x: Dict(out=logits, aux=x), True),
    "dict of one": (lambda logits, x: {"scores": logits, "n": 5}, True),
    "dataclass": (lambda logits, x: Output(logits, (x, x)), True),
    "dataclass of one": (lambda logits, x: Single(logits), True),
    "named tuple": (lambda logits, x: Named(x.sum(), logits), True),
    "object": (lambda logits, x: SimpleNamespace(logits=logits, features=x), True),
    "two in a dict": (lambda logits, x: {"scores": logits, "x": x}, False),
    "features": (lambda logits, x: [x], False),
    "features first": (lambda logits, x: ([x], logits), False),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_the_teachers_logits_are_kept_alone(case: str, tmp_path: Path) -> None:
    wrap, known = OUTPUTS[case]
    alive: list[weakref.ref[Tensor]] = []
    right: list[Tensor] = []

    def wrapped(logits: Tensor, x: Tensor) -> Any:
        alive.append(weakref.ref(x)), right.append(logits.clone())
        return wrap(logits, x)

    student, teacher, x = Net(), Net(6, wrapped), images()
    for cache in (None, TeacherCache(tmp_path, samples=4)):
        at = AttentionTransfer(student, teacher, ["conv"], beta=1.0, cache=cache)
        student(x), at(x, range(4) if cache else None)
        at.remove()
        assert alive[-1]() is None
        torch.testing.assert_close(at.teacher_output, right[-1] if known else None)
    if not known:
        with pytest.raises(TypeError, match="teacher_logits must be a tensor, got NoneType"):
            at_fused.kd_loss(student(x), at.teacher_output)


# ---- what both networks take ---------------------------------------------------------------------

X, MASK = torch.randn(4, 3, 8, 8), (torch.rand(4, 1, 8, 8) > 0.3).float()
BATCHES: list[Any] = [
    {"x": X, "mask": MASK},
    {"x": X, "scale": 0.5},
    (X, MASK),
    (X, None, 2.0),
    Dict(mask=MASK, x=X, scale=3.0),
]


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_batches_of_several_inputs(batch: Any, prepared: bool) -> None:
    student, teacher = Net(), Net(6)
    given = batch
    if isinstance(batch, tuple):
        given = dict(zip(("x", "mask", "scale"), batch, strict=False))
    expected = by_eager(student, teacher, **given)
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0)
    if prepared:
        at.prepare(batch)
    call(student, batch)
    loss = at(type(batch)(batch))  # the same tensors in another container are the same batch
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(at.teacher_output, teacher(**given).detach())
    at.prepare(batch)
    call(student, batch)
    with pytest.raises(ValueError, match=r"x must be what at\.prepare was called with"):
        at({**given, "scale": 7.0})


def test_a_cache_takes_the_single_tensor_of_a_batch(tmp_path: Path) -> None:
    student, teacher = Net(), Net(6)
    count: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: count.append(1))
    cache = TeacherCache(tmp_path, samples=4)
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0, cache=cache)
    for batch in ({"x": X, "scale": 0.5}, (X, None, 0.5), {"x": X, "scale": 2.0}):
        before = len(count)
        for _ in range(2):
            call(student, batch)
            loss = at(batch, range(4))
        assert len(count) == before + 1  # other options, other maps
        scale = batch["scale"] if isinstance(batch, dict) else batch[2]
        torch.testing.assert_close(loss, by_eager(student, teacher, X, scale=scale))
    for wrong, got in (
        ((X, MASK), "Tensor, Tensor"),
        ({"x": X, "mask": [MASK]}, "Tensor, list"),
        ([X], "list"),
        (("a",), "str"),
    ):
        student(X)
        with pytest.raises(TypeError, match=f"x must be a tensor for a cache, or .* got {got}$"):
            at(wrong, range(4))


# ---- grad modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("way", ["prepared", "teacher"])
def test_a_teacher_under_inference_mode(way: str, cached: bool, tmp_path: Path) -> None:
    student, teacher, x, y = networks()
    logits = teacher.eval()(x)[0].detach()
    expected = by_hand(student, teacher, x, y) + at_fused.kd_loss(student(x)[0], logits, y)
    right = gradients(student, expected)
    cache, index = (TeacherCache(tmp_path, samples=4), range(4)) if cached else (None, None)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache)
    if way == "teacher":
        teacher.forward = torch.inference_mode()(teacher.forward)
    for _ in range(2):  # computed, and stored
        if way == "prepared":
            with torch.inference_mode():
                at.prepare(x, index)
        output = student(x)
        loss = task_loss(output, y) + at(x, index)
        loss = loss + at_fused.kd_loss(output[0], at.teacher_output, y)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(student, loss), right)


class Trunk(nn.Module):
    """A trunk that may run without gradients, and a head."""

    def __init__(self, mode: str = "grad") -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.last, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 5)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "checkpoint":
            x = checkpoint(self.trunk, x, use_reentrant=True)
        else:
            with torch.set_grad_enabled(self.mode == "grad" and torch.is_grad_enabled()):
                x = self.trunk(x)
        return self.head(self.last(x).mean((2, 3)))


@pytest.mark.parametrize("mode", ["grad", "no_grad"])
def test_a_frozen_trunk_gives_a_constant(mode: str) -> None:
    student, teacher, x = Trunk(mode), Trunk(), images()
    student.trunk.requires_grad_(False)
    at = AttentionTransfer(student, teacher, ["trunk.1"], beta=2.0)
    output, loss = student(x), at(x)
    assert not loss.requires_grad
    expected = 2 * at_fused.at_loss(student.trunk(x), teacher.trunk(x).detach())
    torch.testing.assert_close(loss, expected)
    (output.sum() + loss).backward()
    assert student.head.weight.grad is not None
    at.remove()
    # Of a layer that is trained the gradient is there, whatever the other's graph.
    at = AttentionTransfer(student, teacher, ["trunk.1", "last"], beta=2.0)
    student(x), at(x).backward()


@pytest.mark.parametrize("layers", [["trunk.1"], ["trunk.1", "last"], ["trunk"]], ids=str)
@pytest.mark.parametrize("mode", ["whole pass", "no_grad", "checkpoint"])
def test_a_trained_layer_whose_graph_is_lost(mode: str, layers: list[str]) -> None:
    for training in (False, True):
        student, teacher, x = Trunk(mode).train(training), Trunk(), images()
        at = AttentionTransfer(student, teacher, layers, beta=1.0)
        with torch.set_grad_enabled(mode != "whole pass"):
            student(x)
        with pytest.raises(RuntimeError, match=f"layer '{layers[0]}' has no graph.*use_reentrant"):
            at(x)
        with torch.no_grad():
            student(x), at(x)  # an evaluation


# ---- the order of passes -------------------------------------------------------------------------


def test_the_x_of_an_earlier_pass() -> None:
    student, teacher, x, other = Net(), Net(6), images(), images()
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0)
    mask = torch.ones(4, 1, 8, 8)
    message = "x was the input of an earlier pass of the student.*after each student"
    for first, last, given in (
        (x, other, x),
        ((x, mask), (other, mask), (x, mask)),
        ((x, mask), (other, mask), x),
        ({"x": x}, {"x": other}, {"x": x}),
    ):
        for batch in (first, last):
            call(student, batch)
        with pytest.raises(RuntimeError, match=message):
            at(given)
    student(other)
    expected = at(other)
    # No evidence: copies, the same x twice, views, the passes of an earlier step.
    for passes in ((x, other.clone()), (other, other), (x, other[:])):
        for batch in passes:
            student(batch)
        torch.testing.assert_close(at(other), expected)
    student(x), at(x), student(other), at(other), student(other.clone())
    torch.testing.assert_close(at(other), expected)


def test_compiled_passes_are_no_evidence() -> None:
    torch._dynamo.reset()
    student, teacher, x, other = Net(), Net(6), images(), images()
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0)
    fast = torch.compile(student, backend="eager", fullgraph=True)
    student(x)
    expected = at(x)
    student(x), student(other)
    fast(x=x)
    torch.testing.assert_close(at(x), expected)


def test_a_pass_that_no_call_follows_keeps_nothing_beyond_the_next() -> None:
    student, x = Trunk(), images()
    AttentionTransfer(student, Trunk(), ["last"], beta=1.0)
    kept: list[StorageWeakRef] = []
    hook = student.trunk.register_forward_hook
    hook(lambda m, args, y: kept.append(StorageWeakRef(y.untyped_storage())))
    student(x).sum().backward()
    assert kept.pop().expired()  # by the backward, as without AttentionTransfer
    given = weakref.ref(x)
    student(x)
    assert not kept[0].expired()
    student.register_forward_pre_hook(lambda *_: kept.append(kept.pop().expired()))
    del x
    with torch.no_grad():
        student(images())
    assert kept[0] is True  # before another pass takes memory
    assert kept[1].expired()  # without gradients nothing is kept
    assert given() is None


# ---- factors -------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Patches as tokens, with one more in front."""

    num_prefix_tokens = 1

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, width, 2, 2), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        return self.block(torch.cat([tokens[:, :1], tokens], 1))


MASK_8, MASK_4 = torch.rand(4, 8, 8), torch.rand(4, 16) > 0.3
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("nets", "mask", "options"),
    [
        ("convolutions", MASK_8, {}),
        ("convolutions", MASK_8 > 0.3, {"weights": [2.0, 0.5], "form": "paper"}),
        ("convolutions", [MASK_8, MASK_8[:, ::2]], {"p": 3.0, "absolute": False}),
        ("convolutions", None, {"attend": "channel"}),
        ("crossed", MASK_8, {"resize": "maps"}),
        ("tokens", MASK_4, {}),
        ("tokens", MASK_8, {"map_size": (4, 4)}),
    ],
    ids=range(7),
)
def test_masks_and_weights_of_samples(
    nets: str, mask: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    of_student, of_teacher, more = ["trunk", "last"], ["trunk", "last"], {}
    student, teacher = Trunk(), Trunk()
    if nets == "crossed":
        of_teacher = ["last", "trunk"]
    if nets == "tokens":
        of_student, of_teacher, student, teacher = ["block"], ["block"], Tokens(4), Tokens(6)
        more = {"channel_dim": -1, "skip_tokens": 1}
    found: dict[tuple[nn.Module, str], Tensor] = {}
    for net in (student, teacher):
        for name in of_student:
            net.get_submodule(name).register_forward_hook(
                lambda m, args, y, key=(net, name): found.update({key: y})
            )
    student(X), teacher(X)
    own = [found[student, name] for name in of_student]
    targets = [found[teacher, name].detach() for name in of_teacher]
    factors = {"mask": mask, "sample_weights": WEIGHTS}
    expected = 3 * at_fused.at_loss(own, targets, **factors, **options, **more)
    right = gradients(student, expected)
    layers = list(zip(of_student, of_teacher, strict=True))
    for cache in (None, TeacherCache(tmp_path, samples=4)):
        at = AttentionTransfer(student, teacher, layers, beta=3.0, cache=cache, **options)
        for _ in range(2):
            student(X)
            loss = at(X, range(4) if cache else None, **factors)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients(student, loss), right)
        at.remove()


@pytest.mark.parametrize(
    ("layer", "factor", "options", "message"),
    [
        ("last", {"mask": MASK_8[:2]}, {}, r"mask must be \(B, H, W\) for pair 0 .*\(2, 8, 8\)"),
        ("last", {"mask": [MASK_8] * 3}, {}, "one tensor or one per pair, got 3 for 1 pairs"),
        ("last", {"mask": MASK_8}, {"attend": "channel"}, "mask is for attend='spatial'"),
        ("last", {"sample_weights": WEIGHTS[:3]}, {}, r"sample_weights must be \(4,\)"),
        ("block", {"mask": torch.ones(4, 17)}, {}, r"16 tokens that skip_tokens=1.*mask\[:, 1:\]"),
    ],
    ids=range(5),
)
def test_wrong_factors(layer: str, factor: Any, options: Any, message: str) -> None:
    student, teacher = (Trunk(), Trunk()) if layer == "last" else (Tokens(4), Tokens(6))
    at = AttentionTransfer(student, teacher, [layer], beta=1.0, **options)
    student(X)
    with pytest.raises(ValueError, match=message):
        at(X, **factor)


def test_a_cache_keeps_precisions_apart_that_the_teacher_enters(tmp_path: Path) -> None:
    """accelerate puts autocast into the ``forward`` of a network that it prepares."""
    student, teacher, x = Net(), Net(6), images()
    cache, found = at_fused.TeacherCache(tmp_path, samples=len(x)), []
    plain = teacher.forward
    cast = torch.autocast("cpu", torch.bfloat16)(plain)
    for forward in (cast, plain, cast):
        teacher.forward = forward
        for given in (cache, None):
            at = AttentionTransfer(student, teacher, ["conv"], beta=1.0, cache=given)
            student(x)
            found.append(at(x, list(range(len(x)))) if given else at(x))
            at.remove()
    assert found[0::2] == found[1::2]
    assert found[0] == found[4] != found[2]
