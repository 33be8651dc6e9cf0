"""Calls of AttentionTransfer: batches, outputs, grad modes, masks, weights and order of passes."""

from __future__ import annotations

import weakref
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transfer_networks import BETA, GROUPS, call, gradients, networks, total_loss, transfer_loss

import at_fused
from at_fused import AttentionTransfer, TeacherCache
from at_fused._models import logits_of

# ---- outputs of the teacher ----------------------------------------------------------------------


@dataclass(slots=True)
class Single:
    scores: Tensor
    note: str = ""


Named = namedtuple("Named", "loss logits")


class Net(nn.Module):
    """A small network with optional further inputs and a wrapped output."""

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


def layer_features(net: nn.Module, names: list[str], batch: Any) -> list[Tensor]:
    features: dict[str, Tensor] = {}
    for name in names:
        layer = net.get_submodule(name)
        layer.register_forward_hook(lambda m, args, y, name=name: features.update({name: y}))
    call(net, batch)
    return [features[name] for name in names]


def conv_loss(student: nn.Module, teacher: nn.Module, batch: Any) -> Tensor:
    """Return at_loss of the features of both networks' layer ``conv``."""
    with torch.no_grad():
        (target,) = layer_features(teacher, ["conv"], batch)
    return at_fused.at_loss(layer_features(student, ["conv"], batch)[0], target)


LOGITS, OTHER = torch.randn(2, 5), torch.randn(2, 4, 3, 3)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, OTHER),
        OrderedDict(features=OTHER, logits=LOGITS),
        OrderedDict(out=LOGITS, aux=OTHER),
        {"scores": LOGITS, "n": 5},
        Single(LOGITS),
        Named(OTHER, LOGITS),
        SimpleNamespace(logits=LOGITS, features=OTHER),
    ],
    ids=range(8),
)
def test_logits_are_found_in_common_outputs(output: Any) -> None:
    assert logits_of(output) is LOGITS


def test_only_the_logits_of_a_teacher_output_are_kept(tmp_path: Path) -> None:
    references: list[weakref.ref[Tensor]] = []

    def wrap(logits: Tensor, x: Tensor) -> Any:
        references.append(weakref.ref(x))
        return ([x], logits) if has_no_logits else {"x": x, "logits": logits}

    student, teacher, x = Net(), Net(6, wrap), images()
    for cache in (None, TeacherCache(tmp_path, samples=4)):
        for has_no_logits in (0, 1):
            at = AttentionTransfer(student, teacher, ["conv"], beta=1.0, cache=cache)
            student(x), at(x, range(4) if cache else None, has_no_logits if cache else 0)
            at.remove()
            assert references[-1]() is None
            assert (at.teacher_output is None) == has_no_logits
    with pytest.raises(TypeError, match="teacher_logits must be a tensor, got NoneType"):
        at_fused.kd_loss(student(x), at.teacher_output)


# ---- batches -------------------------------------------------------------------------------------

X, MASK = torch.randn(4, 3, 8, 8), (torch.rand(4, 1, 8, 8) > 0.3).float()
BATCHES: list[Any] = [
    {"x": X, "mask": MASK},
    {"x": X, "scale": 0.5},
    (X, MASK),
    (X, None, 2.0),
    OrderedDict(mask=MASK, x=X, scale=3.0),
]


@pytest.mark.parametrize("is_prepared", [False, True])
@pytest.mark.parametrize("batch", BATCHES, ids=range(len(BATCHES)))
def test_batches_of_several_inputs(batch: Any, is_prepared: bool) -> None:
    student, teacher = Net(), Net(6)
    inputs = batch
    if isinstance(batch, tuple):
        inputs = dict(zip(("x", "mask", "scale"), batch, strict=False))
    expected = conv_loss(student, teacher, inputs)
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0)
    if is_prepared:
        at.prepare(batch)
    call(student, batch)
    loss = at(type(batch)(batch))  # the same tensors in a new container are the same batch
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(at.teacher_output, teacher(**inputs).detach())
    at.prepare(batch)
    call(student, batch)
    with pytest.raises(ValueError, match=r"x must be the same as in at\.prepare"):
        at({**inputs, "scale": 7.0})


def test_cache_requires_a_single_tensor(tmp_path: Path) -> None:
    student, teacher = Net(), Net(6)
    passes: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    cache = TeacherCache(tmp_path, samples=4)
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0, cache=cache)
    for batch in ({"x": X}, (X,), {"x": X}, X):
        call(student, batch)
        torch.testing.assert_close(at(batch, range(4)), conv_loss(student, teacher, X))
    assert sum(passes) == 2 + 4  # at: once with a keyword, once without; conv_loss: every time
    for wrong, got in (
        ((X, MASK), "Tensor, Tensor"),
        ({"x": X, "scale": 2.0}, "Tensor, float"),
        ([X], "list"),
    ):
        student(X)
        with pytest.raises(TypeError, match=f"x must be one tensor with a cache, .* got {got}$"):
            at(wrong, range(4))


# ---- grad modes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["prepared", "prepared, cached", "teacher"])
def test_teacher_may_run_in_inference_mode(case: str, tmp_path: Path) -> None:
    student, teacher, x, y = networks()
    expected = total_loss(student, teacher, x, y)
    expected_gradients = gradients(student, expected)
    has_cache = "cached" in case
    cache, index = (TeacherCache(tmp_path, samples=4), range(4)) if has_cache else (None, None)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache)
    if case == "teacher":
        teacher.forward = torch.inference_mode()(teacher.forward)
    for _ in range(2):  # the second step reads the cache
        with torch.inference_mode():
            if case != "teacher":
                at.prepare(x, index)
        output = student(x)
        loss = cross_entropy(output[0], y) + at(x, index)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients(student, loss), expected_gradients)
        at_fused.kd_loss(output[0], at.teacher_output, y).backward()


class Trunk(nn.Module):
    """A head on a trunk that may run without gradients."""

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
def test_frozen_trunk_gives_a_constant_loss(mode: str) -> None:
    student, teacher, x = Trunk(mode), Trunk(), images()
    student.trunk.requires_grad_(False)
    at = AttentionTransfer(student, teacher, ["trunk.1"], beta=2.0)
    output, loss = student(x), at(x)
    expected = 2 * at_fused.at_loss(student.trunk(x), teacher.trunk(x).detach())
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)
    (output.sum() + loss).backward()
    at.remove()
    # A trained layer still gets its gradient if the other layer has no graph.
    at = AttentionTransfer(student, teacher, ["trunk.1", "last"], beta=2.0)
    student(x), at(x).backward()


@pytest.mark.parametrize("layers", [["trunk.1", "last"], ["trunk"]], ids=str)
@pytest.mark.parametrize("mode", ["whole pass", "no_grad", "checkpoint"])
def test_trained_layer_without_a_graph_raises(mode: str, layers: list[str]) -> None:
    for training in (False, True):
        student, teacher, x = Trunk(mode).train(training), Trunk(), images()
        at = AttentionTransfer(student, teacher, layers, beta=1.0)
        with torch.set_grad_enabled(mode != "whole pass"):
            student(x)
        with pytest.raises(RuntimeError, match=f"layer '{layers[0]}' has no graph.*use_reentrant"):
            at(x)
        with torch.no_grad():
            student(x), at(x)  # evaluation needs no graph


# ---- the order of passes -------------------------------------------------------------------------


def test_input_of_an_earlier_pass_raises() -> None:
    student, teacher, x, other = Net(), Net(6), images(), images()
    at = AttentionTransfer(student, teacher, ["conv"], beta=1.0)
    mask = torch.ones(4, 1, 8, 8)
    for first, last in ((x, other), ((x, mask), (other, mask)), ({"x": x}, {"x": other})):
        call(student, first), call(student, last)
        with pytest.raises(RuntimeError, match=r"input of the \w+'s last pass.*after each"):
            at(first)
    student(other)
    expected = at(other)
    # No error for copies, the same x twice, views, passes of an earlier step and compiled passes.
    torch._dynamo.reset()
    compiled = torch.compile(student, backend="eager", fullgraph=True)
    for first, last in ((x, other.clone()), (other, other), (x, other[:])):
        student(first), student(last)
        torch.testing.assert_close(at(other), expected)
    student(x), at(x), student(other), at(other), student(other.clone())
    torch.testing.assert_close(at(other), expected)
    student(other), student(x), compiled(x=other)
    torch.testing.assert_close(at(other), expected)


def test_pass_without_a_call_is_freed_by_the_next_pass() -> None:
    student, x = Trunk(), images()
    AttentionTransfer(student, Trunk(), ["last"], beta=1.0)
    storages: list[StorageWeakRef] = []
    hook = student.trunk.register_forward_hook
    hook(lambda m, args, y: storages.append(StorageWeakRef(y.untyped_storage())))
    student(x).sum().backward()
    assert storages.pop().expired()  # freed by the backward, as without AttentionTransfer
    x_reference = weakref.ref(x)
    student(x)
    assert not storages[0].expired()
    student.register_forward_pre_hook(lambda *_: storages.append(storages.pop().expired()))
    del x
    with torch.no_grad():
        student(images())
    assert storages[0] is True  # freed before the next pass allocates
    assert storages[1].expired()  # nothing is kept without gradients
    assert x_reference() is None


# ---- masks and sample weights --------------------------------------------------------------------


class Tokens(nn.Module):
    """A network of patch tokens with one token before them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches, self.block = nn.Conv2d(3, width, 2, 2), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT
        return self.block(torch.cat([tokens[:, :1], tokens], 1))


MASK_8, MASK_4 = torch.rand(4, 8, 8), torch.rand(4, 16) > 0.3
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5])


@pytest.mark.parametrize(
    ("layers", "mask", "options"),
    [
        (["trunk", "last"], MASK_8, {}),
        (["trunk", "last"], MASK_8 > 0.3, {"weights": [2.0, 0.5], "form": "paper"}),
        (["trunk", "last"], [MASK_8, MASK_8[:, ::2]], {"p": 3.0, "absolute": False}),
        (["trunk", "last"], None, {"attend": "channel"}),
        ([("trunk", "last"), ("last", "trunk")], MASK_8, {"resize": "maps"}),
        (["block"], MASK_4, {}),
        (["block"], MASK_8, {"map_size": (4, 4)}),
    ],
    ids=range(7),
)
def test_masks_and_weights_of_samples(
    layers: list[Any], mask: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    has_tokens = layers == ["block"]
    student, teacher = (Tokens(4), Tokens(6)) if has_tokens else (Trunk(), Trunk())
    layout = {"channel_dim": -1, "skip_tokens": 1} if has_tokens else {}
    pairs = [(layer, layer) if isinstance(layer, str) else layer for layer in layers]
    features, targets = (
        layer_features(net, [pair[side] for pair in pairs], X)
        for side, net in enumerate((student, teacher))
    )
    targets = [x.detach() for x in targets]
    factors = {"mask": mask, "sample_weights": WEIGHTS}
    expected = 3 * at_fused.at_loss(features, targets, **factors, **options, **layout)
    expected_gradients = gradients(student, expected)
    for cache in (None, TeacherCache(tmp_path, samples=4)):
        at = AttentionTransfer(student, teacher, layers, beta=3.0, cache=cache, **options)
        for _ in range(2):
            student(X)
            loss = at(X, range(4) if cache else None, **factors)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(gradients(student, loss), expected_gradients)
        at.remove()


@pytest.mark.parametrize(
    ("layer", "factor", "options", "message"),
    [
        ("last", {"mask": MASK_8[:2]}, {}, r"mask must be \(B, H, W\) for pair 0 .*\(2, 8, 8\)"),
        ("last", {"mask": [MASK_8] * 3}, {}, "one tensor or one per pair, got 3 for 1 pairs"),
        ("last", {"mask": MASK_8}, {"attend": "channel"}, "mask is for attend='spatial'"),
        ("last", {"sample_weights": WEIGHTS[:3]}, {}, r"sample_weights must be \(4,\)"),
        (
            "block",
            {"mask": torch.ones(4, 17)},
            {},
            r"16 tokens left by skip_tokens=1.*\[:, 1:\]",
        ),
    ],
    ids=range(5),
)
def test_wrong_masks_and_weights_raise(layer: str, factor: Any, options: Any, message: str) -> None:
    student, teacher = (Trunk(), Trunk()) if layer == "last" else (Tokens(4), Tokens(6))
    with pytest.raises(ValueError, match=message):
        transfer_loss(student, teacher, X, [layer], **options, **factor)


def test_cache_rejects_a_replaced_forward(tmp_path: Path) -> None:
    """Reject a hidden precision: accelerate puts autocast into ``forward`` of prepared networks."""
    teacher, cache = Net(6), TeacherCache(tmp_path, samples=4)
    teacher.forward = torch.autocast("cpu", torch.bfloat16)(teacher.forward)
    with pytest.raises(ValueError, match="cache: the teacher's forward was replaced"):
        AttentionTransfer(Net(), teacher, ["conv"], beta=1.0, cache=cache)
