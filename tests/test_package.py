"""The package as installed: what it imports, reports, and does where its library cannot load."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import at_fused
from at_fused import info
from at_fused.backends import OPERATORS, compiled, cpu, users

PACKAGE = Path(at_fused.__file__).parent
ROOT = Path(__file__).parents[1]


def run(
    code: str,
    *arguments: str,
    python: str = sys.executable,
    cwd: str | Path = "/",
    **environment: str,
) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [python, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_version_is_the_distributions() -> None:
    assert importlib.metadata.version("at_fused") == at_fused.__version__


def test_import_pulls_in_nothing_but_torch() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import at_fused
print(sorted({name.split('.')[0] for name in set(sys.modules) - before}))
import at_fused.train.data, at_fused.visualize
heavy = {'torchvision', 'PIL', 'sklearn', 'matplotlib', 'torchdistill'}
print(heavy & set(sys.modules), at_fused.integrations.torchdistill.FusedATLoss.__name__)
"""
    assert run(code).splitlines()[:2] == ["['at_fused']", "set() FusedATLoss"]


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


@pytest.mark.parametrize("first", ["", "import torch", "from at_fused import at_loss"])
def test_modules_come_with_the_package(first: str) -> None:
    """Those that the docstring names, whether torch is there or not, which none waits for."""
    code = f"""
import sys
{first}
import at_fused
named = ["compat", "info", "integrations", "schedules", "teacher_cache", "train", "visualize"]
print(set(named) - set(dir(at_fused)), at_fused.train.__name__, "torch" in sys.modules)
for name in reversed(named):
    assert f"at_fused.{{name}}" in at_fused.__doc__
    assert getattr(at_fused, name).__name__ == f"at_fused.{{name}}"
print("torchdistill" in dir(at_fused.integrations), "torchdistill" in sys.modules)
print(at_fused.backends()["cpu"].in_use, hasattr(at_fused.integrations, "others"))
"""
    seen = run(code).splitlines()
    assert seen == [f"set() at_fused.train {bool(first)}", "True False", "True False"]


def needed_by(library: Path) -> list[str]:
    readelf = shutil.which("readelf")
    assert readelf, "binutils comes with the compiler that built the package"
    dynamic = subprocess.run(
        [readelf, "-d", str(library)], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in dynamic.splitlines() if "NEEDED" in line]


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
        needed = needed_by(library)
        assert any(right in line for line in needed)
        assert not any(each in line for each in wrong for line in needed)


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


# ---- which copy ----------------------------------------------------------------------------------


def without_libraries(folder: Path) -> Path:
    """A folder with the package as pip installs it without compiled code, or a source has it."""
    copied = folder / "at_fused"
    shutil.copytree(PACKAGE, copied, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return copied


def record(folder: Path, wheel: str, origin: str = "{}") -> None:
    """What pip writes beside a package."""
    written = folder / "at_fused-9.dist-info"
    written.mkdir(exist_ok=True)
    (written / "METADATA").write_text("Metadata-Version: 2.1\nName: at_fused\nVersion: 9\n")
    (written / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {wheel}\n")
    (written / "direct_url.json").write_text(origin)


# What users see of the package that they import, as the first on the path.
SEEN = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import at_fused
    at_fused.backends()
print(*[w.message for w in caught], sep="\\n")
print("\\n".join(at_fused.info.lines()))
"""


@pytest.mark.parametrize("editable", [False, True])
def test_who_asked_for_no_compiled_code_is_not_warned(tmp_path: Path, editable: bool) -> None:
    folder = tmp_path / "a folder"
    copied = without_libraries(folder)
    beside = tmp_path / "record" if editable else folder
    beside.mkdir(exist_ok=True)
    origin = {"dir_info": {"editable": True}, "url": folder.as_uri()}
    path = f"{folder}{os.pathsep}{beside}"
    for asked in (True, False):
        record(beside, str(asked).lower(), json.dumps(origin if editable else {}))
        seen = run(SEEN, PYTHONPATH=path)
        assert (f"not used (no compiled library in {copied}: " in seen) != asked
        assert ("built      nothing compiled: installed with AT_FUSED_CPP=0\n" in seen) == asked


def test_a_source_folder_in_place_of_the_package_says_so(tmp_path: Path) -> None:
    """As after pip install . of all that is said in the checkout with python -m or -c."""
    source, place = tmp_path / "checkout", tmp_path / "place"
    copied, installed = without_libraries(source), without_libraries(place)
    (source / "csrc").mkdir()
    record(place, "true")
    seen = subprocess.run(
        [sys.executable, "-m", "at_fused.info"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(place)},
        cwd=source,
    )
    advice = (
        f"imported in place of the package in {installed}; run in another folder, or "
        f"pip install -e {source}"
    )
    assert f"AtFusedWarning: the CPU kernels are not used (no compiled library in {copied}: " in (
        seen.stderr
    )
    assert advice in seen.stderr
    assert f"built      nothing compiled: {advice}\n" in seen.stdout


def test_sources_that_nothing_was_installed_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_FOLDER", tmp_path / "at_fused")
    monkeypatch.setattr(compiled, "distributions", lambda name: [])
    reason = "it is damaged; install it again"
    assert compiled.nothing_compiled() == (reason, False)
    (tmp_path / "csrc").mkdir()
    reason = f"these are the sources; pip install -e {tmp_path}"
    assert compiled.nothing_compiled() == (reason, False)


# ---- the build -----------------------------------------------------------------------------------

# What setup.py comes to in several environments, without a build, in a torch that is given a CUDA.
SETUP = """
import json, os, runpy, sys, types
import setuptools, torch
from torch.utils import cpp_extension

sys.modules["pybind11"] = types.SimpleNamespace(get_include=lambda: "")
torch.version.cuda = "13.0"
cpp_extension.BuildExtension.run = lambda self: None
setuptools.setup = lambda **given: arguments.update(given)
before = dict(os.environ)
for environment in json.loads(sys.argv[1]):
    os.environ.clear()
    os.environ.update(before | environment)
    arguments = {}
    print("environment:")
    try:
        runpy.run_path("setup.py")
    except SystemExit as stop:
        print("stopped:", stop)
        continue
    extensions = arguments.get("ext_modules", [])
    print("extensions:", *[extension.name for extension in extensions])
    if extensions:
        build = arguments["cmdclass"]["build_ext"](setuptools.Distribution())
        build.build_lib = "/nowhere"
        build.run()
        print("record:", dict(extensions[-1].define_macros)["AT_FUSED_CUDA"])
"""
WITHOUT_CUDA = "extensions: at_fused._cpu at_fused._build_info"
WITH_CUDA = "extensions: at_fused._cpu at_fused._cuda at_fused._build_info"
NVCC = """#!{python}
import sys
words = " ".join(sys.argv[1:])
if "--dryrun" in words:
    print("#$ TOP={top}")
elif "--version" in words:
    print("release {release}.0, V{release}.0.1")
elif "--list-gpu-code" in words:
    print({devices!r})
else:
    open("{top}/probed", "w").write(words)
    sys.exit({failure!r} or None)
"""
UNSUPPORTED = 'host_config.h:143:2: error: #error -- unsupported GNU version! gcc "99" for $0'


def toolkit(
    folder: Path, failure: str = "", release: int = 13, devices: str = "sm_80 sm_90"
) -> Path:
    """A CUDA toolkit whose nvcc is a script, and may be unable to compile."""
    nvcc = folder / "bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    facts = {"python": sys.executable, "top": folder, "release": release}
    nvcc.write_text(NVCC.format(**facts, devices=devices, failure=failure))
    nvcc.chmod(0o755)
    return folder


def set_up(*environments: dict[str, Any]) -> list[list[str]]:
    """What setup.py says where there are no compilers but those of each environment."""
    names = ("PATH", "CUDA_HOME", "CUDA_PATH", "AT_FUSED_CUDA", "AT_FUSED_CPP")
    clean = dict.fromkeys((*names, "TORCH_CUDA_ARCH_LIST"), "") | {"CXX": sys.executable}
    given = json.dumps([clean | each for each in environments], default=str)
    # The rest are torch's warnings.
    known = ("extensions:", "stopped:", "record:", "at_fused:")
    said = run(SETUP, given, cwd=ROOT).split("environment:\n")[1:]
    return [[line for line in each.splitlines() if line.startswith(known)] for each in said]


def test_the_toolkit_of_cuda_home_counts_before_that_on_the_path(tmp_path: Path) -> None:
    a, b, c = (toolkit(tmp_path / name) for name in "abc")
    found = set_up(
        {"CUDA_HOME": a, "CUDA_PATH": b, "PATH": c / "bin"},
        {"CUDA_PATH": b, "PATH": c / "bin"},
        {"PATH": c / "bin", "CC": "gcc-99"},
    )
    for said, right in zip(found, (a, b, c), strict=True):
        record = f"built with {right} against torch's CUDA 13.0"
        assert said == [
            WITH_CUDA,
            f"at_fused: the CUDA library is {record}",
            f'record: "{record}"',
        ]
    # The host compiler that torch's build hands to nvcc, and one of the library's devices.
    probed = (c / "probed").read_text()
    assert probed.startswith("-ccbin gcc-99 -gencode=arch=compute_80,code=sm_80 -c ")


def test_an_nvcc_that_cannot_compile_leaves_the_cuda_library_out(tmp_path: Path) -> None:
    home = toolkit(tmp_path, f"In file included from nothing:\n{UNSUPPORTED}\n1 error")
    reason = f"{home}/bin/nvcc fails: {UNSUPPORTED}"
    # A C++ string, through a shell and ninja.
    recorded = reason.replace('"', "'").replace("$", "'")
    assert set_up({"CUDA_HOME": home}, {"CUDA_HOME": home, "AT_FUSED_CUDA": "1"}) == [
        [
            WITHOUT_CUDA,
            f"at_fused: the CUDA library is not built: {reason}",
            f'record: "not built: {recorded}"',
        ],
        [f"stopped: AT_FUSED_CUDA=1, but the CUDA library cannot be built: {reason}"],
    ]


def test_what_else_may_be_wrong_with_nvcc(tmp_path: Path) -> None:
    nothing, old, broken, bare, silent = (tmp_path / name for name in ("no", "old", "e", "f", "g"))
    toolkit(old, release=12)
    (toolkit(broken) / "bin/nvcc").write_bytes(b"\x7fELF")
    toolkit(bare, devices="sm_50")
    (toolkit(silent) / "bin/nvcc").write_text(f"#!{sys.executable}\nraise SystemExit(3)\n")
    reasons = {
        nothing: f"no nvcc in {nothing}/bin (CUDA_HOME)",
        old: "nvcc is of CUDA 12, torch of CUDA 13.0",
        broken: f"{broken}/bin/nvcc does not run: Exec format error",
        bare: f"{bare}/bin/nvcc compiles for none of sm_(80, 90, 100)",
        silent: f"{silent}/bin/nvcc fails: status 3",
        "": "no nvcc on PATH",
    }
    found = set_up(*({"CUDA_HOME": home} for home in reasons))
    for said, reason in zip(found, reasons.values(), strict=True):
        assert said[:2] == [WITHOUT_CUDA, f"at_fused: the CUDA library is not built: {reason}"]


def test_switches_of_the_build() -> None:
    assert set_up(
        {"AT_FUSED_CPP": "0"},
        {"AT_FUSED_CUDA": "0"},
        {"AT_FUSED_CPP": "no"},
        {"AT_FUSED_CUDA": "yes"},
        {"AT_FUSED_CPP": "0", "AT_FUSED_CUDA": "1"},
    ) == [
        ["extensions:"],
        [
            WITHOUT_CUDA,
            "at_fused: the CUDA library is not built: AT_FUSED_CUDA=0",
            'record: "not built: AT_FUSED_CUDA=0"',
        ],
        ["stopped: AT_FUSED_CPP must be 1 or 0, got 'no'"],
        ["stopped: AT_FUSED_CUDA must be auto or 0 or 1, got 'yes'"],
        ["stopped: AT_FUSED_CUDA=1, but nothing is compiled: AT_FUSED_CPP=0, or Windows"],
    ]


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
    assert "same on torch" in run(code, python=python, PYTHONPATH=str(tmp_path))


def test_use_backend_is_a_setting_and_a_context_manager() -> None:
    x, y = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)

    def ran_on_eager() -> bool:
        with torch.profiler.profile() as record:
            at_fused.at_loss(x, y)
        found = any(event.key == "aten::stack" for event in record.key_averages())
        assert at_fused.backends()["cpu"].in_use != found
        return found

    assert not ran_on_eager()
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
