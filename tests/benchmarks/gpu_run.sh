#!/usr/bin/env bash
# Ten minutes on one CUDA card: first whether everything is right there, then the figures of docs/benchmarks.md.
#
#   tests/benchmarks/gpu_run.sh                       all, on cuda:0; a second call goes on where the first ended
#   tests/benchmarks/gpu_run.sh --device cpu --small  a rehearsal with tiny models, without what needs a card
#   OUT=folder MINUTES=5 tests/benchmarks/gpu_run.sh  where results go (default: tests/benchmarks/results), how long
#
# Nothing is downloaded. Beside torch it takes transformers, h5py, pillow, pyyaml, rich, typer, tqdm, matplotlib, psutil
# and accelerate; the package itself need not be installed. Each result is written when it is there.
set -uo pipefail
cd "$(dirname "$0")/../.."

device=cuda:0
small=()
while [ $# -gt 0 ]; do
  case $1 in
    --device) device=$2 && shift ;;
    --small) small=(--small) ;;
    *) echo "gpu_run.sh takes --device and --small; got $1" >&2 && exit 2 ;;
  esac
  shift
done
out=${OUT:-tests/benchmarks/results}
seconds=$((${MINUTES:-10} * 60 - 20)) # loading torch, and the step that runs at the end
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false \
  PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True

families=()
[ ${#small[@]} -eq 0 ] || families=(--families llava)
smoke=$((seconds / 8))
timeout $((smoke + 30)) "$python" tests/benchmarks/gpu_smoke.py --device "$device" --seconds "$smoke" \
  ${families[@]+"${families[@]}"} --out "$out/gpu-smoke.json"
failed=$?

# A step that is begun late still ends.
rest=$((seconds - SECONDS))
timeout "$rest" "$python" tests/benchmarks/bench_gpu.py ${small[@]+"${small[@]}"} --seconds $((rest * 85 / 100)) --out "$out/gpu.json" ||
  failed=1
echo "results in $out; python tests/benchmarks/publish.py writes them into docs/benchmarks.md"
exit "$failed"
