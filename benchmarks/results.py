"""The results of a device: what it is, and the rows of each part. One JSON file for each device."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import at_fused
from benchmarks import ROOT
from benchmarks.cases import CASES, DTYPES, LAYOUTS, PASSES, backends
from benchmarks.timing import Row

Result = dict[str, Any]

SCHEMA = 1
FOLDER = ROOT / "benchmarks/results"
MODEL = "roofline"  # roofline_model.py's file there, which is no device's

# What a result must hold; a tuple is numbers under at least these names.
HEAD = {
    "device": str,
    "kind": str,
    "threads": int,
    "cache": int,  # bytes of the last level, 0 where the system does not tell
    "system": str,
    "commit": str,
    "date": str,
    "versions": dict,
    "backends": dict,
    "parts": dict,
}
COMPARED = ("at_fused", "compile", "eager")
SETTING = {"case": str, "dtype": str, "layout": str}
PARTS: dict[str, dict[str, Any]] = {
    "cases": SETTING | {"pass": str, "bytes": ("at_fused", "floor"), "ms": (*COMPARED, "floor")},
    "sizes": {"shape": list, "bytes": int, "ms": (*COMPARED, "floor")},
    "memory": {"case": str, "batch": int, "gradient": int, "bytes": COMPARED},
    "threads": {"case": str, "threads": int, "ms": ("floor", "forward", "forward+backward")},
    "calls": {"pairs": int, "shape": list, "ms": ("at_fused", "eager")},
    "methods": SETTING | {"variant": str, "ms": COMPARED},
    "steps": {
        "networks": str,
        "own": ("eager", "drop-in"),
        "bytes": ("alone", "without", "tap"),
        "ms": ("alone", "without", "tap"),
    },
    "taps": SETTING | {"ms": ("tap", "drop-in", "eager")},
}


class ResultError(Exception):
    """A file that is no result, or not one that goes with the rest."""


# ---- this machine --------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name; with family and model where a cloud hides which of a series it is."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    known = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = known.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= known.keys() and not re.search(r"\d", name):
        name += f", family {known['cpu family']} model {known['model']}"
    return name


def last_level_cache() -> int:
    """Bytes, 0 if unknown."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().rstrip("K")) << 10 for path in sizes), default=0)


def commit() -> str:
    """Of the checkout; "-dirty" where what is measured is not what was committed."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    name = git("rev-parse", "--short", "HEAD")
    measured = ("at_fused", "csrc", "setup.py", ":(glob)benchmarks/*.py")
    changed = git("status", "--porcelain", "--", *measured)
    return (name or "unknown") + "-dirty" * bool(changed)


def begin(device: str) -> Result:
    """A result without a row, of "cpu" or "cuda"."""
    table = at_fused.backends()
    on = {name: table[name].reason for name in backends(device)}
    if not on:
        names = ("cpu",) if device == "cpu" else ("cuda", "triton")
        reasons = "; ".join(f"{name}: {table[name].reason}" for name in names)
        raise ResultError(f"nothing to measure on {device}: no back end runs ({reasons})")
    versions = {"at_fused": at_fused.__version__, "torch": torch.__version__}
    versions["Python"] = platform.python_version()
    if device == "cuda":
        versions["CUDA" if torch.version.cuda else "HIP"] = torch.version.cuda or torch.version.hip
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    return {
        "schema": SCHEMA,
        "device": gpu.name if gpu else processor(),
        "kind": device,
        "threads": torch.get_num_threads(),
        "cache": gpu.L2_cache_size if gpu else last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "backends": on,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "parts": {},
    }


def describe(result: Result) -> str:
    """What the figures are of, in a line."""
    versions = dict(result["versions"])
    machine = [result["device"]]
    if result["kind"] == "cpu":
        machine.append(f"{result['threads']} thread{'s' * (result['threads'] != 1)}")
    if result["cache"]:
        machine.append(f"{result['cache'] / 2**20:.0f} MB of last-level cache")
    ours = f"at_fused {versions.pop('at_fused')} of commit {result['commit']}"
    on = " and ".join(f"{name} ({what})" for name, what in result["backends"].items())
    others = [f"{name} {version}" for name, version in versions.items()]
    programs = ", ".join([f"{ours} on {on}", *others, result["system"]])
    return f"{', '.join(machine)}; {programs}; {result['date']}"


# ---- files ---------------------------------------------------------------------------------------


def slug(device: str) -> str:
    """The name of a device's file."""
    plain = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*", " ", device.lower())
    return re.sub(r"[^a-z0-9]+", "-", plain).strip("-")


def path_of(result: Result, folder: Path) -> Path:
    """Where it is kept."""
    return folder / f"{slug(result['device'])}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    """Writes JSON whose "parts" are lists of rows, a row in a line."""
    parts = ",\n".join(
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for name, rows in found["parts"].items()
    )
    head = json.dumps({key: value for key, value in found.items() if key != "parts"}, indent=1)
    path.write_text(head[: -len("\n}")] + f',\n "parts": {{\n{parts}\n }}\n}}\n')


def _fault(found: Any, kinds: dict[str, Any]) -> str:
    """The first entry that is missing or of another kind, or nothing."""
    for key, kind in kinds.items():
        value = found.get(key) if isinstance(found, dict) else None
        if isinstance(kind, tuple):
            numbers = value if isinstance(value, dict) else {}
            fits = numbers.keys() >= set(kind) and all(
                type(number) in (int, float) and math.isfinite(number) and number > 0
                for number in numbers.values()
            )
            if not fits:
                return f"{key!r} has to hold a number above 0 for {', '.join(kind)}"
        elif type(value) is not kind:
            return f"{key!r} is missing or not {kind.__name__}"
    return ""


def _faults_of(found: Any) -> str:
    """The first thing that is wrong, or nothing."""
    if not isinstance(found, dict):
        return "not an object"
    if found.get("schema") != SCHEMA:
        return f"schema {found.get('schema')!r}, this program knows {SCHEMA}: measure again"
    if fault := _fault(found, HEAD):
        return fault
    for part, rows in found["parts"].items():
        if part not in PARTS:
            return f"unknown part {part!r}"
        if not isinstance(rows, list) or not rows:
            return f"part {part!r} has no rows"
        for number, row in enumerate(rows):
            if fault := _fault(row, PARTS[part] | {"backend": str}):
                return f"part {part!r}, row {number}: {fault}"
    keys = ("case", "dtype", "layout", "pass", "backend")
    there = {tuple(row[key] for key in keys) for row in found["parts"].get("cases", [])}
    names = [name[0] for name in CASES]
    for setting in itertools.product(names, DTYPES, LAYOUTS, PASSES, found["backends"]):
        if there and setting not in there:
            return f"part 'cases' has no row of {', '.join(setting)}"
    return ""


def read_json(path: Path) -> Any:
    """What a file holds; ResultError names one that is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: not readable as JSON: {error}") from error


def load(path: Path) -> Result:
    """A result that has been saved."""
    found = read_json(path)
    if fault := _faults_of(found):
        raise ResultError(f"{path}: not a result: {fault}")
    return found


def load_all(folder: Path) -> dict[str, Result]:
    """Those of all devices, by the names of their files."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: load(path) for path in paths if path.stem != MODEL}


def resume(new: Result, folder: Path) -> Result:
    """``new`` with the parts that were measured before, which must have been with the same."""
    path = path_of(new, folder)
    if not path.exists():
        return new
    old = load(path)
    for key in HEAD.keys() - {"parts", "date"}:
        if old[key] != new[key]:
            raise ResultError(
                f"{path}: {key} was {old[key]!r} and is {new[key]!r}: measure all parts again"
            )
    return new | {"parts": old["parts"]}


def rows_of(result: Result, part: str) -> list[Row]:
    """A part's rows; none if it was not measured."""
    return result["parts"].get(part, [])
