"""The package as installed: what it imports, reports, and does where its library cannot load."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import at_fused
from at_fused import info
from at_fused.backends import OPERATORS, cpu, users

PACKAGE = Path(at_fused.__file__).parent


def run(code: str, python: str = sys.executable, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [python, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_compiled_library_is_there() -> None:
    assert cpu.available(), cpu.reason()
    assert at_fused.backends()["cpu"].in_use


def test_version_is_the_distributions() -> None:
    assert importlib.metadata.version("at_fused") == at_fused.__version__


def test_import_pulls_in_nothing_but_torch() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import at_fused
print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))
"""
    assert run(code).strip() == "['at_fused']"


@pytest.mark.parametrize(
    "first",
    [
        "from at_fused import *",
        "import at_fused",
        "import at_fused.transfer",
        "import at_fused.backends",
        "import torch, at_fused",
    ],
)
def test_torch_is_imported_once_it_is_needed(first: str) -> None:
    """Whatever comes first, all names are there, and ``backends`` is the function."""
    code = f"""
import sys
import at_fused.train.config
print("torch" in sys.modules)
{first}
import at_fused
print(at_fused.backends()["cpu"].in_use)
import torch
x = torch.randn(2, 3, 4, 4)
loss = lambda x: at_fused.at_loss(x, x * x)
if {first!r} == "import at_fused":  # as of a name that comes with its first use
    loss = torch.compile(loss, fullgraph=True, backend="eager")
print(loss(x).item() > 0, all(hasattr(at_fused, name) for name in at_fused.__all__))
try:
    at_fused.nothing
except AttributeError as error:
    print(error)
"""
    assert run(code).splitlines() == [
        "False",
        "True",
        "True True",
        "module 'at_fused' has no attribute 'nothing'",
    ]


def needed_by(library: Path) -> list[str]:
    readelf = shutil.which("readelf")
    assert readelf, "binutils comes with the compiler that built the package"
    dynamic = subprocess.run(
        [readelf, "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in dynamic.splitlines() if "NEEDED" in line]


def test_the_library_has_no_cuda_and_no_python_in_it() -> None:
    (library,) = PACKAGE.glob("_cpu*.so")
    needed = needed_by(library)
    assert any("libtorch" in line for line in needed)
    assert not any("cuda" in line or "python" in line for line in needed)


def test_the_cuda_library_needs_torchs_cuda_and_no_other() -> None:
    for library in PACKAGE.glob("_cuda*.so"):
        needed = needed_by(library)
        assert any("libtorch_cuda" in line for line in needed)
        assert not any("cudart" in line or "python" in line for line in needed)


def test_cuda_tensors_have_the_kernels_that_info_names() -> None:
    user = users()["cuda"]
    assert f"CUDA tensors run on {user}" in "\n".join(info.lines())
    if list(PACKAGE.glob("_cuda*.so")) and torch.version.cuda:
        assert user == "cuda", at_fused.backends()["cuda"].reason
    for operator in OPERATORS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"at_fused::{operator}", "CUDA")
        assert registered == (user != "eager")


def test_a_cuda_library_is_no_trouble_to_a_torch_without_cuda(tmp_path: Path) -> None:
    """And one that does not load is said, and not used."""
    copied = tmp_path / "at_fused"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "_cuda*.so"))
    (copied / "_cuda.abi3.so").write_bytes(b"not a library")
    code = """
import sys, torch
torch.version.cuda = {cuda!r}
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import at_fused
print([w.category.__name__ for w in caught])
print(at_fused.backends()["cuda"].reason)
x = torch.randn(2, 3, 4, 4)
print(at_fused.at_loss(x, x * x).item() > 0)
"""
    output = run(code.format(cuda=None), PYTHONPATH=str(tmp_path))
    assert "[]\n" in output
    assert "has no CUDA" in output
    output = run(code.format(cuda="13.0"), PYTHONPATH=str(tmp_path))
    assert "['AtFusedWarning']\n" in output
    assert "_cuda.abi3.so does not load" in output
    assert output.strip().endswith("True")


def test_info_reports() -> None:
    text = "\n".join(info.lines())
    assert at_fused.__version__ in text
    assert torch.__version__ in text
    assert f"CPU level  {cpu.isa()}" in text
    assert run("import runpy; runpy.run_module('at_fused.info', run_name='__main__')").split() == (
        text.split()
    )


@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_without_its_library_it_warns_once_and_runs_on_eager(tmp_path: Path, damage: str) -> None:
    copied = tmp_path / "at_fused"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "_cpu*.so"))
    if damage == "broken":
        (copied / "_cpu.abi3.so").write_bytes(b"not a library")
    code = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import at_fused, torch
    x = torch.ones(2, 3, 4, 4).cumsum(3).requires_grad_()
    loss = at_fused.at_loss(x, x.flip(3))
    loss.backward()
print([w.category.__name__ for w in caught], loss.item() > 0, x.grad.abs().sum().item() > 0)
import at_fused.info
print("\\n".join(at_fused.info.lines()))
try:
    at_fused.use_backend("cpu")
except RuntimeError as error:
    print("refused:", error)
"""
    output = run(code, PYTHONPATH=str(tmp_path))
    assert "['AtFusedWarning'] True True" in output
    assert str(copied) in output
    reason = "no compiled library" if damage == "missing" else "_cpu.abi3.so does not load"
    assert output.count(reason) >= 2  # in info and in the refusal
    assert "refused: use_backend: 'cpu' cannot be used" in output


def other_pythons() -> list[str]:
    """The interpreter of the tests, and any with another torch that AT_FUSED_TEST_PYTHONS names."""
    named = os.environ.get("AT_FUSED_TEST_PYTHONS", "")
    return [sys.executable, *filter(None, named.split(os.pathsep))]


@pytest.mark.parametrize("python", other_pythons())
def test_one_build_serves_several_torch_releases(python: str, tmp_path: Path) -> None:
    (tmp_path / "at_fused").symlink_to(PACKAGE)
    code = """
import warnings
warnings.simplefilter("error")
import torch, at_fused
assert at_fused.backends()["cpu"].in_use
torch.manual_seed(0)
x = torch.randn(8, 5, 9, 7, requires_grad=True)
y = torch.randn(8, 6, 9, 7)
results = []
for name in ("cpu", "eager"):
    with at_fused.use_backend(name):
        loss = at_fused.at_loss([x, x * 2], [y, y], reduction="none", form="paper", p=3)
        (g,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g.square().sum(), x)
        results.append((loss.detach(), g.detach(), h))
for a, b in zip(*results):
    assert (a - b).norm() <= 1e-5 * b.norm()
try:
    torch.ops.at_fused.attention_map([x.detach()], 0.5, "mean")
except RuntimeError as error:
    assert "p must be" in str(error)
else:
    raise AssertionError("p = 0.5 was taken")
print("same on torch", torch.__version__)
"""
    assert "same on torch" in run(code, python, PYTHONPATH=str(tmp_path))


def test_use_backend_is_a_setting_and_a_context_manager() -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    profile = torch.profiler.profile

    def ran_on_eager() -> bool:
        with profile() as record:
            at_fused.at_loss(x, y)
        return any(event.key == "aten::stack" for event in record.key_averages())

    assert not ran_on_eager()
    with at_fused.use_backend("eager"):
        assert ran_on_eager()
        assert not at_fused.backends()["cpu"].in_use
        with at_fused.use_backend("cpu"):
            assert not ran_on_eager()
        assert ran_on_eager()
    assert not ran_on_eager()
    at_fused.use_backend("eager")
    try:
        assert ran_on_eager()
    finally:
        at_fused.use_backend("auto")
    assert not ran_on_eager()
