"""The benchmarks of a checkout: ``python -m benchmarks.report`` runs them and writes the report.

    cases                    the settings, and the programs that are compared on them
    measure, steps           what is measured, and how; steps of whole networks
    results                  the rows of a device, as JSON
    tables, charts, report   what is made of them
    quick                    a few cases, for scripts/gpu_check.py
    roofline                 bytes that the CUDA kernels move, counted without a GPU
    model, kernels           a model of a GPU's time, and the CUDA kernels as its tasks
    train_step               the authors' recipe and at-fused-train's, step by step

test_benchmarks.py times the same for pytest-benchmark.
"""

import os
import sys
from pathlib import Path

# "python -m" and pytest put the checkout first on the path. at_fused has to be the installed one,
# with its libraries, so what is beside this package comes last.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path or os.curdir).resolve() != ROOT]
sys.path.append(str(ROOT))
