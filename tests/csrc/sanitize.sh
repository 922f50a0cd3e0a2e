#!/usr/bin/env bash
# Runs the kernels' C++ tests under sanitizers on new random input. The address and undefined
# behavior sanitizers check the CPU kernels for every instruction set of this machine, and the CUDA
# kernels emulated on the CPU. The thread sanitizer checks the CPU kernels and the thread pool.
#
#   tests/csrc/sanitize.sh [cases] [seed]
set -euo pipefail
cd "$(dirname "$0")/../.."
cases=${1:-60} seed=${2:-$RANDOM}
out=build/sanitize
mkdir -p "$out"

compile() { # name, flags...
  local name=$1
  shift
  ${CXX:-g++} -std=c++17 -O1 -g -pthread -Icsrc -Wno-unknown-pragmas -fno-sanitize-recover=all \
    "$@" -o "$out/$name"
}

address="-O0 -fsanitize=address,undefined"  # -O1 takes twice as long to compile
thread="-fsanitize=thread"
cpu="tests/csrc/kernels_test.cc csrc/weight_norm_cpu.cc"
emulation=tests/csrc/cuda_on_cpu
compile cpu-address $address $cpu &
compile cuda-address $address -DTFWN_TEST_CUDA -I$emulation -x c++ \
  tests/csrc/kernels_test.cc $emulation/cuda_on_cpu.cc csrc/weight_norm_cuda.cu &
wait -n
compile cpu-thread $thread $cpu &
wait -n
compile pool-thread $thread tests/csrc/thread_pool_test.cc &
wait -n
wait -n

run() {
  echo "== $*"
  "$@"
}
for simd in $("$out/cpu-address" 0 0 | grep -oE 'avx512|avx2' | sed 's/avx512/avx512 avx2/') baseline; do
  TFWN_SIMD=$simd run "$out/cpu-address" "$cases" "$seed"
done
run "$out/cuda-address" "$cases" "$seed"
run "$out/cpu-thread" "$cases" "$seed"
run "$out/pool-thread"
echo "no errors found"
