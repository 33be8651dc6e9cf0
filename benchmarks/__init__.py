"""Benchmarks of a checkout: ``python -m benchmarks.report`` runs them and writes the report.

cases            the cases, and the loss in eager PyTorch to compare with
measure, steps   timers and comparisons; training steps of whole networks
results          the measurements of a device, as JSON
tables, charts   the report's tables and charts
report, quick    programs that measure everything, or a few cases
roofline         bytes that the CUDA kernels move, counted without a GPU
train_step       a training step of at-fused-train and of the authors' recipe
"""

import argparse
import os
import sys
from pathlib import Path

# "python -m" and pytest put the checkout first on sys.path. The checkout moves to the end, so that
# at_fused is the installed package with its compiled libraries.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path or os.curdir).resolve() != ROOT]
sys.path.append(str(ROOT))


def argument_parser(module: str, docstring: str) -> argparse.ArgumentParser:
    """Return a parser for the program ``python -m benchmarks.MODULE``."""
    program, summary = f"python -m benchmarks.{module}", docstring.splitlines()[0]
    return argparse.ArgumentParser(program, description=summary)
