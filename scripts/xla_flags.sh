#!/bin/bash
# The compiler's flags by kind of machine, in one place. To be sourced by what starts a run, as in launch/:
#   . scripts/xla_flags.sh gpu     # sets XLA_FLAGS
#   . scripts/xla_flags.sh v5e     # or v5p, v6e: sets LIBTPU_INIT_ARGS
# or run, to print the flags. Those that are set already follow, so they win. A flag stands here with its source or with
# what it changed; XLA and libtpu end the process for one that they do not know (tests/test_xla_flags.py tries each).
flags_of() {
  case $1 in
    gpu)
      # Collectives start early and are waited for late, so that they overlap with compute. Set in NVIDIA's JAX images
      # (docs.nvidia.com/jax-toolbox/environment-variables); off by default in XLA.
      echo --xla_gpu_enable_latency_hiding_scheduler=true
      # Collectives of a loop over blocks are moved by one iteration, to overlap with the compute of another block.
      # JAX-Toolbox, docs/GPU_performance.md, "Optimization level". They had no effect for the author of
      # github.com/openxla/xla/issues/44228, with JAX 0.10.1.
      echo --xla_gpu_enable_pipelined_all_gather=true
      echo --xla_gpu_enable_pipelined_reduce_scatter=true
      echo --xla_gpu_enable_pipelined_all_reduce=true
      # Collectives are combined up to this size: at least the weights (all-gather) or gradients (reduce-scatter) of a
      # block, as fewer and larger messages use the links better. 128 MiB is more than a block of DiT-XL/2 in float32
      # (96 MB). JAX-Toolbox, docs/GPU_performance.md, "FSDP communication"; XLA's flags guidance says the same.
      echo --xla_gpu_all_gather_combine_threshold_bytes=134217728
      echo --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728
      echo --xla_gpu_all_reduce_combine_threshold_bytes=134217728
      ;;
    v5e)
      # All-reduces of gradients run beside compute; off by default. XLA's flags guidance, "v5e/Async"
      # (github.com/openxla/xla, docs/flags_guidance.md), which suggests these two together.
      echo --xla_tpu_enable_async_collective_fusion=true
      echo --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=true
      ;;
    v5p | v6e)
      # All-reduces of gradients between slices overlap with compute across iterations; for several slices. XLA's flags
      # guidance, "TPU XLA flags"; MaxText sets them for v5p (benchmarks/xla_flags_library.py, DATA_PARALLEL_OVERLAP).
      echo --xla_tpu_enable_data_parallel_all_reduce_opt=true
      echo --xla_tpu_data_parallel_opt_different_sized_ops=true
      ;;
    *)
      echo "xla_flags.sh: kind of machine: must be gpu, v5e, v5p or v6e, got '$1'" >&2
      return 2
      ;;
  esac
}

# Left out, with what was found:
# - xla_tpu_scoped_vmem_limit_kib=65536 on v5e: 1.3 % fewer modelled cycles of a step of XL/2's width and depth 2 (fsdp 16),
#   but the compile took 324 s instead of 33 s (libtpu 0.0.42.1). v5p and v6e accept it as well.
# - xla_gpu_enable_while_loop_double_buffering: unrolls the loop over blocks by two, so it doubles what is compiled.
# - CUDA_DEVICE_MAX_CONNECTIONS=1: for Hopper; NVIDIA advises against it on Blackwell.
if kind_flags=$(flags_of "${1:-}"); then
  kind_flags=${kind_flags//$'\n'/ }
  if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
    echo "$kind_flags"
  elif [[ $1 == gpu ]]; then
    export XLA_FLAGS="$kind_flags${XLA_FLAGS:+ $XLA_FLAGS}"
  else
    export LIBTPU_INIT_ARGS="$kind_flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}"
  fi
else
  # shellcheck disable=SC2317
  return 2 2>/dev/null || exit 2
fi
