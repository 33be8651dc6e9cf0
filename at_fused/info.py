"""``python -m at_fused.info``: what is installed, how it was built, what runs and what does not."""

from __future__ import annotations

import os
import platform
import sys

import torch

import at_fused
from at_fused._api import backends
from at_fused.backends import candidates, cpu, users
from at_fused.backends.compiled import build_info, nothing_compiled


def _choice(device: str) -> str:
    """What runs a device's tensors, and why nothing faster does."""
    chosen, table, order = users()[device], backends(), candidates(device)
    passed = order[: order.index(chosen)] if chosen in order else ()
    why = "".join(f"; not on {name}: {table[name].reason}" for name in passed)
    return f"{chosen}{why}"


def lines() -> list[str]:
    """The report.

    Returns:
        Its lines.
    """
    build, nothing = build_info(), nothing_compiled()
    if build:
        levels = ", ".join(build.cpu_isa_levels)
        built = f"{build.compiler} against torch {build.torch}, CPU levels {levels}"
    else:
        built = f"nothing compiled: {nothing.reason}" if nothing else "unknown"
    report = [
        f"at_fused   {at_fused.__version__} ({os.path.dirname(at_fused.__file__)})",
        f"python     {platform.python_version()} on {platform.system()} {platform.machine()}",
        f"torch      {torch.__version__}, {torch.get_num_threads()} threads",
        f"built      {built}",
        f"CUDA       {build.cuda if build else 'unknown'}",
        f"CPU level  {cpu.isa() if cpu.available() else 'none in use'}",
        f"CPU tensors run on {_choice('cpu')}",
        f"CUDA tensors run on {_choice('cuda')}",
        "back ends",
    ]
    for row in backends().values():
        state = "in use" if row.in_use else "available" if row.available else "not available"
        report.append(f"  {row.name:8} {state:14} {', '.join(row.devices):12} {row.reason}")
    return report


if __name__ == "__main__":
    sys.stdout.write("\n".join(lines()) + "\n")
