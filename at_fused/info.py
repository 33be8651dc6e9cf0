"""``python -m at_fused.info``: what is installed, how it was built, what runs and what does not.

With ``--json`` the same as JSON, for programs and bug reports: what :func:`facts` returns.
"""

from __future__ import annotations

import argparse
import json
import os
import platform

import torch

import at_fused
from at_fused._api import backends
from at_fused.backends import candidates, cpu, users
from at_fused.backends.compiled import build_info, nothing_compiled


def _choice(device: str) -> str:
    """Return the back end of a device's tensors, and why nothing faster runs there."""
    chosen, table, order = users()[device], backends(), candidates(device)
    passed = order[: order.index(chosen)] if chosen in order else ()
    why = "".join(f"; not on {name}: {table[name].reason}" for name in passed)
    return f"{chosen}{why}"


def facts() -> dict[str, str | int]:
    """Return what the report says, flat, by its own words.

    Returns:
        Versions (``at_fused``, ``python``, ``torch``), ``folder``, ``system`` and ``threads``;
        ``built``, the compiler, or why nothing is compiled; ``CUDA``, ``CPU level``;
        ``CPU tensors run on`` and ``CUDA tensors run on``, a back end, with what keeps faster ones
        from it; and for each back end ``back end cpu``, its state ("in use", "available" or "not
        available"), ``back end cpu devices`` and ``back end cpu reason``.
    """
    build, nothing = build_info(), nothing_compiled()
    if build:
        levels = ", ".join(build.cpu_isa_levels)
        built = f"{build.compiler} against torch {build.torch}, CPU levels {levels}"
    else:
        built = f"nothing compiled: {nothing.reason}" if nothing else "unknown"
    found: dict[str, str | int] = {
        "at_fused": at_fused.__version__,
        "folder": os.path.dirname(at_fused.__file__),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "built": built,
        "CUDA": build.cuda if build else "unknown",
        "CPU level": cpu.isa() if cpu.available() else "none in use",
        "CPU tensors run on": _choice("cpu"),
        "CUDA tensors run on": _choice("cuda"),
    }
    for name, row in backends().items():
        state = "in use" if row.in_use else "available" if row.available else "not available"
        key = f"back end {name}"
        found |= {key: state, f"{key} devices": ", ".join(row.devices), f"{key} reason": row.reason}
    return found


def lines() -> list[str]:
    """Return the report.

    Returns:
        Its lines.
    """
    return [f"{name:24} {value}" for name, value in facts().items()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m at_fused.info",
        description="Says what is installed, how it was built, what runs and what does not.",
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object, flat")
    as_json = parser.parse_args().json
    print(json.dumps(facts(), indent=1) if as_json else "\n".join(lines()))
