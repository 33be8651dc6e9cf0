"""The benchmarks of a checkout: ``python -m benchmarks.report`` runs them and writes the report.

cases            the settings, and the programs that are compared on them
measure, steps   one timer for all of them; steps of whole networks
results          the rows of a device, as JSON
tables, charts   what ``report`` shows of them; ``quick`` measures a few
roofline         bytes that the CUDA kernels move, counted without a GPU
train_step       the authors' recipe and at-fused-train's, step by step
"""

import os
import sys
from pathlib import Path

# "python -m" and pytest put the checkout first on the path. at_fused has to be the installed one,
# with its libraries, so what is beside this package comes last.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path or os.curdir).resolve() != ROOT]
sys.path.append(str(ROOT))
