"""AttentionTransfer with students that torch.compile compiles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transfer_networks import BETA, GROUPS, gradients, task_loss, total_loss

from at_fused import AttentionTransfer

COMPILE: dict[str, Any] = {"backend": "aot_eager", "fullgraph": True}


class Net(nn.Module):
    """A minimal network with three groups that returns its features, as WRN does."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, second, third = (nn.Conv2d(c, width, 3, padding=1) for c in (3, width, width))
        layers = nn.Sequential(first, nn.ReLU()), second, nn.Sequential(third, nn.ReLU())
        self.groups = nn.ModuleList(layers).double()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        features = []
        for group in self.groups:
            x = group(x)
            features.append(x)
        return x.mean(dim=(2, 3)), features


def networks() -> tuple[Net, Net, Tensor]:
    return Net(4), Net(5), torch.randn(4, 3, 8, 8, dtype=torch.float64)


@pytest.fixture(autouse=True)
def _reset_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(at: Any, compiled: Any, student: Any, teacher: Any, x: Tensor, **options: Any) -> None:
    """Compare a step with an eager one of copies without hooks."""
    y = torch.arange(len(x)) % 4
    eager_student, eager_teacher, _ = networks()
    eager_student.load_state_dict(student.state_dict())
    eager_teacher.load_state_dict(teacher.state_dict())
    expected = total_loss(eager_student, eager_teacher, x, y, **options)
    loss = task_loss(compiled(x), y) + at(x)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(student, loss), gradients(eager_student, expected))


@pytest.mark.parametrize(
    ("backend", "p"),
    [("aot_eager", 2.5), pytest.param("inductor", 2.0, marks=pytest.mark.exhaustive)],
)
def test_dynamic_shapes(backend: str, p: float) -> None:
    student, teacher, x = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, p=p)
    compiled = torch.compile(student, dynamic=True, backend=backend, fullgraph=True)
    check(at, compiled, student, teacher, x, p=p)
    check(at, compiled, student, teacher, torch.cat([x, x + 1]), p=p)  # now dynamic
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(at, compiled, student, teacher, torch.cat([x, x, x]), p=p)
    at.remove()
    # A new exponent or order of the layers compiles again.
    at = AttentionTransfer(student, teacher, GROUPS[::-1], beta=BETA, p=3.0)
    check(at, compiled, student, teacher, x, p=3.0)


def train_step(model: Callable[[Tensor], Any], x: Tensor) -> None:
    task_loss(model(x), torch.arange(len(x))).backward()


def test_code_compiled_before_the_hooks_raises_until_reset() -> None:
    """By default, torch.compile does not guard on hooks."""
    student, teacher, x = networks()
    compiled = torch.compile(student, **COMPILE)
    train_step(compiled, x)
    at = AttentionTransfer(compiled, teacher, GROUPS, beta=BETA)
    train_step(compiled, x)
    with pytest.raises(RuntimeError, match=r"call torch\._dynamo\.reset\(\)"):
        at(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        average = copy.deepcopy(compiled)
        assert not any(m._forward_hooks for m in average.modules())
        for _ in range(2):
            train_step(average, x)
            check(at, compiled, student, teacher, x)
        at.remove()
        train_step(compiled, x)
        assert not at._student.last_pass.maps
        at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
        check(at, compiled, student, teacher, x)


@pytest.mark.parametrize("target", ["method", "layers", "function"])
def test_compiled_method_layers_or_function(target: str) -> None:
    student, teacher, x = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    compiled: Any = student
    if target == "function":
        compiled = torch.compile(lambda x: student(x), **COMPILE)
    for module in {"method": [student], "layers": student.groups, "function": []}[target]:
        module.compile(**COMPILE)
    for _ in range(2):
        check(at, compiled, student, teacher, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(at, compiled, student, teacher, x)


def test_new_student_reuses_compiled_code() -> None:
    for is_second in (False, True):
        student, teacher, x = networks()
        at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
        with torch._dynamo.config.patch(error_on_recompile=is_second):
            check(at, torch.compile(student, **COMPILE), student, teacher, x)
        at.remove()
