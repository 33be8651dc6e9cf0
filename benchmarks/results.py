"""The results of a device: what it is, and the rows of each part. One JSON file for each device."""

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
NO_DEVICE = re.compile("roofline|gpu_check_.*")  # other files there


class ResultError(ValueError):
    """A file that is no result, or not one that goes with the rest."""


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
    """Return the checkout's commit; "-dirty" where files differ from it."""
    name = ["git", "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(
            name, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def begin(device: str) -> Result:
    """A result without a row, of "cpu" or "cuda"."""
    on = {name: at_fused.backends()[name].reason for name in backends(device)}
    if not on:
        reasons = "; ".join(f"{name}: {row.reason}" for name, row in at_fused.backends().items())
        raise ResultError(f"nothing to measure on {device}: no back end runs ({reasons})")
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
        "backends": on,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "parts": {},
    }


def describe(result: Result) -> str:
    """Describe in a line what was measured."""
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


def path_of(result: Result, folder: Path) -> Path:
    """Return the file's path, named after the device."""
    name = re.sub(r"\((r|tm|c)\)|\bcpu\b|@.*", " ", result["device"].lower())
    return folder / f"{re.sub(r'[^a-z0-9]+', '-', name).strip('-')}.json"


def write(path: Path, found: dict[str, Any]) -> None:
    """Write JSON whose "parts" are lists of rows, a row in a line."""
    parts = ",\n".join(
        f'  "{name}": [\n' + ",\n".join(f"   {json.dumps(row)}" for row in rows) + "\n  ]"
        for name, rows in found["parts"].items()
    )
    head = json.dumps({key: value for key, value in found.items() if key != "parts"}, indent=1)
    path.write_text(head[: -len("\n}")] + f',\n "parts": {{\n{parts}\n }}\n}}\n')


def measure(
    device: str, settings: dict[str, Sequence[Sequence[Any]]], path: Path | None, **options: Any
) -> Path:
    """Measure settings of parts; save the rows as they come, and show each part's table."""
    found = begin(device)
    path = path or path_of(found, FOLDER)
    print(describe(found), flush=True)
    for part, of_part in settings.items():
        rows = found["parts"][part] = []
        title, table = tables.PARTS[part]
        try:
            for setting in of_part:
                rows += PARTS[part][0](device, *setting)._replace(**options).rows()
                write(path, found)
        finally:  # when it is interrupted as well
            why = {(name, w) for row in rows for name, w in row.get("uncaptured", {}).items()}
            print("", title, "", *table(rows), sep="\n")
            print(*(f"\\* {name}: {w}" for name, w in sorted(why)), sep="\n", flush=True)
    return path


def load(path: Path) -> Result:
    """Read a result that has been saved, of which its tables can be made."""
    try:
        found = json.loads(path.read_text())
        if found["schema"] != SCHEMA:
            raise ValueError(f"'schema' must be {SCHEMA}, else measure again")
        describe(found)
        for part, rows in found["parts"].items():
            tables.PARTS[part][1](rows)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        raise ResultError(f"{path}: not a result: {error!r}") from error
    return found


def load_all(folder: Path) -> dict[str, Result]:
    """Those of all devices, by the names of their files."""
    paths = sorted(folder.glob("*.json"))
    return {path.stem: load(path) for path in paths if not NO_DEVICE.fullmatch(path.stem)}
