#!/bin/bash
# What one NVIDIA card does with flowdit, in less than nine minutes: kernels and their errors, training and sampling of
# DiT beside diffusers in torch, in this order: XL/2, B/2, S/2. The results are printed and written to gpu_check.json.
#   pip install -e '.[cuda12]' torch diffusers    # torch and diffusers only to compare with
#   scripts/gpu_check.sh
#   scripts/gpu_check.sh --only XL/2 sampling --json xl.json
#   scripts/gpu_check.sh --dry-run                # tiny models on the CPU: does the script run?
# docs/performance.md says what the figures mean.
set -eu
cd "$(dirname "$0")/.."
# The check ends by itself after 8.5 minutes; this is for a process that hangs.
exec timeout --kill-after=5 535 "${PYTHON:-python3}" -m benchmarks.gpu_check "$@"
