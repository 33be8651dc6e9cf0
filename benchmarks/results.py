"""The results of a device: what it is, and the rows of each part. One JSON file for each device."""

from __future__ import annotations

import datetime
import itertools
import json
import math
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import at_fused
from benchmarks import ROOT, tables
from benchmarks.cases import CANONICAL, DTYPES, LAYOUTS, PASSES, backends
from benchmarks.measure import Row

Result = dict[str, Any]

SCHEMA = 1
FOLDER = ROOT / "benchmarks/results"
MODEL = "roofline"  # roofline.py's file there, which is no device's

# What a result must hold beside the rows.
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


class ResultError(ValueError):
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
        if not shutil.which("git"):
            return ""
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


def measured(row: Row) -> Iterator[Any]:
    """All times and sizes of a row."""
    for unit in ("ms", "own", "bytes", "gradient"):
        found = row.get(unit, {})
        yield from found.values() if isinstance(found, dict) else [found]


def check(found: Any) -> None:
    """Refuses what is no result: what its tables cannot be made of."""
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ResultError(f"'schema' must be {SCHEMA}, else measure again")
    for key, kind in HEAD.items():
        if type(found.get(key)) is not kind:
            raise ResultError(f"{key!r} must be there, and {kind.__name__}")
    for part, rows in found["parts"].items():
        if part not in tables.PARTS or not isinstance(rows, list) or not rows:
            raise ResultError(f"{part!r} must be one of {', '.join(tables.PARTS)}, a list of rows")
        try:
            for number in (n for row in rows for n in measured(row)):
                if type(number) not in (int, float) or not 0 < number < math.inf:
                    raise ResultError(f"part {part!r}: a time or size of {number!r}")
            tables.PARTS[part].table(rows)
        except (AttributeError, KeyError, TypeError) as error:
            raise ResultError(f"part {part!r}: a row without what is shown: {error!r}") from error
    keys = ("case", "dtype", "layout", "pass", "backend")
    there = {tuple(row[key] for key in keys) for row in found["parts"].get("cases", [])}
    names = [name[0] for name in CANONICAL]
    for setting in itertools.product(names, DTYPES, LAYOUTS, PASSES, found["backends"]):
        if there and setting not in there:
            raise ResultError(f"part 'cases' has no row of {', '.join(setting)}")


def load(path: Path) -> Result:
    """A result that has been saved."""
    try:
        found = json.loads(path.read_text())
        check(found)
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: not a result: {error}") from error
    return found


def load_all(folder: Path) -> dict[str, Result]:
    """Those of all devices, by the names of their files; a gpu_check's rows are of few cases."""
    paths = sorted(folder.glob("*.json"))
    others = re.compile(rf"{MODEL}|gpu_check_.*")
    return {path.stem: load(path) for path in paths if not others.fullmatch(path.stem)}


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
