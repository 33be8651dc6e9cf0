"""Hostile arguments, exhausted memory, forks and subinterpreters must not crash the process."""

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
*INSTRUCTION_SETS, NATIVE = cpu.instruction_sets()

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
def test_random_hostile_arguments(tmp_path: Path, backend: str, seed: int, count: int) -> None:
    arguments = str(SUPPORT / "hostile.py"), str(seed), str(count), backend
    output = output_of(tmp_path, *arguments)
    assert f"{count} calls of {backend}, " in output
    assert ", 0 wrong" in output


@pytest.mark.parametrize(
    "isa", [NATIVE, *(pytest.param(isa, marks=exhaustive) for isa in INSTRUCTION_SETS)]
)
def test_kernels_stay_within_tensors(tmp_path: Path, isa: str) -> None:
    arguments = str(SUPPORT / "guarded.py"), "3000", "cpu"
    assert "no access out of bounds" in output_of(tmp_path, *arguments, AT_FUSED_CPU_ISA=isa)


HUGE = torch.ones(1).expand(1, 1, 2**40)  # expanded, so they use no memory
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
def test_tensors_larger_than_memory_raise(call: Any, message: str) -> None:
    with pytest.raises((RuntimeError, MemoryError), match=message):
        call()
    x = torch.randn(2, 3, 4, 4)
    assert at_fused.at_loss(x, x * x) > 0


# ---- memory --------------------------------------------------------------------------------------

MEMORY_HELPERS = f"""
import gc, resource, sys
sys.path.insert(0, {str(SUPPORT)!r})
import torch, at_fused
from threaded import all_calls

def memory_bytes(field):
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

EXHAUST_MEMORY = f"""{MEMORY_HELPERS}
size = 2**27
small = torch.randn(1, 1, 64, 64)
student = small.expand(1, size // 4 // 64**2, 64, 64).requires_grad_()  # its gradient has this size

def tap_loss():
    y, q = at_fused.attention_tap(student)
    at_fused.map_loss(q, at_fused.attention_map(small)).backward()

calls = [
    lambda: at_fused.at_loss(student, small).backward(),
    lambda: at_fused.at_loss(student, small, collapse="max").backward(),
    lambda: at_fused.at_value_and_grad(student, small),
    tap_loss,
]
for call in calls:
    call()
    student.grad = None
resource.setrlimit(resource.RLIMIT_AS, (memory_bytes(0) + size // 2, -1))
for attempt in range(6):
    for call in calls:
        raises(call, RuntimeError, MemoryError)
    if attempt == 1:
        before = memory_bytes(1)  # the first errors allocate memory that later ones reuse
assert memory_bytes(1) - before < 2**20, memory_bytes(1) - before
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
calls[0]()
assert student.grad.abs().sum() > 0
print("no leak")
"""

REPEAT_CALLS = f"""{MEMORY_HELPERS}
x = torch.randn(2, 4, 3, 3)
calls = [
    *all_calls((2, 3, 5, 4)),
    lambda: raises(lambda: at_fused.at_loss(x, x[:1]), ValueError),
    lambda: raises(lambda: at_fused.at_loss(x, x, p=0.5), ValueError),
]
rounds = int(sys.argv[1])
for call in calls * (rounds // 4):
    call()
before = memory_bytes(1)
for call in calls * rounds:
    call()
assert memory_bytes(1) - before < 2**20, memory_bytes(1) - before
print("no leak")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("program", "rounds"),
    [(EXHAUST_MEMORY, 0), (REPEAT_CALLS, 40), pytest.param(REPEAT_CALLS, 2000, marks=exhaustive)],
)
def test_no_memory_leaks(tmp_path: Path, program: str, rounds: int) -> None:
    assert "no leak" in output_of(tmp_path, "-c", program, str(rounds))


# ---- processes -----------------------------------------------------------------------------------

FORK_AFTER_THREADS = """
import os, torch, at_fused
torch.set_num_threads(2)
s, t = torch.randn(4, 64, 40, 40, requires_grad=True), torch.randn(4, 32, 40, 40)

def compute():
    loss = at_fused.at_loss(s, t)
    return loss.detach(), *torch.autograd.grad(loss, s)

expected = compute()  # on two threads
child = os.fork()
if child == 0:
    # fork does not copy torch's threads, so use one thread, as DataLoader's workers do.
    torch.set_num_threads(1)
    os._exit(0 if all(map(torch.equal, expected, compute())) else 1)
assert os.waitpid(child, 0)[1] == 0
assert all(map(torch.equal, expected, compute()))
print("parent and child agree")
"""


def test_calls_in_a_fork_after_threads_were_used(tmp_path: Path) -> None:
    assert "parent and child agree" in output_of(tmp_path, "-c", FORK_AFTER_THREADS)


SUBINTERPRETER = """
try:
    import _interpreters
except ImportError:
    import _xxsubinterpreters as _interpreters
subinterpreter = _interpreters.create()
try:
    error = _interpreters.run_string(subinterpreter, "import at_fused.compat")
except Exception as raised:
    error = raised
assert "ImportError" in str(error) and "cannot run in a subinterpreter" in str(error), error
_interpreters.destroy(subinterpreter)
import torch, at_fused
x = torch.randn(2, 3, 4, 4)
assert at_fused.at_loss(x, x * x) > 0
print("raised")
"""


def test_import_in_a_subinterpreter_raises(tmp_path: Path) -> None:
    """Without the error torch hangs or crashes."""
    if sys.version_info < (3, 13):
        pytest.importorskip("_xxsubinterpreters")
    assert "raised" in output_of(tmp_path, "-c", SUBINTERPRETER)
