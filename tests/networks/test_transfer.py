"""AttentionTransfer: its loss, the layers and arguments it accepts, and its teacher passes."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import expected_loss
from torch import Tensor, nn
from transfer_networks import (
    BETA,
    GROUPS,
    gradients,
    networks,
    task_loss,
    total_loss,
    transfer_loss,
)

import at_fused
from at_fused import AttentionTransfer
from at_fused.train.networks import WRN

# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1.0, "collapse": "sum"},
        {"p": 3.0, "absolute": False},
        {"collapse": "max", "form": "paper"},
        {"weights": [1.0, 0.0, 2.5]},
        {"eps": 0.1, "eps_mode": "add"},
        {"attend": "channel"},
    ],
    ids=str,
)
def test_loss_and_gradients(options: dict[str, Any]) -> None:
    student, teacher, x, y = networks()
    if "attend" in options:
        teacher = WRN(16, 1, base=4).double()
    expected = total_loss(student, teacher, x, y, **options)
    expected_gradients = gradients(student, expected)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, **options)
    loss = task_loss(student(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), expected_gradients)


def test_map_sizes_differ_only_with_resize() -> None:
    student, teacher, x, _ = networks()
    pairs = [("groups.0", "groups.1"), ("groups.1", "groups.0")]
    for attend, message in (("spatial", "map size.*resize='maps'"), ("channel", "number of ch")):
        with pytest.raises(ValueError, match=f"pair 0 must have the same {message}"):
            transfer_loss(student, teacher, x, pairs, attend=attend)
    (_, s), (_, t) = student(x), teacher.eval()(x)
    expected = BETA * sum(expected_loss(s[i], t[1 - i], resize="maps").mean() for i in (0, 1))
    torch.testing.assert_close(transfer_loss(student, teacher, x, pairs, resize="maps"), expected)


def test_teacher_runs_once_in_eval_mode_without_gradients() -> None:
    student, teacher, x, y = networks()
    passes: list[nn.Module] = []

    def check_teacher(module: nn.Module, args: Any, output: Any) -> None:
        passes.append(module)
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in teacher.modules())

    student.register_forward_hook(lambda module, *_: passes.append(module))
    teacher.register_forward_hook(check_teacher)
    teacher.groups[1].eval()
    modes = [m.training for m in teacher.modules()]
    state = copy.deepcopy(teacher.state_dict())
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    student(x), at(x)  # the first batch takes a second pass, which detects the features' layouts
    passes.clear()
    for _ in range(2):
        (task_loss(student(x), y) + at(x)).backward()
    assert passes == [student, teacher] * 2
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), state, rtol=0, atol=0)
    student(x)
    with pytest.raises(RuntimeError, match="size"):
        at(torch.randn(4, 5, 8, 8).double())
    assert [m.training for m in teacher.modules()] == modes
    with torch.no_grad():
        torch.testing.assert_close(at.teacher_output, teacher.eval()(x)[0])


def test_call_without_a_matching_student_pass_raises() -> None:
    student, teacher, x, _ = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    with pytest.raises(RuntimeError, match=r"layer 'groups.0' returned no map.*before each at"):
        at(x)
    student(x)
    at(x)
    with pytest.raises(RuntimeError, match="before each at"):
        at(x)
    student(x)
    with pytest.raises(ValueError, match="same batch size, got 4 and 2"):
        at(x[:2])


# ---- outputs of layers ---------------------------------------------------------------------------


class Wrapping(nn.Module):
    """A network with a layer that returns more than a tensor, or is skipped."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.skip = nn.Conv2d(3, 4, 3), False
        # Runs before other hooks, as if the layer itself wrapped its output.
        self.layer.register_forward_hook(lambda module, args, output: wrap(output))

    def forward(self, x: Tensor) -> Any:
        if self.skip:
            return x
        self.layer_output = self.layer(x)
        return self.layer_output[0]


Both = namedtuple("Both", "feature extra")


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: [x], lambda x: Both(x, None)])
def test_first_item_of_a_sequence_is_the_feature(wrap: Callable[[Tensor], Any]) -> None:
    student, teacher, x = Wrapping(wrap), Wrapping(wrap), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["layer"], beta=2.0)
    feature, loss = student(x), at(x)
    assert type(student.layer_output) is type(wrap(x))
    torch.testing.assert_close(loss, 2 * at_fused.at_loss(feature, teacher(x).detach()))
    student(x)
    student.skip = True  # a pass that skips the layer must not use the map of an earlier pass
    student(x)
    with pytest.raises(RuntimeError, match="layer 'layer' returned no map"):
        at(x)


@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (lambda x: {0: x}, TypeError, r"'layer' \(Conv2d\) must return a tensor, .* got dict"),
        (lambda x: x.flatten(1), ValueError, "the output of layer 'layer' must be"),
    ],
)
def test_unsupported_layer_output_raises(wrap: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        transfer_loss(Wrapping(wrap), Wrapping(wrap), torch.randn(2, 3, 4, 4), ["layer"])


def test_tokens_are_compared_with_maps() -> None:
    def to_tokens(x: Tensor) -> tuple[Tensor]:
        return (torch.cat([torch.ones(len(x), 1, 4), x.flatten(2).mT], 1),)

    student, teacher, x = Wrapping(to_tokens), Wrapping(lambda x: (x,)), torch.randn(2, 3, 8, 8)
    layout: dict[str, Any] = {"skip_tokens": (1, 0), "map_size": ((6, 6), None)}
    expected = BETA * at_fused.at_loss(student(x), teacher(x), channel_dim=(-1, 1), **layout)
    for options in ({}, layout, {"example": x}, {"skip_tokens": (1, None)}):
        loss = transfer_loss(student, teacher, x, ["layer"], **options)
        torch.testing.assert_close(loss, expected)
    for size, message in (((4, 9), "same map size.*4x9 and 6x6"), ((5, 7), "36 tokens.*6x6")):
        with pytest.raises(ValueError, match=message):
            transfer_loss(student, teacher, x, ["layer"], map_size=(size, None))


def test_token_options_without_tokens_raise() -> None:
    student, teacher, x, _ = networks()
    for option in ({"skip_tokens": 1}, {"map_size": (4, 4)}):
        with pytest.raises(ValueError, match=f"{min(option)} is for token features"):
            transfer_loss(student, teacher, x, GROUPS, **option)


# ---- wrong arguments -----------------------------------------------------------------------------


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": 3}, TypeError, "student must be an nn.Module, got int"),
    ({"teacher": "same"}, ValueError, "must be two networks"),
    ({"layers": "groups.0"}, TypeError, "layers must be a list"),
    ({"layers": [3]}, TypeError, r"layers\[0\] must be a name or a pair"),
    ({"layers": [("groups.1", "groups.7")]}, ValueError, "teacher WRN has no module .*: groups"),
    ({"layers": ["groups.0", "groups.0"]}, ValueError, "'groups.0' must be named only"),
    ({"layers": None}, ValueError, r"pass layers \(names\), or example"),
    ({"beta": "much"}, ValueError, "beta must be a number or 'auto', got 'much'$"),
    ({"beta": None}, TypeError, "beta must be a number"),
    ({"beta": float("nan")}, ValueError, "beta must be finite"),
    ({"attend": "both"}, ValueError, "attend must be 'spatial' or 'channel', got 'both'$"),
    ({"resize": "features"}, ValueError, "resize must be None or 'maps', got 'features'$"),
    ({"weights": [1.0]}, ValueError, "weights must have one number per pair"),
    ({"reduction": "none"}, TypeError, "has no option 'reduction'"),
    ({"map_size": (True, 4)}, ValueError, "map_size must be"),
    ({"skip_tokens": (1, -1)}, ValueError, "skip_tokens must be >= 0, got -1"),
    ({"skip_tokens": 1, "channel_dim": 1}, ValueError, "skip_tokens is for token features"),
    ({"map_size": (4, 4), "attend": "channel"}, ValueError, "map_size is for spatial"),
    ({"resize": "maps", "attend": "channel"}, ValueError, "resize is for spatial attention"),
    ({"example": []}, TypeError, r"example \(or the first batch\) must contain"),
    ({"cache": "folder"}, TypeError, "cache must be a TeacherCache"),
]


@pytest.mark.parametrize(("change", "error", "message"), WRONG, ids=range(len(WRONG)))
def test_wrong_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    student, teacher, _, _ = networks()
    arguments = {"student": student, "teacher": teacher, "layers": GROUPS, "beta": 1.0, **change}
    if arguments["teacher"] == "same":
        arguments["teacher"] = student
    with pytest.raises(error, match=message):
        AttentionTransfer(**arguments)
    # A rejected call leaves no hooks.
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))


def test_beta_can_be_changed() -> None:
    student, teacher, x, _ = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=1.0)
    student(x)
    loss = at(x)
    at.beta = 3.0
    student(x)
    torch.testing.assert_close(at(x), 3 * loss)
    assert "groups.0" in repr(at)
    assert "beta=3.0" in repr(at)
    with pytest.raises(ValueError, match="beta must be finite"):
        at.beta = float("inf")
    assert at.beta == 3


@pytest.mark.parametrize("side", [0, 1])
def test_data_parallel_replicas_raise(side: int) -> None:
    nets, x = list(networks()[:2]), torch.randn(2, 3, 8, 8).double()
    at = AttentionTransfer(*nets, GROUPS, beta=BETA)
    with pytest.raises(RuntimeError, match=r"not work in nn\.DataParallel with several devices"):
        nets[side]._replicate_for_data_parallel()(x)
    at.remove()


def test_teacher_runs_once_per_cached_sample(tmp_path: Path) -> None:
    student, teacher, x, _ = networks()
    batch_sizes: list[int] = []
    teacher.register_forward_pre_hook(lambda m, args: batch_sizes.append(len(args[0])))

    def call(at: AttentionTransfer, index: Any = None, x: Tensor = x, **options: Any) -> Tensor:
        student(x)
        return at(x, index, **options)

    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    expected, logits = call(at), at.teacher_output
    for wrong in ({"index": [7, 2, 9, 0]}, {"seed": 1}):
        with pytest.raises(ValueError, match="index and seed need a cache, got"):
            call(at, **wrong)
    at.remove()
    cache, indices = at_fused.TeacherCache(tmp_path, samples=10), [7, 2, 9, 0]
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache)
    batch_sizes.clear()
    for index in ([7, 2], indices, torch.tensor(indices)):
        loss = call(at, index, x[: len(index)])
    assert batch_sizes[-2:] == [2, 2]  # earlier passes detect the features' layouts
    batch_sizes.clear()
    torch.testing.assert_close((loss, at.teacher_output), (expected, logits))
    loss.backward()
    # A new seed, option of the maps, precision or teacher is not in the cache.
    call(at, indices, seed=1)
    call(AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache, p=1.0), indices)
    with torch.autocast("cpu", torch.bfloat16):
        call(at, indices)
    with torch.no_grad():
        teacher.stem.weight.mul_(1.5)
    call(at, indices)
    assert [n for n in batch_sizes if n > 1] == [4, 4, 4, 4]
    with pytest.raises(RuntimeError, match="sample 7 is not the input"):
        call(at, indices, x + 1)
    with pytest.raises(ValueError, match=r"index \(the numbers of the samples\) is required"):
        call(at)


def test_prepare_runs_the_teacher_early() -> None:
    student, teacher, x, _ = networks()
    passes: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: passes.append(1))
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    student(x)
    expected, logits = at(x), at.teacher_output
    for other, seed, message in (
        (x, 0, ""),
        (x.clone(), 0, r"x must be the same as in at\.prepare"),
        (x, 1, "index and seed, if given, must be"),
    ):
        at.prepare(x)
        student(x)
        if message:
            with pytest.raises(ValueError, match=message):
                at(other, seed=seed)
            student(x)  # the error discarded the prepared maps
        assert torch.equal(at(x), expected)
        assert torch.equal(at.teacher_output, logits)
    assert len(passes) == 7  # the first batch took a second pass, which detects layouts
