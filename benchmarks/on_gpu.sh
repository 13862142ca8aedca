#!/usr/bin/env bash
# Everything that a GPU has to say, in one command under nine minutes: it calibrates the machine's
# profile, and times layers against PEFT and Inductor. Needs torch 2.11 or newer, PEFT, transformers
# and one GPU; no network. Results: benchmarks/results/on_gpu.{json,md} and profile.json, or in the
# folder that --out names.
#
#     benchmarks/on_gpu.sh [--out FOLDER] [--seconds 420] [CASE ...]
#     benchmarks/on_gpu.sh --device cpu --scale 32      # tiny layers, to try it without a GPU
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
# --seconds ends it; this ends a compilation that hangs. What was measured is written after each case.
exec timeout --kill-after=5 530 "${PYTHON:-python3}" "$root/benchmarks/on_gpu.py" "$@"
