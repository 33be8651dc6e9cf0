"""``python -m at_fused.info``: a report of the installation, its build and its back ends.

``--json`` prints the report as JSON, for programs and bug reports: the result of :func:`facts`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform

import torch

import at_fused
from at_fused._api import backends
from at_fused.backends import backend_by_device, candidates, cpu
from at_fused.backends.compiled import build_info, why_not_compiled


def _describe_choice(device: str) -> str:
    """Return the back end of a device, and why faster ones are not used."""
    chosen, table, order = backend_by_device()[device], backends(), candidates(device)
    faster = order[: order.index(chosen)] if chosen in order else ()
    why = "".join(f"; not on {name}: {table[name].reason}" for name in faster)
    return f"{chosen}{why}"


def facts() -> dict[str, str | int]:
    """Return the entries of the report as a flat dictionary.

    Returns:
        Versions (``at_fused``, ``python``, ``torch``), ``folder``, ``system`` and ``threads``.
        ``built``: the compiler, or why nothing is compiled. ``CUDA`` and ``CPU instruction set``.
        ``CPU tensors run on`` and ``CUDA tensors run on``: a back end, and why faster ones are not
        used. For each back end, such as cpu: ``back end cpu``, its state ("in use", "available" or
        "not available"), ``back end cpu devices`` and ``back end cpu reason``.
    """
    build, not_compiled = build_info(), why_not_compiled()
    if build:
        isas = ", ".join(build.cpu_instruction_sets)
        built = f"{build.compiler} against torch {build.torch}, CPU instruction sets {isas}"
    else:
        built = f"nothing compiled: {not_compiled.reason}" if not_compiled else "unknown"
    entries: dict[str, str | int] = {
        "at_fused": at_fused.__version__,
        "folder": os.path.dirname(at_fused.__file__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "built": built,
        "CUDA": build.cuda if build else "unknown",
        "CPU instruction set": cpu.isa() if cpu.available() else "none in use",
        "CPU tensors run on": _describe_choice("cpu"),
        "CUDA tensors run on": _describe_choice("cuda"),
    }
    for name, row in backends().items():
        state = "in use" if row.in_use else "available" if row.available else "not available"
        key = f"back end {name}"
        entries |= {key: state, f"{key} devices": ", ".join(row.devices)}
        entries[f"{key} reason"] = row.reason
    return entries


def lines() -> list[str]:
    """Return the report as text.

    Returns:
        One line per entry.
    """
    return [f"{name:24} {value}" for name, value in facts().items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m at_fused.info",
        description="Prints a report of the installation, its build and its back ends.",
    )
    parser.add_argument("--json", action="store_true", help="print one flat JSON object instead")
    as_json = parser.parse_args().json
    print(json.dumps(facts(), indent=1) if as_json else "\n".join(lines()))
