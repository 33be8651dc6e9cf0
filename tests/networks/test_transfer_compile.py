"""AttentionTransfer between networks that torch.compile compiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transfer_networks import BETA, GROUPS, by_hand, gradients, task_loss

from at_fused import AttentionTransfer

EAGER: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}


class Group(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Net(nn.Module):
    """The least network with three groups, which gives its features away as WRN does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(c, width, 3, padding=1) for c in (3, width, width))
        # A group within others, one that is the layer itself, and one that asks for its base's.
        inner = nn.Sequential(first, nn.ReLU())
        self.groups = nn.ModuleList([nn.Sequential(inner), second, Group(third, nn.ReLU())])
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for group in self.groups:
            x = group(x)
            features.append(x)
        return x.mean(dim=(2, 3)), features


def networks() -> tuple[Net, Net, Tensor]:
    return Net(4), Net(5), torch.randn(4, 3, 8, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(at: Any, fast: Any, student: Any, teacher: Any, x: Tensor, **options: Any) -> None:
    """Compare a step with the eager lines, on networks without hooks."""
    y = torch.arange(len(x)) % 4
    one, other, _ = networks()
    one.load_state_dict(student.state_dict()), other.load_state_dict(teacher.state_dict())
    expected = by_hand(one, other, x, y, **options)
    loss = task_loss(fast(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), gradients(one, expected))


@pytest.mark.parametrize(
    ("dynamic", "backend", "p"),
    [
        (True, "aot_eager", 2.5),
        pytest.param(None, "aot_eager", 2.5, marks=pytest.mark.exhaustive),
        pytest.param(True, "inductor", 2.0, marks=pytest.mark.exhaustive),
    ],
)
def test_dynamic_shapes(dynamic: bool | None, backend: str, p: float) -> None:
    student, teacher, x = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, p=p)
    fast = torch.compile(student, dynamic=dynamic, backend=backend, fullgraph=True)
    check(at, fast, student, teacher, x, p=p)
    check(at, fast, student, teacher, torch.cat([x, x + 1]), p=p)  # dynamic from now on
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(at, fast, student, teacher, torch.cat([x, x, x]), p=p)
    at.remove()
    # Another exponent is other code, as is another order of the layers.
    at = AttentionTransfer(student, teacher, GROUPS[::-1], beta=BETA, p=3.0)
    check(at, fast, student, teacher, x, p=3.0)


def run(model: Callable[[Tensor], Any], x: Tensor) -> None:
    task_loss(model(x), torch.arange(len(x))).backward()


@pytest.mark.parametrize(
    ("how", "before"),
    [
        ("network", "itself"),
        pytest.param("network", "copy", marks=pytest.mark.exhaustive),
        *((how, "another") for how in ("network", "method", "function", "layers")),
        ("part", "itself"),
    ],
)
def test_code_compiled_before_is_not_the_students(how: str, before: str) -> None:
    student, teacher, x = networks()
    baseline = {"itself": student, "copy": copy.deepcopy(student), "another": networks()[0]}[before]

    def compiled(model: Net) -> Callable[[Tensor], Any]:
        if how == "method":
            model.compile(**EAGER)
        elif how == "layers":
            for group in model.groups:
                group.compile(**EAGER)
        elif how == "function":
            return lambda x: step(model, x)
        else:
            return torch.compile(model, backend="aot_eager", fullgraph=how == "network")
        return model

    @torch.compile(**EAGER)
    def step(model: Net, x: Tensor) -> Any:
        return model(x)

    if how == "part":  # a graph break in the middle
        graph_break = torch._dynamo.graph_break
        student.groups[0][0][0].register_forward_hook(lambda *_: graph_break())
    plain, fast = compiled(baseline), compiled(student)
    run(plain, x)
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    for _ in range(2):
        check(at, fast, student, teacher, x)
        if before != "itself":
            run(plain, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(at, fast, student, teacher, x)
    at.remove()
    run(fast, x)
    assert not at._student.last.maps
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    check(at, fast, student, teacher, x)


def test_students_one_after_the_other() -> None:
    student, teacher, x = networks()
    others = [networks()[0] for _ in range(2)]
    first = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    fast = torch.compile(student, **EAGER)
    check(first, fast, student, teacher, x)
    first.remove()
    # Other layers; then the first layers again, whose code is there.
    at = AttentionTransfer(others[0], teacher, GROUPS[1:], beta=BETA)
    torch.compile(others[0], **EAGER)(x)
    assert len(at._student.take_maps(x)) == 2
    at.remove()
    at = AttentionTransfer(others[1], teacher, GROUPS, beta=BETA)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(at, torch.compile(others[1], **EAGER), others[1], teacher, x)


def test_a_compiled_teacher_of_the_same_class() -> None:
    student, teacher, x = networks()
    fast, slow = torch.compile(student, **EAGER), torch.compile(teacher, **EAGER)
    run(slow, x), run(fast, x)
    at = AttentionTransfer(fast, slow, GROUPS, beta=BETA)
    for _ in range(2):
        check(at, fast, student, teacher, x)
    run(slow, x)
    check(at, fast, student, teacher, x)


def test_copies_of_a_compiled_network() -> None:
    student, teacher, x = networks()
    fast = torch.compile(student, **EAGER)
    at = AttentionTransfer(fast, teacher, GROUPS, beta=BETA)
    check(at, fast, student, teacher, x)
    alone = copy.deepcopy(fast)
    assert not any(m._forward_hooks for m in alone.modules())
    torch.testing.assert_close(alone(x)[0], student(x)[0])
    check(at, fast, student, teacher, x)
    model, other = copy.deepcopy((fast, at))
    check(other, model, model._orig_mod, other._teacher.model, x)
    assert not at._student.last.maps


def test_a_layer_that_is_compiled_itself() -> None:
    plain, teacher = nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.Conv2d(3, 5, 3))
    x, compiled = torch.ones(2, 3, 9, 9), nn.Sequential(torch.compile(plain, **EAGER), nn.ReLU())
    found = []
    for student in (plain, compiled):
        at = AttentionTransfer(student, teacher, ["0"], beta=BETA)
        student(x)
        found.append(at(x))
        assert not copy.deepcopy(student)[0]._forward_hooks
        at.remove()
        assert not student[0]._forward_hooks
    torch.testing.assert_close(*found)


class Asking(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if type(self) is Asking else 1)


def test_a_layer_that_asks_for_its_type_stays_itself() -> None:
    asking, teacher = (Asking(nn.Conv2d(3, width, 3)) for width in (4, 5))
    x = torch.ones(2, 3, 9, 9)
    y = asking(x)
    for student, layers in ((asking, ["0"]), (nn.Sequential(asking), [("0", "0")])):
        fast = torch.compile(student, **EAGER)
        assert torch.equal(fast(x), y)
        at = AttentionTransfer(student, teacher, layers, beta=BETA)
        assert torch.equal(student(x), y)
        value = at(x)
        assert torch.equal(fast(x), y)
        if student is asking:  # whose compiled code has no hook, which nothing tells torch
            with pytest.raises(RuntimeError, match=r"call torch\._dynamo\.reset\(\)"):
                at(x)
            torch._dynamo.reset()
            assert torch.equal(fast(x), y)
        torch.testing.assert_close(at(x), value)
        at.remove()
