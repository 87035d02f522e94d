#!/usr/bin/env bash
# Runs everything that needs a GPU, in under 15 minutes: benchmarks/gpu.sh OUT
#
# It installs the checkout beside the torch and triton that are there. Then it runs the tests of the compiled kernels,
# tiny epochs of each family under torch's and NVIDIA's sanitizers, the kernels' benchmarks, epochs at the size of
# SD3.5-M and their memory, and the report. Results and logs are left in OUT. If a part fails or runs out of time, the others still run, and
# the exit code is 1.
#
# PYTHON  the interpreter, by default python3
# WHEELS  a folder with wheels of missing packages, for a machine without a network
set -uo pipefail
out=${1:?usage: benchmarks/gpu.sh OUT}
python=${PYTHON:-python3}
mkdir -p "$out" && out=$(cd "$out" && pwd) && cd "$(dirname "$0")/.." || exit
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Compile the kernels into a new cache, and download nothing.
unset TRITON_INTERPRET FASTFLOWGRPO_BACKEND
export TRITON_CACHE_DIR=$work/triton HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
rm -f "$out"/{sde_step,grpo_loss,epoch}.json # from an earlier run
failed=()

part() { # NAME SECONDS COMMAND...
  local name=$1 limit=$2 begin=$SECONDS status
  shift 2
  echo "== $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" 2>&1 | tee "$out/$name.log"
  status=${PIPESTATUS[0]}
  echo "== $name: status $status after $((SECONDS - begin)) s"
  [ "$status" = 0 ] || failed+=("$name")
}

bench() { # OPERATION SECONDS PARAMETER: results are grouped by size and by this parameter
  # --seconds stops it and writes the results before the timeout would kill it.
  part "$1" "$2" "$python" -m pytest "benchmarks/bench_$1.py" --seconds=$(($2 - 15)) -q -W default -p no:cacheprovider \
    --benchmark-json="$out/$1.json" --benchmark-columns=median --benchmark-group-by="param:size,param:$3"
}

"$python" - <<'END' 2>&1 | tee "$out/machine.log"
import platform
import sys

import torch

print(f"python {platform.python_version()}, torch {torch.__version__}")
if not torch.cuda.is_available():
    sys.exit("torch finds no GPU: nothing was measured")
import triton

print(f"triton {triton.__version__}, CUDA {torch.version.cuda}")
print(torch.cuda.get_device_properties(0))
END
[ "${PIPESTATUS[0]}" = 0 ] || exit

[ -z "${WHEELS:-}" ] || part wheels 20 "$python" -m pip install --no-index --no-deps "$WHEELS"/*.whl
part install 40 "$python" -m pip install --no-index --no-deps --no-build-isolation -e .
workers=()
"$python" -c "import xdist" 2>/dev/null && workers=(-n 8)
part tests 120 "$python" -m pytest tests/kernels/test_*kernel*.py "${workers[@]}" -q -W default -p no:benchmark \
  -p no:cacheprovider
# Triton's interpreter would leave no compiled kernels.
part compiled 5 "$python" -c "import glob, sys; count = len(glob.glob('$TRITON_CACHE_DIR/**/*.cubin', recursive=True))
print(count, 'kernels were compiled'); sys.exit(not count)"
# Torch's sanitizer follows streams and events, and compute-sanitizer the accesses of each kernel.
part epochs 90 "$python" -m pytest tests/test_trainer_gpu.py -q -W default -p no:cacheprovider
part streams 75 env TORCH_CUDA_SANITIZER=1 "$python" -m pytest tests/test_trainer_gpu.py -k "4 and (sd3 or wan)" -q \
  -W default -p no:cacheprovider
if command -v compute-sanitizer >/dev/null; then
  part memcheck 90 compute-sanitizer --tool memcheck --error-exitcode 1 "$python" -m pytest tests/test_trainer_gpu.py \
    -k "sd3 and 4" -q -W default -p no:cacheprovider
else
  echo "== memcheck: left out, compute-sanitizer is not installed (it comes with the CUDA toolkit)"
fi
bench sde_step 45 work
bench grpo_loss 80 direction
part model 30 "$python" -m benchmarks.random_sd35 "$work/sd35"
part epoch 240 "$python" -m benchmarks.epoch --config configs/sd35_ocr.yaml --config benchmarks/sd35_medium.yaml \
  --model "$work/sd35" --prompts.per_epoch 1 --update.batch_size 12 --policy.compile true --repeats 1 \
  --output "$out/epoch.json"
part memory 50 "$python" -m benchmarks.memory --config configs/sd35_ocr_24gb.yaml --config benchmarks/sd35_medium.yaml \
  --model "$work/sd35" --output "$out/memory.json"
part report 15 "$python" -m benchmarks.report "$out"

echo "after $SECONDS s: ${#failed[@]} parts failed${failed[*]:+: ${failed[*]}}"
[ "${#failed[@]}" = 0 ]
