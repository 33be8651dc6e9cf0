"""Copies, pickles, exports and traces of networks with AttentionTransfer, and its messages."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transfer_networks import BETA, GROUPS, networks, task_loss

import at_fused
from at_fused import AttentionTransfer
from at_fused._models import Hook


def plain_net(width: int) -> nn.Sequential:
    """A network of torch's own classes, which any process can load."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.Flatten())


def hooked() -> tuple[Any, Any, Any, Tensor]:
    student, teacher, x = plain_net(4), plain_net(6), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["0", "1"], beta=BETA)
    return at, student, teacher, x


def is_clean(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for n, h in vars(m).items() if n.startswith("_forward_")]
    return not any(
        isinstance(hook, Hook) or hook is True for each in hooks for hook in each.values()
    )


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, saved])
# torch.jit and FX's quantization are on their way out, and still in use.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning"
)


# ---- a copy of a network alone -------------------------------------------------------------------


@COPIES
def test_copies_of_networks_have_no_hooks(copied: Callable[[Any], Any]) -> None:
    at, student, teacher, x = hooked()
    assert b"at_fused" not in pickle.dumps(student)  # which does without the package
    for model in (student, teacher):
        other = copied(model)
        assert is_clean(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in plain_net(1).modules()]
        assert torch.equal(other(x), model(x))
    model = copied(nn.Sequential(student, nn.Linear(64, 2)))  # within a larger network
    assert is_clean(model)
    student(x)
    value = at(x)
    student(x)
    other(x + 1), model(x + 1)
    assert torch.equal(at(x), value)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


@COPIES
def test_hooks_of_others_stay_in_their_order(copied: Callable[[Any], Any]) -> None:
    student, teacher, x = plain_net(4), plain_net(6), torch.randn(2, 3, 8, 8)
    student[0].register_forward_hook(double)
    at = AttentionTransfer(student, teacher, ["0"], beta=BETA)
    student[0].register_forward_hook(double)
    alone, both = copied(student), copied((at, student))
    assert list(alone[0]._forward_hooks.values()) == [double, double]
    for model in (student, both[1]):
        order = [isinstance(hook, Hook) for hook in model[0]._forward_hooks.values()]
        assert order == [False, True, False]
    y = student(x)
    assert torch.equal(alone(x), y)
    assert torch.equal(both[1](x), y)
    assert torch.equal(both[0](x), at(x))


# ---- a copy of AttentionTransfer, alone and with its networks ------------------------------------


class Trainer(nn.Module):
    """A network that holds its own AttentionTransfer."""

    def __init__(self) -> None:
        super().__init__()
        self.at: Any = None
        self.net, self.teacher = plain_net(4), plain_net(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# What is copied of a trainer, and the copies of its AttentionTransfer and of the student.
PARTS: dict[str, tuple[Callable[[Trainer], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "alone": (lambda t: t.at, lambda at: (at, at._student.model)),
    "first": (lambda t: (t.at, t.net, t.teacher), lambda found: found[:2]),
    "last": (lambda t: (t.net, t.teacher, t.at), lambda found: (found[2], found[0])),
    "held": (lambda t: t, lambda found: (found.at, found.net)),
    "held by itself": (lambda t: t, lambda found: (found.at, found)),
}


@COPIES
@pytest.mark.parametrize("which", PARTS)
def test_copies_with_their_networks(which: str, copied: Callable[[Any], Any]) -> None:
    trainer, x = Trainer(), torch.randn(2, 3, 8, 8)
    student, names = trainer.net, ["0", "1"]
    if which == "held by itself":
        student, names = trainer, [("net.0", "0"), ("net.1", "1")]
    at = trainer.at = AttentionTransfer(student, trainer.teacher, names, beta=BETA)
    student(x)
    loss = at(x)
    loss.backward()
    right = [p.grad for p in trainer.net.parameters() if p.grad is not None]
    student(x)  # the maps of a graph are at hand: they are not what is copied
    trainer.zero_grad()
    part, found = PARTS[which]
    other, model = found(copied(part(trainer)))
    model(x)
    other(x).backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], right)
    assert all(p.grad is None for p in trainer.parameters())
    assert torch.equal(at(x), loss)
    # A copy of the copy is one as well, and the copy's hooks are removed by the copy.
    again, second = found(copy.deepcopy(part(trainer)))
    second(x)
    assert torch.equal(again(x), loss)
    other.remove()
    assert is_clean(model)
    student(x)
    assert torch.equal(at(x), loss)


def test_remove_hooks() -> None:
    at, student, teacher, x = hooked()
    kept = student[0].register_forward_hook(double)
    other = AttentionTransfer(student, plain_net(3), ["1"], beta=BETA)
    y = student(x)
    at_fused.remove_hooks(nn.Sequential(student, teacher))
    assert is_clean(student)
    assert is_clean(teacher)
    assert list(student[0]._forward_hooks) == [kept.id]
    assert torch.equal(student(x), y)
    for each in (at, other):
        each._student.last_pass.maps.clear(), each._student.last_pass.features.clear()
        with pytest.raises(RuntimeError, match=r"student's layer '.' .*its hook was removed"):
            each(x)
        each.remove()
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got AttentionTransfer"):
        at_fused.remove_hooks(at)


def test_of_two_on_a_network_each_removes_its_own() -> None:
    student, x = plain_net(4), torch.randn(2, 3, 8, 8)
    at, other = (AttentionTransfer(student, plain_net(3), ["1"], beta=BETA) for _ in "ab")
    at.remove()
    assert is_clean(copy.deepcopy(student))
    student(x)
    assert other(x) > 0
    other.remove()
    assert is_clean(student)
    assert not any(vars(m._forward_hooks) for m in student.modules())


# ---- exports and traces --------------------------------------------------------------------------

TAKEN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "symbolic": lambda model, x: fx.symbolic_trace(model),
}


@pytest.mark.parametrize("how", TAKEN)
def test_what_takes_a_network_down_has_no_taps(how: str) -> None:
    at, student, teacher, x = hooked()
    for model in (student, teacher, copy.deepcopy(student)):
        taken = TAKEN[how](model.eval(), x)
        assert "at_fused" not in str(taken.inlined_graph if how == "trace" else taken.graph)
        torch.testing.assert_close(taken(x), model(x))
    student.train()(x)
    at(x).backward()  # the maps are those of the pass, not of the export


def test_script_says_what_to_do() -> None:
    _, student, _, x = hooked()
    with pytest.raises(AttributeError, match=r"at\.remove\(\) before, or script copy\.deepcopy"):
        torch.jit.script(student)
    assert torch.equal(torch.jit.script(copy.deepcopy(student))(x), student(x))


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
def test_torchscript_is_refused_by_name(side: int) -> None:
    nets: list[Any] = [plain_net(4), plain_net(6)]
    nets[side][0] = torch.jit.script(nets[side][0])
    name = ("student", "teacher")[side]
    with pytest.raises(TypeError, match=f"{name}'s '0' is a TorchScript module, which takes no"):
        AttentionTransfer(*nets, ["0"], beta=1.0)
    assert is_clean(nets[1 - side])


@pytest.mark.parametrize("side", [0, 1])
def test_a_layer_that_was_replaced(side: int) -> None:
    at, *nets, x = hooked()
    nets[side][0] = copy.deepcopy(nets[side][0])
    nets[0](x)
    name = ("student", "teacher")[side]
    with pytest.raises(RuntimeError, match=f"{name}'s layer '0' .* was replaced after"):
        at(x)


def test_a_layer_that_a_graph_does_not_call() -> None:
    student, teacher, x, y = networks()
    graph = fx.symbolic_trace(student)
    for nets in ((graph, teacher), (teacher, graph)):
        at = AttentionTransfer(*nets, GROUPS, beta=BETA)
        nets[0](x)
        side = ("student", "teacher")[nets[1] is graph]
        with pytest.raises(RuntimeError, match=f"{side}'s layer 'groups.0' .* its graph calls"):
            at(x)
        at.remove()
    at = AttentionTransfer(graph, teacher, [("groups.0.0.conv2", "groups.0")], beta=BETA)
    (task_loss(graph(x), y) + at(x)).backward()
    other = copy.deepcopy((graph, at))
    with torch.no_grad():
        graph(x), other[0](x)
        torch.testing.assert_close(other[1](x), at(x))
