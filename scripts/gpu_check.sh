#!/usr/bin/env bash
# Checks at_fused on a machine with a GPU: builds it against the torch at hand (2.10 or later), runs
# the GPU tests, the benchmarks and, where there is one, compute-sanitizer. Leaves two files to send
# in: benchmarks/results/gpu_check_<device>_<date>.md, and the <device>.json of the benchmarks.
#
#     scripts/gpu_check.sh            PYTHON=... chooses the interpreter (default: python)
#
# Goes on after a step that fails. Exit status: 0 all well, 1 a step failed, 2 cannot begin.
set -u

PYTHON=${PYTHON:-python}
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

refuse() {
  echo "gpu_check: $1" >&2
  exit 2
}

command -v "$PYTHON" >/dev/null || refuse "no $PYTHON on PATH (set PYTHON)"
command -v nvcc >/dev/null || refuse "no nvcc on PATH: the CUDA library cannot be built"
"$PYTHON" - 2>/dev/null <<'CHECK' || refuse "$PYTHON has no torch of 2.10 or later that sees a GPU"
import torch
assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10) and torch.cuda.is_available()
CHECK

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())')
name=$(printf '%s' "$device" | tr -c 'A-Za-z0-9-' '_')
report=$PWD/benchmarks/results/gpu_check_${name}_$(date +%Y-%m-%d).md
work=$(mktemp -d) || refuse "no temporary folder"
trap 'rm -rf "$work"' EXIT
failed=()

# Runs a command and appends its last 200 lines to the report, under a title.
step() {
  local title=$1 status
  shift
  echo "== $title"
  "$@" >"$work/log" 2>&1
  status=$?
  tail -n 3 "$work/log"
  {
    printf '\n## %s\n\nExit status %s.\n\n```\n$ %s\n' "$title" "$status" "$*"
    tail -n 200 "$work/log"
    printf '```\n'
  } >>"$report"
  ((status == 0)) || failed+=("$title")
}

# What compute-sanitizer watches: every operator, whole samples and shared ones.
cat >"$work/driver.py" <<'DRIVER'
import torch

import at_fused

sizes = [(4, 16, 32, 32), (3, 64, 7, 7), (3, 5, 5, 7), (2, 96, 56, 56)]
with at_fused.use_backend("cuda"), torch.device("cuda"):
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            students = [torch.randn(n).to(dtype, memory_format=layout) for n in sizes]
            teachers = [torch.randn(n).to(dtype, memory_format=layout) for n in sizes]
            for x in students:
                x.requires_grad_()
            at_fused.at_loss(students, teachers).backward()
            at_fused.at_value_and_grad(students, teachers)
            at_fused.attention_map(students[0])
torch.cuda.synchronize()
print("done")
DRIVER

mkdir -p "$(dirname "$report")"
printf '# at_fused on %s, %s\n' "$device" "$(date -u +'%Y-%m-%d %H:%M UTC')" >"$report"
printf '\nCommit %s.\n' "$(git describe --always --dirty 2>/dev/null || echo unknown)" >>"$report"

step "Machine" bash -c "nvidia-smi; nvcc --version"

# Without build isolation the build's own tools have to be there.
step "Build tools" "$PYTHON" -m pip install "setuptools>=77" ninja "pybind11>=2.12"
step "Build" env AT_FUSED_CUDA=1 "$PYTHON" -m pip install --no-build-isolation -v -e ".[test]"
step "Back ends" "$PYTHON" -m at_fused.info
step "The CUDA library is in use" "$PYTHON" -c '
import at_fused
row = at_fused.backends()["cuda"]
print(row)
raise SystemExit(not (row.available and row.in_use))'

# Through its script: "python -m pytest" would put the checkout first on the path.
pytest=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts") + "/pytest")')
step "GPU tests" "$pytest" -m gpu -p no:cacheprovider
step "Training" "$PYTHON" -m at_fused.train --preset digits-quick --device cuda --speed auto \
  --out "$work/run"
step "Benchmarks" "$PYTHON" -m benchmarks.report

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer) ||
  printf '\nNo compute-sanitizer was found.\n' | tee -a "$report"
for tool in ${sanitizer:+memcheck racecheck synccheck}; do
  # Without the caching allocator, whose large blocks would hide accesses past a tensor's end.
  step "compute-sanitizer, $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "$sanitizer" --tool "$tool" --error-exitcode 1 "$PYTHON" "$work/driver.py"
done

result="Every step succeeded."
((${#failed[@]})) && result="Failed:$(printf ' %s;' "${failed[@]}")"
printf '\n## Result\n\n%s\n' "$result" | tee -a "$report"
echo "report: $report; the benchmarks: the device's .json beside it"
((${#failed[@]} == 0))
