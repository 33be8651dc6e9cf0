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
"$PYTHON" -c 'import torch' 2>/dev/null || refuse "$PYTHON has no torch: install 2.10 or later"
"$PYTHON" -c '
import sys, torch
sys.exit(tuple(int(n) for n in torch.__version__.split(".")[:2]) < (2, 10))' ||
  refuse "torch is older than 2.10"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null ||
  refuse "torch sees no GPU (torch.cuda.is_available() is False): nothing to check here"
command -v nvcc >/dev/null || refuse "no nvcc on PATH: the CUDA library cannot be built"

device=$("$PYTHON" -c 'import torch; print(torch.cuda.get_device_name())')
name=$(printf '%s' "$device" | tr -c 'A-Za-z0-9-' '_')
report=$PWD/benchmarks/results/gpu_check_${name}_$(date +%Y-%m-%d).md
work=$(mktemp -d) || refuse "no temporary folder"
trap 'rm -rf "$work"' EXIT
failed=()

# Appends a command's output to the report, under a title; the last 200 lines, if it is long.
section() {
  local title=$1 status lines
  shift
  echo "== $title"
  "$@" >"$work/log" 2>&1
  status=$?
  tail -n 3 "$work/log"
  lines=$(wc -l <"$work/log")
  {
    printf '\n## %s\n\nExit status %s' "$title" "$status"
    if ((lines > 200)); then printf ', the last 200 of %s lines' "$lines"; fi
    printf '\n\n```\n$ %s\n' "$*"
    tail -n 200 "$work/log"
    printf '```\n'
  } >>"$report"
  return "$status"
}

# A section that has to succeed.
step() {
  section "$@" || failed+=("$1")
}

skip() {
  echo "== $1: skipped, $2"
  printf '\n## %s\n\nSkipped: %s.\n' "$1" "$2" >>"$report"
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

section "nvidia-smi" nvidia-smi
section "nvcc" nvcc --version

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

sanitizer=$(command -v compute-sanitizer)
if [[ -z $sanitizer && -x /usr/local/cuda/bin/compute-sanitizer ]]; then
  sanitizer=/usr/local/cuda/bin/compute-sanitizer
fi
for tool in memcheck racecheck synccheck; do
  if [[ -z $sanitizer ]]; then
    skip "compute-sanitizer, $tool" "not found"
  else
    # Without the caching allocator, whose large blocks would hide accesses past a tensor's end.
    step "compute-sanitizer, $tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
      "$sanitizer" --tool "$tool" --error-exitcode 1 "$PYTHON" "$work/driver.py"
  fi
done

{
  printf '\n## Result\n\n'
  if ((${#failed[@]})); then
    printf 'Failed: %s.\n' "$(printf '%s; ' "${failed[@]}" | sed 's/; $//')"
  else
    printf 'Every step succeeded.\n'
  fi
} >>"$report"
tail -n 1 "$report"
echo "report: $report; the benchmarks: the device's .json beside it"
((${#failed[@]} == 0))
