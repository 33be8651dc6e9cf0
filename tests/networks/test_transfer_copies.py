"""Copies, pickles, exports and traces of networks with AttentionTransfer, and its messages."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, fx, nn
from torch.ao.quantization.quantize_fx import prepare_qat_fx
from torch.nn.utils.parametrizations import weight_norm
from torch.optim.swa_utils import AveragedModel
from transfer_networks import BETA, GROUPS, networks, task_loss

import at_fused
from at_fused import AttentionTransfer
from at_fused._models import Hook
from at_fused.train.networks import WRN


def plain_net(width: int) -> nn.Sequential:
    """A network of torch's own classes, which any process can load."""
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 4, 3), nn.Flatten())


def hooked() -> tuple[Any, Any, Any, Tensor]:
    student, teacher, x = plain_net(4), plain_net(6), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["0", "1"], beta=BETA)
    return at, student, teacher, x


def is_clean(model: nn.Module) -> bool:
    hooks = [h for m in model.modules() for n, h in vars(m).items() if n.startswith("_forward_")]
    none = not any(isinstance(hook, Hook) for each in hooks for hook in each.values())
    return none and not any("at_fused" in str(type(m).__mro__) for m in model.modules())


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def saved(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
# torch.jit and FX's quantization are on their way out, and still in use.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning"
)


# ---- a copy of a network alone -------------------------------------------------------------------


@COPIES
def test_copies_of_networks_have_no_hooks(copied: Callable[[Any], Any]) -> None:
    at, student, teacher, x = hooked()
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


def test_an_averaged_model_is_a_copy_without_hooks() -> None:
    at, student, _, x = hooked()
    assert b"at_fused" not in pickle.dumps(student)  # which does without the package
    average = AveragedModel(student)
    assert is_clean(average)
    (student(x).sum() + at(x)).backward()
    average.update_parameters(student)
    assert torch.equal(average(x), student(x))


class Layer(nn.Module):
    """A layer that a registry knows, and that is copied and pickled in a way of its own."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, name: str) -> None:
        Layer.known[name] = cls

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.scratch = nn.Conv2d(3, width, 3), [1]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class OwnState(Layer, name="state"):
    def __getstate__(self) -> dict[str, Any]:
        return {"own": {k: v for k, v in self.__dict__.items() if k != "scratch"}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state["own"])
        self.scratch = [2]


class OwnCopy(OwnState, name="copy"):
    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        other = type(self).__new__(type(self))
        memo[id(self)] = other
        other.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return other

    def __reduce__(self) -> Any:
        return type(self), (4,), self.__getstate__()


@COPIES
@pytest.mark.parametrize("kind", [OwnState, OwnCopy])
def test_layers_with_their_own_way_of_copying(kind: Any, copied: Callable[[Any], Any]) -> None:
    student, teacher, x = nn.Sequential(kind()), nn.Sequential(kind()), torch.randn(2, 3, 8, 8)
    at = AttentionTransfer(student, teacher, ["0"], beta=BETA)
    assert list(Layer.known.values()) == [OwnState, OwnCopy]
    other, both = copied(student), copied((teacher, at, student))
    assert is_clean(other)
    assert type(other[0]) is kind
    student(x)
    both[2](x)
    assert torch.equal(other(x), student(x))
    assert torch.equal(both[1](x), at(x))


def test_shared_and_parametrized_layers() -> None:
    conv = weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    student, teacher = nn.Sequential(conv, nn.ReLU(), conv), nn.Sequential(nn.Conv2d(3, 5, 3, 1, 1))
    at, x = AttentionTransfer(student, teacher, [("0", "0")], beta=BETA), torch.randn(2, 3, 8, 8)

    def loss() -> Tensor:
        student(x)
        return at(x)

    other = copy.deepcopy(student)
    assert is_clean(other)
    assert other[0] is other[2]
    assert torch.equal(other(x), student(x))
    expected = loss()
    # What was hooked can be parametrized, and what was parametrized can cease to be.
    nn.utils.parametrize.remove_parametrizations(conv, "weight")
    torch.testing.assert_close(loss(), expected)
    weight_norm(teacher[0])
    assert torch.equal(copy.deepcopy(teacher)(x), teacher(x))
    torch.testing.assert_close(loss(), expected)
    nn.utils.parametrize.remove_parametrizations(teacher[0], "weight")
    at.remove()
    assert is_clean(student)
    assert is_clean(teacher)


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
    "list": (lambda t: [t.net, t.teacher, t.at], lambda found: (found[2], found[0])),
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
    for each, own in ((other._student, at._student), (other._teacher, at._teacher)):
        assert len(each.attached) == len(own.attached)
        assert all(a.hook_dicts() for a in each.attached)
    model(x)
    other(x).backward()
    torch.testing.assert_close([p.grad for p in model.parameters() if p.grad is not None], right)
    assert all(p.grad is None for p in trainer.parameters())
    assert torch.equal(at(x), loss)
    # A copy of the copy is one as well, and the copy's hooks are removed by the copy.
    assert all(copy.deepcopy(other)._student.attached[1].hook_dicts())
    other.remove()
    assert is_clean(model)
    student(x)
    assert torch.equal(at(x), loss)


# ---- at_fused.remove_hooks -----------------------------------------------------------------------


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
        each._student.last.maps.clear(), each._student.last.features.clear()
        with pytest.raises(RuntimeError, match=r"student's layer '.' .*its hook was removed"):
            each(x)
        each.remove()
    at_fused.remove_hooks(student)
    with pytest.raises(TypeError, match=r"module must be an nn\.Module, got AttentionTransfer"):
        at_fused.remove_hooks(at)
    # Of two on a network each takes its own.
    at, other = (AttentionTransfer(student, plain_net(3), ["1"], beta=BETA) for _ in "ab")
    at.remove()
    student(x)
    assert other(x) > 0
    other.remove()
    assert is_clean(student)
    assert not any(vars(m._forward_hooks) for m in student.modules())


def test_types_that_programs_look_up() -> None:
    at, student, _, x = hooked()
    assert [type(m) for m in student] == [type(m) for m in plain_net(4)]
    assert repr(student) == repr(plain_net(4))
    mapping = torch.ao.quantization.get_default_qat_qconfig_mapping("fbgemm")
    graphs = [prepare_qat_fx(net, mapping, (x,)).code for net in (student, plain_net(4))]
    assert graphs[0] == graphs[1]
    at.remove()
    assert type(student) is nn.Sequential


# ---- exports and traces --------------------------------------------------------------------------


def targets(graph: fx.Graph) -> Iterator[str]:
    return (str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_has_no_taps(strict: bool) -> None:
    at, student, teacher, x = hooked()
    for model in (student, teacher, copy.deepcopy(student)):
        program = torch.export.export(model.eval(), (x,), strict=strict)
        assert not any("at_fused" in target for target in targets(program.graph))
        torch.testing.assert_close(program.module()(x), model(x))
    student.train()(x)
    at(x).backward()  # the maps are those of the pass, not of the export


def test_traces_have_no_taps(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    at, student, teacher, x = hooked()
    for model in (student, teacher):
        traced = torch.jit.trace(model, x)
        assert "at_fused" not in str(traced.inlined_graph)
        assert torch.equal(traced(x), model(x))
    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(student, x)
    student(x)
    at(x).backward()


def test_symbolic_traces() -> None:
    student, teacher, x, _ = networks()
    AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    for model in (student, teacher):
        graph = fx.symbolic_trace(model.eval())
        assert not any("at_fused" in target for target in targets(graph.graph))
        torch.testing.assert_close(graph(x)[0], model(x)[0])


def test_script_says_what_to_do() -> None:
    at, student, _, x = hooked()
    with pytest.raises(AttributeError, match=r"at\.remove\(\) before, or script copy\.deepcopy"):
        torch.jit.script(student)
    assert torch.equal(torch.jit.script(copy.deepcopy(student))(x), student(x))
    at.remove()
    assert torch.equal(torch.jit.script(student)(x), student(x))


# ---- messages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [0, 1])
def test_torchscript_is_refused_by_name(side: int) -> None:
    name, x = ("student", "teacher")[side], torch.randn(2, 3, 8, 8)
    for part, wanted in ((False, f"{name} is a TorchScript"), (True, f"{name}'s layer '0' is a")):
        nets: list[Any] = [plain_net(4), plain_net(6)]
        if part:
            nets[side][0] = torch.jit.script(nets[side][0])
        else:
            nets[side] = torch.jit.trace(nets[side], x)
        for how in ({"layers": ["0"]}, {"example": x}):
            with pytest.raises(TypeError, match=f"{wanted}.*takes no hooks"):
                AttentionTransfer(*nets, beta=1.0, **how)
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
    at = AttentionTransfer(graph, teacher, GROUPS, beta=BETA)
    graph(x)
    with pytest.raises(RuntimeError, match=r"student's layer 'groups.0' .*such as 'groups\.0\.0\."):
        at(x)
    at.remove()
    pairs = [("groups.0.0.conv2", "groups.0")]
    at = AttentionTransfer(graph, teacher, pairs, beta=BETA)
    (task_loss(graph(x), y) + at(x)).backward()
    other = copy.deepcopy((graph, at))
    with torch.no_grad():
        graph(x), other[0](x)
        torch.testing.assert_close(other[1](x), at(x))


def test_a_teachers_layer_that_does_not_run() -> None:
    class Skipping(WRN):
        def forward(self, x: Tensor) -> Any:
            return self.stem(x)

    student, _, x, _ = networks()
    at = AttentionTransfer(student, Skipping(10, 1).double(), ["groups.0"], beta=BETA)
    student(x)
    with pytest.raises(RuntimeError, match=r"teacher's layer 'groups.0' .* did not run; teacher"):
        at(x)
