"""AttentionTransfer: the loss of two networks that nobody edited."""

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
from transfer_networks import BETA, GROUPS, by_hand, gradients, loss_once, networks, task_loss

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
    expected = by_hand(student, teacher, x, y, **options)
    right = gradients(student, expected)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, **options)
    loss = task_loss(student(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), right)


def test_other_sizes_are_interpolated_where_asked() -> None:
    student, teacher, x, _ = networks()
    pairs = [("groups.0", "groups.1"), ("groups.1", "groups.0")]
    for attend, message in (("spatial", "map size.*resize='maps'"), ("channel", "number of ch")):
        with pytest.raises(ValueError, match=f"pair 0 must have the same {message}"):
            loss_once(student, teacher, x, pairs, attend=attend)
    (_, s), (_, t) = student(x), teacher.eval()(x)
    expected = BETA * sum(expected_loss(s[i], t[1 - i], resize="maps").mean() for i in (0, 1))
    torch.testing.assert_close(loss_once(student, teacher, x, pairs, resize="maps"), expected)


def test_the_teacher_runs_once_in_eval_mode_without_gradients() -> None:
    student, teacher, x, y = networks()
    runs: list[nn.Module] = []

    def on_teacher(module: nn.Module, args: Any, output: Any) -> None:
        runs.append(module)
        assert not torch.is_grad_enabled()
        assert not any(m.training for m in teacher.modules())

    student.register_forward_hook(lambda module, *_: runs.append(module))
    teacher.register_forward_hook(on_teacher)
    teacher.groups[1].eval()
    modes = [m.training for m in teacher.modules()]
    before = copy.deepcopy(teacher.state_dict())
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    student(x), at(x)  # the first batch runs once more, to see how features lie
    runs.clear()
    for _ in range(2):
        (task_loss(student(x), y) + at(x)).backward()
    assert runs == [student, teacher] * 2
    assert all(p.grad is None for p in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)
    student(x)
    with pytest.raises(RuntimeError, match="size"):
        at(torch.randn(4, 5, 8, 8).double())
    assert [m.training for m in teacher.modules()] == modes
    with torch.no_grad():
        torch.testing.assert_close(at.teacher_output, teacher.eval()(x)[0])


def test_calls_that_do_not_belong_together() -> None:
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


# ---- what layers give ----------------------------------------------------------------------------


class Wrapping(nn.Module):
    """A network whose layer gives more than a tensor, or does not run."""

    def __init__(self, wrap: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.skip = nn.Conv2d(3, 4, 3), False
        # Before other hooks, as if the layer itself did it.
        self.layer.register_forward_hook(lambda module, args, output: wrap(output))

    def forward(self, x: Tensor) -> Any:
        if self.skip:
            return x
        self.given = self.layer(x)
        return self.given[0]


Both = namedtuple("Both", "feature extra")


@pytest.mark.parametrize("wrap", [lambda x: (x, 1), lambda x: [x], lambda x: Both(x, None)])
def test_layers_that_give_more_than_a_tensor(wrap: Callable[[Tensor], Any]) -> None:
    student, teacher, x = Wrapping(wrap), Wrapping(wrap), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["layer"], beta=2.0)
    found, loss = student(x), at(x)
    assert type(student.given) is type(wrap(x))
    torch.testing.assert_close(loss, 2 * at_fused.at_loss(found, teacher(x).detach()))
    student(x)
    student.skip = True  # a pass without the layer does not use the map of another
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
def test_a_layer_that_gives_something_else(wrap: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        loss_once(Wrapping(wrap), Wrapping(wrap), torch.randn(2, 3, 4, 4), ["layer"])


def test_tokens_and_maps() -> None:
    """One token is put before 36 patches, which the other network gives as a map."""

    def tokens(x: Tensor) -> tuple[Tensor]:
        return (torch.cat([torch.ones(len(x), 1, 4), x.flatten(2).mT], 1),)

    student, teacher, x = Wrapping(tokens), Wrapping(lambda x: (x,)), torch.randn(2, 3, 8, 8)
    options: dict[str, Any] = {"skip_tokens": (1, 0), "map_size": ((6, 6), None)}
    expected = BETA * at_fused.at_loss(student(x), teacher(x), channel_dim=(-1, 1), **options)
    for given in ({}, options, {"example": x}, {"skip_tokens": (1, None)}):
        torch.testing.assert_close(loss_once(student, teacher, x, ["layer"], **given), expected)
    for size, message in (((4, 9), "same map size.*4x9 and 6x6"), ((5, 7), "36 tokens.*6x6")):
        with pytest.raises(ValueError, match=message):
            loss_once(student, teacher, x, ["layer"], map_size=(size, None))


def test_options_of_tokens_where_there_are_none() -> None:
    student, teacher, x, _ = networks()
    for option in ({"skip_tokens": 1}, {"map_size": (4, 4)}):
        with pytest.raises(ValueError, match=f"{min(option)} is for token features"):
            loss_once(student, teacher, x, GROUPS, **option)


# ---- wrong arguments -----------------------------------------------------------------------------


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"student": 3}, TypeError, "student must be an nn.Module, got int"),
    ({"teacher": "same"}, ValueError, "must be two networks"),
    ({"layers": "groups.0"}, TypeError, "layers must be a list"),
    ({"layers": [3]}, TypeError, r"layers\[0\] must be a name or a pair"),
    ({"layers": [("groups.1", "groups.7")]}, ValueError, "teacher WRN has no module .*: groups"),
    ({"layers": ["groups.0", "groups.0"]}, ValueError, "'groups.0' must be named only"),
    ({"layers": None}, ValueError, "layers or example must be given"),
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
    ({"example": []}, TypeError, r"example \(or the first batch\) must hold"),
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
    # Nothing is left behind by what was refused.
    assert not any(m._forward_hooks for m in (*student.modules(), *teacher.modules()))


def test_beta_may_be_set_anew() -> None:
    student, teacher, x, _ = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=1.0)
    student(x)
    one = at(x)
    at.beta = 3.0
    student(x)
    torch.testing.assert_close(at(x), 3 * one)
    assert "groups.0" in repr(at)
    assert "beta=3.0" in repr(at)
    with pytest.raises(ValueError, match="beta must be finite"):
        at.beta = float("inf")
    assert at.beta == 3


@pytest.mark.parametrize("side", [0, 1])
def test_replicas_of_data_parallel_are_refused(side: int) -> None:
    nets, x = list(networks()[:2]), torch.randn(2, 3, 8, 8).double()
    at = AttentionTransfer(*nets, GROUPS, beta=BETA)
    with pytest.raises(RuntimeError, match=r"not work in nn\.DataParallel with several devices"):
        nets[side]._replicate_for_data_parallel()(x)
    at.remove()


def test_the_teacher_runs_once_for_each_sample(tmp_path: Path) -> None:
    student, teacher, x, _ = networks()
    rows: list[int] = []
    teacher.register_forward_pre_hook(lambda m, args: rows.append(len(args[0])))

    def call(at: AttentionTransfer, index: Any = None, x: Tensor = x, **options: Any) -> Tensor:
        student(x)
        return at(x, index, **options)

    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    expected, logits = call(at), at.teacher_output
    for wrong in ({"index": [7, 2, 9, 0]}, {"seed": 1}):
        with pytest.raises(ValueError, match="index and seed need a cache, got"):
            call(at, **wrong)
    at.remove()
    cache, every = at_fused.TeacherCache(tmp_path, samples=10), [7, 2, 9, 0]
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache)
    rows.clear()
    for index in ([7, 2], every, torch.tensor(every)):
        loss = call(at, index, x[: len(index)])
    assert rows[-2:] == [2, 2]  # after those that show how features lie
    rows.clear()
    torch.testing.assert_close((loss, at.teacher_output), (expected, logits))
    loss.backward()
    # Another seed, another option of the maps, another precision, another teacher: computed anew.
    call(at, every, seed=1)
    call(AttentionTransfer(student, teacher, GROUPS, beta=BETA, cache=cache, p=1.0), every)
    with torch.autocast("cpu", torch.bfloat16):
        call(at, every)
    with torch.no_grad():
        teacher.stem.weight.mul_(1.5)
    call(at, every)
    assert [n for n in rows if n > 1] == [4, 4, 4, 4]
    with pytest.raises(RuntimeError, match="sample 7 is not the input"):
        call(at, every, x + 1)
    with pytest.raises(ValueError, match="index must be given"):
        call(at)


def test_prepared() -> None:
    student, teacher, x, _ = networks()
    count: list[int] = []
    teacher.register_forward_pre_hook(lambda *_: count.append(1))
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
            student(x)  # what was prepared is gone
        assert torch.equal(at(x), expected)
        assert torch.equal(at.teacher_output, logits)
    assert len(count) == 7  # one more in the first batch, to see how features lie
