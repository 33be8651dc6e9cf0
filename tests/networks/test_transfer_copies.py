"""Copies, pickles, exports and traces of networks with AttentionTransfer, and its errors."""

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
    """Return a network of torch's own classes, which any process can unpickle."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.Flatten())


def hooked() -> tuple[Any, Any, Any, Tensor]:
    student, teacher, x = plain_net(4), plain_net(6), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["0", "1"], beta=BETA)
    return at, student, teacher, x


def is_clean(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for n, h in vars(m).items() if n.startswith("_forward_")]
    return not any(
        isinstance(hook, Hook) or hook is True for by_id in hooks for hook in by_id.values()
    )


def save_and_load(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize("copy_of", [copy.deepcopy, save_and_load])
# torch.jit and FX quantization are deprecated, but still in use.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning"
)


# ---- copies of networks --------------------------------------------------------------------------


@COPIES
def test_copies_of_networks_have_no_hooks(copy_of: Callable[[Any], Any]) -> None:
    at, student, teacher, x = hooked()
    assert b"at_fused" not in pickle.dumps(student)  # so it loads without the package
    for model in (student, teacher):
        other = copy_of(model)
        assert is_clean(other)
        assert [type(m) for m in other.modules()] == [type(m) for m in plain_net(1).modules()]
        assert torch.equal(other(x), model(x))
    model = copy_of(nn.Sequential(student, nn.Linear(64, 2)))  # within a larger network
    assert is_clean(model)
    student(x)
    loss = at(x)
    student(x)
    other(x + 1), model(x + 1)
    assert torch.equal(at(x), loss)


def double(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2 * output


@COPIES
def test_copies_keep_the_order_of_other_hooks(copy_of: Callable[[Any], Any]) -> None:
    student, teacher, x = plain_net(4), plain_net(6), torch.randn(2, 3, 8, 8)
    student[0].register_forward_hook(double)
    at = AttentionTransfer(student, teacher, ["0"], beta=BETA)
    student[0].register_forward_hook(double)
    alone, both = copy_of(student), copy_of((at, student))
    assert list(alone[0]._forward_hooks.values()) == [double, double]
    for model in (student, both[1]):
        order = [isinstance(hook, Hook) for hook in model[0]._forward_hooks.values()]
        assert order == [False, True, False]
    y = student(x)
    assert torch.equal(alone(x), y)
    assert torch.equal(both[1](x), y)
    assert torch.equal(both[0](x), at(x))


# ---- copies of AttentionTransfer, alone and with its networks ------------------------------------


class Trainer(nn.Module):
    """A network with its own AttentionTransfer as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.at: Any = None
        self.net, self.teacher = plain_net(4), plain_net(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


# By case: the part of a trainer to copy, and the AttentionTransfer and student in the copy.
PARTS: dict[str, tuple[Callable[[Trainer], Any], Callable[[Any], tuple[Any, Any]]]] = {
    "alone": (lambda t: t.at, lambda at: (at, at._student.model)),
    "first": (lambda t: (t.at, t.net, t.teacher), lambda parts: parts[:2]),
    "last": (lambda t: (t.net, t.teacher, t.at), lambda parts: (parts[2], parts[0])),
    "attribute": (lambda t: t, lambda t: (t.at, t.net)),
    "attribute of the student": (lambda t: t, lambda t: (t.at, t)),
}


@COPIES
@pytest.mark.parametrize("case", PARTS)
def test_copies_include_their_networks(case: str, copy_of: Callable[[Any], Any]) -> None:
    trainer, x = Trainer(), torch.randn(2, 3, 8, 8)
    student, names = trainer.net, ["0", "1"]
    if case == "attribute of the student":
        student, names = trainer, [("net.0", "0"), ("net.1", "1")]
    at = trainer.at = AttentionTransfer(student, trainer.teacher, names, beta=BETA)
    student(x)
    loss = at(x)
    loss.backward()
    expected = [p.grad for p in trainer.net.parameters() if p.grad is not None]
    student(x)  # its maps have a graph, and must not be copy_of
    trainer.zero_grad()
    part, unpack = PARTS[case]
    other, model = unpack(copy_of(part(trainer)))
    model(x)
    other(x).backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], expected)
    assert all(p.grad is None for p in trainer.parameters())
    assert torch.equal(at(x), loss)
    # A second copy works too, and remove() of the first removes only its own hooks.
    second_at, second_model = unpack(copy.deepcopy(part(trainer)))
    second_model(x)
    assert torch.equal(second_at(x), loss)
    other.remove()
    assert is_clean(model)
    student(x)
    assert torch.equal(at(x), loss)


def test_remove_hooks() -> None:
    at, student, teacher, x = hooked()
    handle = student[0].register_forward_hook(double)
    other = AttentionTransfer(student, plain_net(3), ["1"], beta=BETA)
    y = student(x)
    at_fused.remove_hooks(nn.Sequential(student, teacher))
    assert is_clean(student)
    assert is_clean(teacher)
    assert list(student[0]._forward_hooks) == [handle.id]
    assert torch.equal(student(x), y)
    for transfer in (at, other):
        transfer._student.last_pass.maps.clear(), transfer._student.last_pass.features.clear()
        with pytest.raises(RuntimeError, match=r"student's layer '.' .*its hook was removed"):
            transfer(x)
        transfer.remove()
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got AttentionTransfer"):
        at_fused.remove_hooks(at)


def test_remove_keeps_hooks_of_another_attention_transfer() -> None:
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

CAPTURES: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "export": lambda model, x: torch.export.export(model, (x,)).module(),
    "strict": lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    "trace": lambda model, x: torch.jit.trace(model, x),
    "symbolic": lambda model, x: fx.symbolic_trace(model),
}


@pytest.mark.parametrize("method", CAPTURES)
def test_exports_and_traces_have_no_taps(method: str) -> None:
    at, student, teacher, x = hooked()
    for model in (student, teacher, copy.deepcopy(student)):
        program = CAPTURES[method](model.eval(), x)
        assert "at_fused" not in str(program.inlined_graph if method == "trace" else program.graph)
        torch.testing.assert_close(program(x), model(x))
    student.train()(x)
    at(x).backward()  # uses the maps of this pass, not those of the export


def test_script_error_suggests_a_copy() -> None:
    _, student, _, x = hooked()
    with pytest.raises(AttributeError, match=r"at\.remove\(\) before, or script copy\.deepcopy"):
        torch.jit.script(student)
    assert torch.equal(torch.jit.script(copy.deepcopy(student))(x), student(x))


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
def test_torchscript_layers_raise(side: int) -> None:
    nets: list[Any] = [plain_net(4), plain_net(6)]
    nets[side][0] = torch.jit.script(nets[side][0])
    name = ("student", "teacher")[side]
    with pytest.raises(TypeError, match=f"{name}'s '0' is a TorchScript module, which takes no"):
        AttentionTransfer(*nets, ["0"], beta=1.0)
    assert is_clean(nets[1 - side])


@pytest.mark.parametrize("side", [0, 1])
def test_replaced_layers_raise(side: int) -> None:
    at, *nets, x = hooked()
    nets[side][0] = copy.deepcopy(nets[side][0])
    nets[0](x)
    name = ("student", "teacher")[side]
    with pytest.raises(RuntimeError, match=f"{name}'s layer '0' .* was replaced after"):
        at(x)


def test_layer_missing_in_an_fx_graph_raises() -> None:
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
