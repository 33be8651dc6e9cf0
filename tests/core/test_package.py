"""The installed package: imports, ``at_fused.info``, libraries that do not load, and the build."""

from __future__ import annotations

import importlib.metadata
import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import setuptools
import torch
from outside import output_of, run
from torch.utils import cpp_extension

import at_fused
from at_fused import info
from at_fused._warnings import warn
from at_fused.backends import OPERATORS, backend_by_device, cpu

PACKAGE = Path(at_fused.__file__).parent
ROOT = Path(__file__).parents[2]


def test_version_matches_the_distribution() -> None:
    assert importlib.metadata.version("at_fused") == at_fused.__version__


def test_deprecated_module_still_works_and_warns() -> None:
    sys.modules.pop("at_fused.modules", None)
    with pytest.warns(FutureWarning, match="from at_fused import ATLoss") as record:
        from at_fused.modules import ATLoss
    assert ATLoss is at_fused.ATLoss
    assert record[0].filename == __file__


def copy_package(folder: Path, *excluded: str) -> Path:
    """Copy the package into a folder without some of its files."""
    copy = folder / "at_fused"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", *excluded))
    return copy


def test_import_loads_only_torch(tmp_path: Path) -> None:
    code = """
import sys, torch
before = set(sys.modules)
import at_fused
print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))
import at_fused.train.data, at_fused.visualize
heavy = {'torchvision', 'PIL', 'sklearn', 'matplotlib', 'torchdistill'}
print(heavy & set(sys.modules))
"""
    assert output_of(tmp_path, "-c", code).splitlines() == ["['at_fused']", "set()"]


def slow_cases(first: Any, *rest: Any) -> list[Any]:
    """Return the cases of a slow test, all except the first marked exhaustive."""
    cases = [case if isinstance(case, tuple) else (case,) for case in rest]
    return [first, *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in cases)]


IMPORTS = ["from at_fused import *", "import at_fused.transfer", "import at_fused.backends"]


@pytest.mark.parametrize("first_import", slow_cases("", *IMPORTS, "import torch"))
def test_names_and_modules_are_loaded_on_first_use(tmp_path: Path, first_import: str) -> None:
    """Check also that ``backends`` is the function, not the module."""
    code = f"""
import sys
{first_import}
import at_fused
named = ["compat", "info", "integrations", "schedules", "teacher_cache", "train", "visualize"]
print(set(named) - set(dir(at_fused)), at_fused.train.__name__, "torch" in sys.modules)
for name in reversed(named):
    assert f"at_fused.{{name}}" in at_fused.__doc__
    assert getattr(at_fused, name).__name__ == f"at_fused.{{name}}"
print(at_fused.backends()["cpu"].in_use, "torchdistill" in sys.modules)
import torch
x = torch.randn(2, 3, 4, 4)
loss = lambda x: at_fused.at_loss(x, x * x)
if not {first_import!r}:  # the first use of at_loss is inside the compiled function
    loss = torch.compile(loss, fullgraph=True, backend="eager")
print(loss(x).item() > 0, all(hasattr(at_fused, name) for name in at_fused.__all__))
try:
    at_fused.nothing
except AttributeError as error:
    print(error)
"""
    assert output_of(tmp_path, "-c", code).splitlines() == [
        f"set() at_fused.train {bool(first_import)}",
        "True False",
        "True True",
        "module 'at_fused' has no attribute 'nothing'",
    ]


@pytest.mark.parametrize(
    ("name", "required", "forbidden"),
    [("cpu", "libtorch", ("cuda", "python")), ("cuda", "libtorch_cuda", ("cudart", "python"))],
)
def test_libraries_link_only_to_their_torch_libraries(
    name: str, required: str, forbidden: tuple[str, ...]
) -> None:
    libraries = list(PACKAGE.glob(f"_{name}*.so"))
    assert libraries or name == "cuda"
    for library in libraries:
        # readelf is part of binutils, which the compiler needs as well.
        command = ["readelf", "-d", str(library)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed = [line for line in output.splitlines() if "NEEDED" in line]
        assert any(required in line for line in needed)
        assert not any(name in line for name in forbidden for line in needed)


def test_cuda_kernels_match_the_report_of_info() -> None:
    user = backend_by_device()["cuda"]
    assert info.facts()["CUDA tensors run on"].startswith(user)
    if list(PACKAGE.glob("_cuda*.so")) and torch.version.cuda:
        assert user == "cuda", at_fused.backends()["cuda"].reason
    for operator in OPERATORS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"at_fused::{operator}", "CUDA")
        assert registered == (user != "eager")


def test_info_prints_text_and_json(tmp_path: Path) -> None:
    text = "\n".join(info.lines())
    assert at_fused.__version__ in text
    assert torch.__version__ in text
    assert info.facts()["CPU instruction set"] == cpu.isa()
    code = """
import runpy, sys
runpy.run_module("at_fused.info", run_name="__main__")
sys.argv.append("--json")
runpy.run_module("at_fused.info", run_name="__main__")
"""
    output = output_of(tmp_path, "-c", code)
    assert output.startswith(f"{text}\n")
    facts = json.loads(output.removeprefix(f"{text}\n"))
    assert facts == info.facts()
    assert all(str(value) in text for value in facts.values())
    assert facts["torch"] == torch.__version__
    assert facts.keys() > {f"back end {name}" for name in at_fused.backends()}
    assert facts["back end eager"] == "in use"


# Prints the warnings, info and errors of the at_fused that comes first on the path.
REPORT = """
import torch, warnings
torch.version.cuda = {cuda!r}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import at_fused
    x = torch.ones(2, 3, 4, 4).cumsum(3).requires_grad_()
    loss = at_fused.at_loss(x, x.flip(3))
    loss.backward()
print([w.category.__name__ for w in caught], loss.item() > 0, x.grad.abs().sum().item() > 0)
print(*[w.message for w in caught], *at_fused.info.lines(), sep="\\n")
try:
    at_fused.use_backend({name!r})
except RuntimeError as error:
    print("error:", error)
"""
WARNED, SILENT, BROKEN = "['AtFusedWarning']", "[]", b"not a library"


@pytest.mark.parametrize(
    ("name", "content", "cuda", "warnings", "reason"),
    slow_cases(
        ("cpu", None, None, WARNED, "no compiled library"),
        ("cpu", BROKEN, None, WARNED, "_cpu.abi3.so cannot be loaded"),
        ("cuda", BROKEN, None, SILENT, "has no CUDA"),
        ("cuda", BROKEN, "13.0", WARNED, "_cuda.abi3.so cannot be loaded"),
    ),
)
def test_library_that_does_not_load_is_reported_and_not_used(
    name: str, content: bytes | None, cuda: str | None, warnings: str, reason: str, tmp_path: Path
) -> None:
    copy = copy_package(tmp_path, f"_{name}*.so")
    if content:
        (copy / f"_{name}.abi3.so").write_bytes(content)
    output = output_of(tmp_path, "-c", REPORT.format(name=name, cuda=cuda))
    assert f"{warnings} True True" in output
    assert str(copy) in output
    assert output.count(reason) >= 2  # in info and in the error
    assert f"error: use_backend: '{name}' cannot be used" in output


# ---- copies without libraries --------------------------------------------------------------------


def write_dist_info(folder: Path, pure: str) -> None:
    """Write the metadata that pip writes when it installs a package."""
    dist_info = folder / "at_fused-9.dist-info"
    dist_info.mkdir(exist_ok=True)
    (dist_info / "METADATA").write_text("Metadata-Version: 2.1\nName: at_fused\nVersion: 9\n")
    (dist_info / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {pure}\n")


def test_pure_python_installation_does_not_warn(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    copy = copy_package(folder, "*.so")
    report = REPORT.format(name="cpu", cuda=None)
    for pure in (True, False):
        write_dist_info(folder, str(pure).lower())
        output = output_of(tmp_path, "-c", report, PYTHONPATH=str(folder))
        assert (f"not used (no compiled library in {copy}: " in output) != pure
        assert ("nothing compiled: installed with AT_FUSED_CPP=0\n" in output) == pure
        assert ("the installation is damaged; install it again" in output) != pure


def test_importing_the_sources_instead_of_the_installation_warns(tmp_path: Path) -> None:
    """python -m or -c in the checkout imports the sources even after ``pip install .``."""
    source, installed = tmp_path / "checkout", tmp_path / "installed"
    copy, _ = copy_package(source, "*.so"), copy_package(installed, "*.so")
    (source / "csrc").mkdir()
    write_dist_info(installed, "false")
    result = run(source, "-m", "at_fused.info", PYTHONPATH=str(installed))
    advice = f"this is the source folder; run in another folder, or pip install -e {source}"
    assert f"AtFusedWarning: the CPU kernels are not used (no compiled library in {copy}: " in (
        result.stderr
    )
    assert advice in result.stderr
    assert f"nothing compiled: {advice}\n" in result.stdout


# ---- the build -----------------------------------------------------------------------------------

UNSUPPORTED = 'host_config.h:143:2: error: #error -- unsupported GNU version! gcc "99" for $0'


def toolkit(home: Path, release: int = 13, compiles: str = ":") -> None:
    """Make a CUDA toolkit with a script as nvcc that answers all queries of setup.py."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    answers = f"echo '#$ TOP={home}'; echo release {release}.0 sm_80"
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) {compiles};; *) {answers};; esac\n')
    nvcc.chmod(0o755)


SetUp = Callable[..., tuple[list[str], str]]


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> SetUp:
    """Return a function that runs setup.py with torch for CUDA 13.0, without compiling."""
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda self: None)
    monkeypatch.setenv("CXX", sys.executable)

    def libraries_and_message(**environment: Any) -> tuple[list[str], str]:
        for name in ("CUDA_HOME", "CUDA_PATH", "AT_FUSED_CUDA", "AT_FUSED_CPP", "PATH"):
            monkeypatch.setenv(name, str(environment.get(name, "")))
        arguments: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **options: arguments.update(options))
        runpy.run_path(str(ROOT / "setup.py"))
        built = arguments.get("ext_modules", [])
        if built:
            build = arguments["cmdclass"]["build_ext"](setuptools.Distribution())
            build.build_lib = "/nowhere"
            build.run()
        _, _, message = capsys.readouterr().out.strip().partition("at_fused: the CUDA library is ")
        if built:  # build_info records the message in a C++ string, quoted for shell and ninja
            record = dict(built[-1].define_macros)["AT_FUSED_CUDA"]
            assert record == '"' + message.replace('"', "'").replace("$", "'") + '"'
        return [extension.name.removeprefix("at_fused._") for extension in built], message

    return libraries_and_message


# Toolkits, and the reason not to build the CUDA library with each.
TOOLKITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "valid": (toolkit, ""),
    "absent": (lambda home: None, "no nvcc in {}/bin (CUDA_HOME)"),
    "old": (lambda home: toolkit(home, release=12), "nvcc is from CUDA 12, torch from CUDA 13.0"),
    "without a host compiler": (
        lambda home: toolkit(home, compiles=f"echo first; echo '{UNSUPPORTED}' >&2; exit 1"),
        f"{{}}/bin/nvcc fails: {UNSUPPORTED}",
    ),
}


@pytest.mark.parametrize("case", TOOLKITS)
def test_cuda_library_is_built_if_nvcc_works(set_up: SetUp, tmp_path: Path, case: str) -> None:
    make, reason = TOOLKITS[case]
    home, reason = tmp_path, reason.format(tmp_path)
    make(home)
    result = set_up(CUDA_HOME=home)
    if not reason:
        message = f"built with {home} against torch's CUDA 13.0"
        assert result == set_up(PATH=home / "bin") == (["cpu", "cuda", "build_info"], message)
        return
    assert result == (["cpu", "build_info"], f"not built: {reason}")
    with pytest.raises(SystemExit, match="the CUDA library cannot be built: ") as error:
        set_up(CUDA_HOME=home, AT_FUSED_CUDA=1)
    assert str(error.value).endswith(reason)


def test_environment_variables_of_the_build(set_up: SetUp) -> None:
    assert set_up() == (["cpu", "build_info"], "not built: no nvcc on PATH")
    assert set_up(AT_FUSED_CPP=0) == ([], "")
    assert set_up(AT_FUSED_CUDA=0) == (["cpu", "build_info"], "not built: AT_FUSED_CUDA=0")
    for variables, message in (
        ({"AT_FUSED_CPP": "no"}, "AT_FUSED_CPP must be 1 or 0, got 'no'"),
        ({"AT_FUSED_CUDA": "yes"}, "AT_FUSED_CUDA must be auto or 0 or 1, got 'yes'"),
        ({"AT_FUSED_CPP": 0, "AT_FUSED_CUDA": 1}, "AT_FUSED_CUDA=1, but nothing is compiled: "),
    ):
        with pytest.raises(SystemExit, match=message):
            set_up(**variables)


# ---- warnings and back ends ----------------------------------------------------------------------


def test_warnings_point_at_the_callers_line() -> None:
    namespace = {"__name__": "at_fused.anything", "warn": warn}
    exec("def hook(*_): warn('from a hook')", namespace)
    module = torch.nn.Identity()
    module.register_forward_hook(namespace["hook"])
    with pytest.warns(at_fused.AtFusedWarning, match="from a hook") as record:
        module(torch.ones(1))
    assert record[0].filename == __file__


def test_use_backend_sets_and_restores_the_back_end() -> None:
    def ran_on_eager() -> bool:
        with torch.profiler.profile() as profile:
            at_fused.at_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
        is_eager = any(event.key == "aten::stack" for event in profile.key_averages())
        assert at_fused.backends()["cpu"].in_use != is_eager
        return is_eager

    with at_fused.use_backend("eager"):
        assert ran_on_eager()
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
