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


class Net(nn.Module):
    """The least network with three groups, which gives its features away as WRN does."""

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
    ("backend", "p"),
    [("aot_eager", 2.5), pytest.param("inductor", 2.0, marks=pytest.mark.exhaustive)],
)
def test_dynamic_shapes(backend: str, p: float) -> None:
    student, teacher, x = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA, p=p)
    fast = torch.compile(student, dynamic=True, backend=backend, fullgraph=True)
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


def test_code_compiled_without_hooks() -> None:
    """torch.compile does not look for hooks, unless it is told to."""
    student, teacher, x = networks()
    fast = torch.compile(student, **EAGER)
    run(fast, x)
    at = AttentionTransfer(fast, teacher, GROUPS, beta=BETA)
    run(fast, x)
    with pytest.raises(RuntimeError, match=r"call torch\._dynamo\.reset\(\)"):
        at(x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        average = copy.deepcopy(fast)
        assert not any(m._forward_hooks for m in average.modules())
        for _ in range(2):
            run(average, x)
            check(at, fast, student, teacher, x)
        at.remove()
        run(fast, x)
        assert not at._student.last_pass.maps
        at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
        check(at, fast, student, teacher, x)


@pytest.mark.parametrize("how", ["method", "layers", "function"])
def test_ways_to_compile(how: str) -> None:
    student, teacher, x = networks()
    at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
    fast: Any = student
    if how == "function":
        fast = torch.compile(lambda x: student(x), **EAGER)
    for module in {"method": [student], "layers": student.groups, "function": []}[how]:
        module.compile(**EAGER)
    for _ in range(2):
        check(at, fast, student, teacher, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        check(at, fast, student, teacher, x)


def test_code_of_one_student_serves_the_next() -> None:
    for again in (False, True):
        student, teacher, x = networks()
        at = AttentionTransfer(student, teacher, GROUPS, beta=BETA)
        with torch._dynamo.config.patch(error_on_recompile=again):
            check(at, torch.compile(student, **EAGER), student, teacher, x)
        at.remove()
