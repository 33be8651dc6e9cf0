"""What no caller should do, and what the system may do to one: nothing of it ends the process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SIMT
from outside import output_of, run

import at_fused
from at_fused.backends import cpu

HERE = Path(__file__).parent


# ---- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "seed", "count"),
    [
        ("cpu", 0, 1000),
        pytest.param("cpu", 1, 5000, marks=pytest.mark.long),
        pytest.param("eager", 2, 1000, marks=pytest.mark.long),
        *(pytest.param(name, 3, 500, marks=pytest.mark.long) for name in SIMT),
    ],
)
def test_hostile_arguments(tmp_path: Path, backend: str, seed: int, count: int) -> None:
    arguments = str(HERE / "hostile.py"), str(seed), str(count), backend
    output = output_of(tmp_path, *arguments)
    assert f"{count} calls of {backend}, " in output
    assert ", 0 wrong" in output


@pytest.mark.parametrize("level", cpu.isa_levels())
def test_nothing_beyond_a_tensor_is_touched(tmp_path: Path, level: str) -> None:
    assert " calls" in output_of(tmp_path, str(HERE / "guarded.py"), AT_FUSED_CPU_ISA=level)


def test_what_is_beyond_would_be_found(tmp_path: Path) -> None:
    done = run(tmp_path, str(HERE / "guarded.py"), "beyond")
    assert done.returncode < 0
    assert "Segmentation fault" in done.stderr or "Bus error" in done.stderr


HUGE = torch.ones(1).expand(1, 1, 2**40)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: at_fused.attention_map(HUGE), "at most 2\\^31 - 1 positions|memory"),
        (lambda: at_fused.at_loss(HUGE, HUGE), "memory|failed"),
        (lambda: at_fused.at_value_and_grad(HUGE, HUGE), "memory|failed"),
        (lambda: at_fused.features_loss(HUGE, HUGE), "memory|failed"),
        (lambda: at_fused.kd_loss(HUGE[0], HUGE[0]), "memory|failed"),
        (lambda: at_fused.attention_map(HUGE[..., :1].expand(1, 2**62, 1)), "at most 2\\^44"),
        (lambda: at_fused.at_loss(*[HUGE[..., :1].expand(1, 2**62, 1)] * 2), "at most 2\\^44"),
    ],
)
def test_tensors_larger_than_memory(call: Any, message: str) -> None:
    """Expanded ones, which cost nothing to make."""
    with pytest.raises((RuntimeError, MemoryError), match=message):
        call()
    x = torch.randn(2, 3, 4, 4)
    assert at_fused.at_loss(x, x * x) > 0


# ---- memory --------------------------------------------------------------------------------------

MEMORY = """
import gc, resource, sys
import torch, at_fused

def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

torch.set_num_threads(1)
"""

NO_MEMORY = f"""{MEMORY}
size = 2**28
small = torch.randn(1, 1, 64, 64)
student = small.expand(1, size // 4 // 64**2, 64, 64).requires_grad_()  # a gradient of 2^28
expected = at_fused.at_loss(small, small * small)

def backward():
    at_fused.at_loss(student, small).backward()

def tapped():
    y, q = at_fused.attention_tap(student)
    at_fused.map_loss(q, at_fused.attention_map(small)).backward()

def of_channels():
    at_fused.at_loss(student, student.detach(), attend="channel").backward()

def value_and_grad():
    at_fused.at_value_and_grad(student, small)

def maximum():
    at_fused.at_loss(student, small, collapse="max").backward()

for call in (backward, tapped, of_channels, value_and_grad, maximum):
    call()
    student.grad = None
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + size // 2, -1))
for again in range(6):
    for call in (backward, tapped, of_channels, value_and_grad, maximum):
        try:
            call()
        except (RuntimeError, MemoryError):
            continue
        raise AssertionError(f"{{call.__name__}} found memory")
    if again == 1:
        before = resident()  # with what errors need the first time
assert resident() - before < 2**20, resident() - before
assert torch.equal(at_fused.at_loss(small, small * small), expected)
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
backward()
assert student.grad.abs().sum() > 0
print("nothing is lost")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_runs_out_is_an_exception_and_no_leak(tmp_path: Path) -> None:
    assert "nothing is lost" in output_of(tmp_path, "-c", NO_MEMORY)


FLAT = f"""{MEMORY}
s, t = torch.randn(2, 4, 3, 3, requires_grad=True), torch.randn(2, 5, 3, 3)
c = torch.randn(2, 4, 3, 3).to(memory_format=torch.channels_last).requires_grad_()

def differentiate(loss, *leaves):
    return torch.autograd.grad(loss, leaves)

def fail(*arguments, **options):
    try:
        at_fused.at_loss(*arguments, **options)
    except (ValueError, TypeError):
        return
    raise AssertionError

def tap():
    y, q = at_fused.attention_tap(s)
    return differentiate(at_fused.map_loss(q, at_fused.attention_map(t)) + (y * y).sum(), s)

calls = [
    lambda: differentiate(at_fused.at_loss(s, t), s),
    lambda: differentiate(at_fused.at_loss([s, c, s], [t, t, c]), s, c),
    lambda: at_fused.at_value_and_grad([s, c], [t, t], form="paper"),
    lambda: differentiate(at_fused.at_loss(s, t[..., 1:], resize="features", collapse="max"), s),
    tap,
    lambda: fail(s, t[:1]),
    lambda: fail(s, t, p=0.5),
]
rounds = int(sys.argv[1]) // len(calls)
for call in calls * (rounds // 4):
    call()
before = resident()
for call in calls * rounds:
    call()
grown = resident() - before
assert grown < 2**20, grown
print("flat")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("calls", [2000, pytest.param(10**5, marks=pytest.mark.long)])
def test_memory_stays_as_it_is(tmp_path: Path, calls: int) -> None:
    assert "flat" in output_of(tmp_path, "-c", FLAT, str(calls))


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


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_fork_after_threads_were_used(tmp_path: Path) -> None:
    assert "both" in output_of(tmp_path, "-c", FORK)


SUBINTERPRETER = """
import sys
if "first" in sys.argv:
    import torch, at_fused
    at_fused.at_loss
try:
    import _interpreters
except ImportError:
    import _xxsubinterpreters as _interpreters
other = _interpreters.create()
refusal = "import at_fused.compat"
try:
    error = _interpreters.run_string(other, refusal)
except Exception as raised:
    error = raised
assert "ImportError" in str(error) and "does not run in a subinterpreter" in str(error), error
_interpreters.destroy(other)
import torch, at_fused
x = torch.randn(2, 3, 4, 4)
assert at_fused.at_loss(x, x * x) > 0
print("refused")
"""


@pytest.mark.parametrize("order", ["first", "later"])
def test_a_subinterpreter_is_refused(tmp_path: Path, order: str) -> None:
    """torch hangs or crashes there."""
    if sys.version_info < (3, 13):
        pytest.importorskip("_xxsubinterpreters")
    assert "refused" in output_of(tmp_path, "-c", SUBINTERPRETER, order)
