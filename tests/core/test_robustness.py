"""What no caller should do, and what the system may do to one: nothing of it ends the process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from back_ends import EMULATED
from outside import SUPPORT, output_of

import at_fused
from at_fused.backends import cpu

exhaustive = pytest.mark.exhaustive
*LEVELS, LEVEL = cpu.isa_levels()

# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "seed", "count"),
    [
        ("cpu", 0, 500),
        pytest.param("cpu", 1, 5000, marks=exhaustive),
        pytest.param("eager", 2, 1000, marks=exhaustive),
        *(pytest.param(name, 3, 500, marks=exhaustive) for name in EMULATED),
    ],
)
def test_hostile_arguments(tmp_path: Path, backend: str, seed: int, count: int) -> None:
    arguments = str(SUPPORT / "hostile.py"), str(seed), str(count), backend
    output = output_of(tmp_path, *arguments)
    assert f"{count} calls of {backend}, " in output
    assert ", 0 wrong" in output


@pytest.mark.parametrize(
    "level", [LEVEL, *(pytest.param(level, marks=exhaustive) for level in LEVELS)]
)
def test_nothing_beyond_a_tensor_is_touched(tmp_path: Path, level: str) -> None:
    arguments = str(SUPPORT / "guarded.py"), "3000", "cpu"
    assert "nothing" in output_of(tmp_path, *arguments, AT_FUSED_CPU_ISA=level)


HUGE = torch.ones(1).expand(1, 1, 2**40)
MANY_CHANNELS = torch.ones(1).expand(1, 2**62, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: at_fused.attention_map(HUGE), "at most 2\\^31 - 1 positions|memory"),
        (lambda: at_fused.at_loss(HUGE, HUGE), "memory|failed"),
        (lambda: at_fused.features_loss(HUGE, HUGE), "memory|failed"),
        (lambda: at_fused.attention_map(MANY_CHANNELS), "at most 2\\^44"),
        (lambda: at_fused.at_loss(MANY_CHANNELS, MANY_CHANNELS), "at most 2\\^44"),
    ],
)
def test_tensors_larger_than_memory(call: Any, message: str) -> None:
    """Expanded ones, which cost nothing to make."""
    with pytest.raises((RuntimeError, MemoryError), match=message):
        call()
    x = torch.randn(2, 3, 4, 4)
    assert at_fused.at_loss(x, x * x) > 0


# ---- memory --------------------------------------------------------------------------------------

MEMORY = f"""
import gc, resource, sys
sys.path.insert(0, {str(SUPPORT)!r})
import torch, at_fused
from threaded import works

def pages(field):
    gc.collect()
    return int(open("/proc/self/statm").read().split()[field]) * resource.getpagesize()

def raises(call, *errors):
    try:
        call()
    except errors:
        return
    raise AssertionError("no error")

torch.set_num_threads(1)
"""

NO_MEMORY = f"""{MEMORY}
size = 2**27
small = torch.randn(1, 1, 64, 64)
student = small.expand(1, size // 4 // 64**2, 64, 64).requires_grad_()  # a gradient of that size

def tapped():
    y, q = at_fused.attention_tap(student)
    at_fused.map_loss(q, at_fused.attention_map(small)).backward()

calls = [
    lambda: at_fused.at_loss(student, small).backward(),
    lambda: at_fused.at_loss(student, small, collapse="max").backward(),
    lambda: at_fused.at_value_and_grad(student, small),
    tapped,
]
for call in calls:
    call()
    student.grad = None
resource.setrlimit(resource.RLIMIT_AS, (pages(0) + size // 2, -1))
for again in range(6):
    for call in calls:
        raises(call, RuntimeError, MemoryError)
    if again == 1:
        before = pages(1)  # with what errors need the first time
assert pages(1) - before < 2**20, pages(1) - before
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
calls[0]()
assert student.grad.abs().sum() > 0
print("nothing is lost")
"""

FLAT = f"""{MEMORY}
x = torch.randn(2, 4, 3, 3)
calls = [
    *works((2, 3, 5, 4)),
    lambda: raises(lambda: at_fused.at_loss(x, x[:1]), ValueError),
    lambda: raises(lambda: at_fused.at_loss(x, x, p=0.5), ValueError),
]
rounds = int(sys.argv[1])
for call in calls * (rounds // 4):
    call()
before = pages(1)
for call in calls * rounds:
    call()
assert pages(1) - before < 2**20, pages(1) - before
print("nothing is lost")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("program", "rounds"), [(NO_MEMORY, 0), (FLAT, 40), pytest.param(FLAT, 2000, marks=exhaustive)]
)
def test_no_memory_is_lost(tmp_path: Path, program: str, rounds: int) -> None:
    """By calls that find none, which is an exception, and by those that find some."""
    assert "nothing is lost" in output_of(tmp_path, "-c", program, str(rounds))


# ---- processes -----------------------------------------------------------------------------------

FORK = """
import os, torch, at_fused
torch.set_num_threads(2)
s, t = torch.randn(4, 64, 40, 40, requires_grad=True), torch.randn(4, 32, 40, 40)

def compute():
    loss = at_fused.at_loss(s, t)
    return loss.detach(), *torch.autograd.grad(loss, s)

expected = compute()  # by two threads
child = os.fork()
if child == 0:
    # torch's threads do not come along, nor does anything say so: as DataLoader's workers do.
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, expected, compute())) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(torch.equal, expected, compute()))
print("both")
"""


def test_a_fork_after_threads_were_used(tmp_path: Path) -> None:
    assert "both" in output_of(tmp_path, "-c", FORK)


SUBINTERPRETER = """
try:
    import _interpreters
except ImportError:
    import _xxsubinterpreters as _interpreters
other = _interpreters.create()
try:
    error = _interpreters.run_string(other, "import at_fused.compat")
except Exception as raised:
    error = raised
assert "ImportError" in str(error) and "does not run in a subinterpreter" in str(error), error
_interpreters.destroy(other)
import torch, at_fused
x = torch.randn(2, 3, 4, 4)
assert at_fused.at_loss(x, x * x) > 0
print("refused")
"""


def test_a_subinterpreter_is_refused(tmp_path: Path) -> None:
    """torch hangs or crashes there."""
    if sys.version_info < (3, 13):
        pytest.importorskip("_xxsubinterpreters")
    assert "refused" in output_of(tmp_path, "-c", SUBINTERPRETER)
