"""The package as installed: what it imports, reports, and does where its library cannot load."""

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


def test_version_is_the_distributions() -> None:
    assert importlib.metadata.version("at_fused") == at_fused.__version__


def test_deprecated_module_still_works_and_warns() -> None:
    sys.modules.pop("at_fused.modules", None)
    with pytest.warns(FutureWarning, match="from at_fused import ATLoss") as record:
        from at_fused.modules import ATLoss
    assert ATLoss is at_fused.ATLoss
    assert record[0].filename == __file__


def copied(folder: Path, *left_out: str) -> Path:
    """The package in a folder, but for some of its files."""
    copy = folder / "at_fused"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__", *left_out))
    return copy


def test_import_pulls_in_nothing_but_torch(tmp_path: Path) -> None:
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


def some(first: Any, *rest: Any) -> list[Any]:
    """Cases of a slow test, the first of which the default run keeps."""
    several = [each if isinstance(each, tuple) else (each,) for each in rest]
    return [first, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in several)]


FIRST = ["from at_fused import *", "import at_fused.transfer", "import at_fused.backends"]


@pytest.mark.parametrize("first", some("", *FIRST, "import torch"))
def test_names_and_modules_come_once_they_are_needed(tmp_path: Path, first: str) -> None:
    """Whatever comes first, all names are there, and ``backends`` is the function."""
    code = f"""
import sys
{first}
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
if not {first!r}:  # of a name that comes with its first use
    loss = torch.compile(loss, fullgraph=True, backend="eager")
print(loss(x).item() > 0, all(hasattr(at_fused, name) for name in at_fused.__all__))
try:
    at_fused.nothing
except AttributeError as error:
    print(error)
"""
    assert output_of(tmp_path, "-c", code).splitlines() == [
        f"set() at_fused.train {bool(first)}",
        "True False",
        "True True",
        "module 'at_fused' has no attribute 'nothing'",
    ]


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [("cpu", "libtorch", ("cuda", "python")), ("cuda", "libtorch_cuda", ("cudart", "python"))],
)
def test_a_library_needs_its_torch_and_no_other(
    name: str, right: str, wrong: tuple[str, ...]
) -> None:
    libraries = list(PACKAGE.glob(f"_{name}*.so"))
    assert libraries or name == "cuda"
    for library in libraries:
        # binutils come with the compiler that built the package.
        command = ["readelf", "-d", str(library)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        needed = [line for line in said.splitlines() if "NEEDED" in line]
        assert any(right in line for line in needed)
        assert not any(each in line for each in wrong for line in needed)


def test_cuda_tensors_have_the_kernels_that_info_names() -> None:
    user = backend_by_device()["cuda"]
    assert info.facts()["CUDA tensors run on"].startswith(user)
    if list(PACKAGE.glob("_cuda*.so")) and torch.version.cuda:
        assert user == "cuda", at_fused.backends()["cuda"].reason
    for operator in OPERATORS:
        registered = torch._C._dispatch_has_kernel_for_dispatch_key(f"at_fused::{operator}", "CUDA")
        assert registered == (user != "eager")


def test_info_reports(tmp_path: Path) -> None:
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
    found = json.loads(output.removeprefix(f"{text}\n"))
    assert found == info.facts()
    assert all(str(value) in text for value in found.values())
    assert found["torch"] == torch.__version__
    assert found.keys() > {f"back end {name}" for name in at_fused.backends()}
    assert found["back end eager"] == "in use"


# What users see of the package that they import, as the first on the path.
SEEN = """
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
    print("refused:", error)
"""
WARNED, SILENT, BROKEN = "['AtFusedWarning']", "[]", b"not a library"


@pytest.mark.parametrize(
    ("name", "content", "cuda", "warned", "reason"),
    some(
        ("cpu", None, None, WARNED, "no compiled library"),
        ("cpu", BROKEN, None, WARNED, "_cpu.abi3.so cannot be loaded"),
        ("cuda", BROKEN, None, SILENT, "has no CUDA"),
        ("cuda", BROKEN, "13.0", WARNED, "_cuda.abi3.so cannot be loaded"),
    ),
)
def test_a_library_that_does_not_load_is_said_once_and_not_used(
    name: str, content: bytes | None, cuda: str | None, warned: str, reason: str, tmp_path: Path
) -> None:
    copy = copied(tmp_path, f"_{name}*.so")
    if content:
        (copy / f"_{name}.abi3.so").write_bytes(content)
    output = output_of(tmp_path, "-c", SEEN.format(name=name, cuda=cuda))
    assert f"{warned} True True" in output
    assert str(copy) in output
    assert output.count(reason) >= 2  # in info and in the refusal
    assert f"refused: use_backend: '{name}' cannot be used" in output


# ---- which copy ----------------------------------------------------------------------------------


def record(folder: Path, pure: str) -> None:
    """What pip writes beside a package."""
    written = folder / "at_fused-9.dist-info"
    written.mkdir(exist_ok=True)
    (written / "METADATA").write_text("Metadata-Version: 2.1\nName: at_fused\nVersion: 9\n")
    (written / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {pure}\n")


def test_who_asked_for_no_compiled_code_is_not_warned(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    copy = copied(folder, "*.so")
    for asked in (True, False):
        record(folder, str(asked).lower())
        seen = output_of(tmp_path, "-c", SEEN.format(name="cpu", cuda=None), PYTHONPATH=str(folder))
        assert (f"not used (no compiled library in {copy}: " in seen) != asked
        assert ("nothing compiled: installed with AT_FUSED_CPP=0\n" in seen) == asked
        assert ("the installation is damaged; install it again" in seen) != asked


def test_a_source_folder_in_place_of_the_package_says_so(tmp_path: Path) -> None:
    """As after pip install . of all that is said in the checkout with python -m or -c."""
    source, place = tmp_path / "checkout", tmp_path / "place"
    copy, _ = copied(source, "*.so"), copied(place, "*.so")
    (source / "csrc").mkdir()
    record(place, "false")
    seen = run(source, "-m", "at_fused.info", PYTHONPATH=str(place))
    advice = f"this is the source folder; run in another folder, or pip install -e {source}"
    assert f"AtFusedWarning: the CPU kernels are not used (no compiled library in {copy}: " in (
        seen.stderr
    )
    assert advice in seen.stderr
    assert f"nothing compiled: {advice}\n" in seen.stdout


# ---- the build -----------------------------------------------------------------------------------

UNSUPPORTED = 'host_config.h:143:2: error: #error -- unsupported GNU version! gcc "99" for $0'


def toolkit(home: Path, release: int = 13, compiles: str = ":") -> None:
    """Make a CUDA toolkit whose nvcc is a script, which answers all that setup.py asks at once."""
    (home / "bin").mkdir(parents=True)
    nvcc = home / "bin/nvcc"
    answers = f"echo '#$ TOP={home}'; echo release {release}.0 sm_80"
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *" -c "*) {compiles};; *) {answers};; esac\n')
    nvcc.chmod(0o755)


SetUp = Callable[..., tuple[list[str], str]]


@pytest.fixture
def set_up(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> SetUp:
    """What setup.py comes to, without a build, in a torch that is given a CUDA."""
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_include=lambda: ""))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda self: None)
    monkeypatch.setenv("CXX", sys.executable)

    def libraries_and_what_is_said(**environment: Any) -> tuple[list[str], str]:
        for name in ("CUDA_HOME", "CUDA_PATH", "AT_FUSED_CUDA", "AT_FUSED_CPP", "PATH"):
            monkeypatch.setenv(name, str(environment.get(name, "")))
        arguments: dict[str, Any] = {}
        monkeypatch.setattr(setuptools, "setup", lambda **given: arguments.update(given))
        runpy.run_path(str(ROOT / "setup.py"))
        built = arguments.get("ext_modules", [])
        if built:
            build = arguments["cmdclass"]["build_ext"](setuptools.Distribution())
            build.build_lib = "/nowhere"
            build.run()
        _, _, said = capsys.readouterr().out.strip().partition("at_fused: the CUDA library is ")
        if built:  # and recorded, in a C++ string that goes through a shell and ninja
            record = dict(built[-1].define_macros)["AT_FUSED_CUDA"]
            assert record == '"' + said.replace('"', "'").replace("$", "'") + '"'
        return [extension.name.removeprefix("at_fused._") for extension in built], said

    return libraries_and_what_is_said


# Toolkits, and why the CUDA library is not built with one.
TOOLKITS: dict[str, tuple[Callable[[Path], None], str]] = {
    "right": (toolkit, ""),
    "absent": (lambda home: None, "no nvcc in {}/bin (CUDA_HOME)"),
    "old": (lambda home: toolkit(home, release=12), "nvcc is of CUDA 12, torch of CUDA 13.0"),
    "without a host compiler": (
        lambda home: toolkit(home, compiles=f"echo first; echo '{UNSUPPORTED}' >&2; exit 1"),
        f"{{}}/bin/nvcc fails: {UNSUPPORTED}",
    ),
}


@pytest.mark.parametrize("case", TOOLKITS)
def test_the_cuda_library_is_built_where_nvcc_works(
    set_up: SetUp, tmp_path: Path, case: str
) -> None:
    make, reason = TOOLKITS[case]
    home, reason = tmp_path, reason.format(tmp_path)
    make(home)
    found = set_up(CUDA_HOME=home)
    if not reason:
        said = f"built with {home} against torch's CUDA 13.0"
        assert found == set_up(PATH=home / "bin") == (["cpu", "cuda", "build_info"], said)
        return
    assert found == (["cpu", "build_info"], f"not built: {reason}")
    with pytest.raises(SystemExit, match="the CUDA library cannot be built: ") as stop:
        set_up(CUDA_HOME=home, AT_FUSED_CUDA=1)
    assert str(stop.value).endswith(reason)


def test_switches_of_the_build(set_up: SetUp) -> None:
    assert set_up() == (["cpu", "build_info"], "not built: no nvcc on PATH")
    assert set_up(AT_FUSED_CPP=0) == ([], "")
    assert set_up(AT_FUSED_CUDA=0) == (["cpu", "build_info"], "not built: AT_FUSED_CUDA=0")
    for switches, message in (
        ({"AT_FUSED_CPP": "no"}, "AT_FUSED_CPP must be 1 or 0, got 'no'"),
        ({"AT_FUSED_CUDA": "yes"}, "AT_FUSED_CUDA must be auto or 0 or 1, got 'yes'"),
        ({"AT_FUSED_CPP": 0, "AT_FUSED_CUDA": 1}, "AT_FUSED_CUDA=1, but nothing is compiled: "),
    ):
        with pytest.raises(SystemExit, match=message):
            set_up(**switches)


# ---- warnings and back ends ----------------------------------------------------------------------


def test_a_warning_is_of_the_users_line() -> None:
    inside = {"__name__": "at_fused.anything", "warn": warn}
    exec("def hook(*_): warn('of a line')", inside)
    module = torch.nn.Identity()
    module.register_forward_hook(inside["hook"])
    with pytest.warns(at_fused.AtFusedWarning, match="of a line") as caught:
        module(torch.ones(1))
    assert caught[0].filename == __file__


def test_use_backend_is_a_setting_and_a_context_manager() -> None:
    def ran_on_eager() -> bool:
        with torch.profiler.profile() as record:
            at_fused.at_loss(torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4))
        found = any(event.key == "aten::stack" for event in record.key_averages())
        assert at_fused.backends()["cpu"].in_use != found
        return found

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
