"""Results of a device: its description and the rows of each part, in one JSON file per device."""

from __future__ import annotations

import datetime
import json
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import at_fused
from benchmarks import ROOT, tables
from benchmarks.cases import backends
from benchmarks.measure import PARTS

Result = dict[str, Any]

SCHEMA = 1
FOLDER = ROOT / "benchmarks/results"
OTHER_FILES = re.compile("roofline|gpu_check_.*")  # in the same folder


class ResultError(ValueError):
    """Missing or unreadable results, or a device that cannot be measured."""


def processor() -> str:
    """Return the processor's name, with family and model where a cloud hides the series."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    fields = dict(map(str.strip, line.split(":", 1)) for line in lines if ":" in line)
    name = fields.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= fields.keys() and not re.search(r"\d", name):
        name += f", family {fields['cpu family']} model {fields['model']}"
    return name


def last_level_cache() -> int:
    """Return the size of the largest cache in bytes, 0 if unknown."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    return max((int(path.read_text().strip().rstrip("K")) << 10 for path in sizes), default=0)


def commit() -> str:
    """Return the checkout's commit, with "-dirty" if files differ from it."""
    command = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def new_result(device: str) -> Result:
    """Return a result without rows for "cpu" or "cuda"."""
    known = at_fused.backends()
    usable = {name: known[name].reason for name in backends(device)}
    if not usable:
        unavailable = "; ".join(f"{name}: {row.reason}" for name, row in known.items())
        raise ResultError(f"cannot measure {device}: no back end is available ({unavailable})")
    gpu = torch.cuda.get_device_properties(0) if device == "cuda" else None
    versions = {"at_fused": at_fused.__version__, "torch": torch.__version__}
    versions["Python"] = platform.python_version()
    if gpu:
        versions["CUDA" if torch.version.cuda else "HIP"] = torch.version.cuda or torch.version.hip
    return {
        "schema": SCHEMA,
        "device": gpu.name if gpu else processor(),
        "kind": device,
        "threads": torch.get_num_threads(),
        "cache": gpu.L2_cache_size if gpu else last_level_cache(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "backends": usable,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "parts": {},
    }


def machine_of(result: Result) -> str:
    """Return the device's name, and the threads of a CPU."""
    threads = f", {result['threads']} thread{'s' * (result['threads'] != 1)}"
    return result["device"] + threads * (result["kind"] == "cpu")


def describe(result: Result) -> str:
    """Return the device, versions and date in one line."""
    versions = dict(result["versions"])
    cache = f", {result['cache'] / 2**20:.0f} MB of last-level cache" * bool(result["cache"])
    ours = f"at_fused {versions.pop('at_fused')} (commit {result['commit']})"
    on = " and ".join(f"{name} ({kernels})" for name, kernels in result["backends"].items())
    others = [f"{name} {version}" for name, version in versions.items()]
    programs = ", ".join([f"{ours} on {on}", *others, result["system"]])
    return f"{machine_of(result)}{cache}; {programs}; {result['date']}"


def path_of(result: Result, folder: Path) -> Path:
    """Return the path of a result's file, which is named after the device."""
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*", " ", result["device"].lower())
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def write(path: Path, result: dict[str, Any]) -> None:
    """Write JSON with one line per row of "parts"."""
    parts = ",\n".join(
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for name, rows in result["parts"].items()
    )
    head = json.dumps({key: value for key, value in result.items() if key != "parts"}, indent=1)
    path.write_text(head[: -len("\n}")] + f',\n "parts": {{\n{parts}\n }}\n}}\n')


def measure(
    device: str, settings: dict[str, Sequence[Sequence[Any]]], path: Path | None, **options: Any
) -> Path:
    """Measure settings of parts, save after each, and print the table of each part."""
    result = new_result(device)
    path = path or path_of(result, FOLDER)
    print(describe(result), flush=True)
    for name, part_settings in settings.items():
        rows = result["parts"][name] = []
        try:
            for setting in part_settings:
                rows += PARTS[name][0](device, *setting)._replace(**options).rows()
                write(path, result)
        finally:  # an interrupted run also prints its table
            reasons = {item for row in rows for item in row.get("uncaptured", {}).items()}
            stars = [f"\\* {program}: {reason}" for program, reason in sorted(reasons)]
            title, _, table = tables.PARTS[name]
            print("", title, "", *table(rows), *stars, sep="\n", flush=True)
    return path


def load(path: Path) -> Result:
    """Read a saved result, and check that its tables can be made."""
    try:
        result = json.loads(path.read_text())
        if result["schema"] != SCHEMA:
            raise ValueError(f"'schema' must be {SCHEMA}, got {result['schema']}: measure again")
        describe(result)
        for name, rows in result["parts"].items():
            tables.PARTS[name].table(rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ResultError(f"{path}: not a result: {error!r}") from error
    return result


def load_all(folder: Path) -> dict[str, Result]:
    """Read the results of all devices, by the names of their files."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: load(path) for path in paths if not OTHER_FILES.fullmatch(path.stem)}
