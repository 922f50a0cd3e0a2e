// How the kernels run in tests: on the CPU, with any split of the work among threads, or with
// TFWN_TEST_CUDA, emulated on a CUDA device with random properties. Run returns its error, or "".

#ifndef TFWN_TESTS_CSRC_DEVICE_H_
#define TFWN_TESTS_CSRC_DEVICE_H_

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "weight_norm.h"

#ifdef TFWN_TEST_CUDA
#include "cuda_runtime.h"
#endif

namespace tfwn {

// Splits [0, n) at random and runs each piece in its own thread.
inline cpu::ParallelFor RandomThreads(std::mt19937_64* random) {
  return [random](int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
    std::vector<int64_t> cuts = {0, n};
    const int pieces = 1 + (*random)() % 6;
    for (int i = 1; i < pieces; ++i) cuts.push_back((*random)() % (n + 1));
    std::sort(cuts.begin(), cuts.end());
    std::vector<std::thread> threads;
    for (size_t i = 0; i + 1 < cuts.size(); ++i) {
      threads.emplace_back([&body, begin = cuts[i], end = cuts[i + 1]] { body(begin, end); });
    }
    std::shuffle(threads.begin(), threads.end(), *random);
    for (std::thread& thread : threads) thread.join();
  };
}

inline void Inline(int64_t n, int64_t, const std::function<void(int64_t, int64_t)>& body) {
  body(0, n);
}

inline int64_t Pick(std::mt19937_64* random, const std::vector<int64_t>& from) {
  return from[(*random)() % from.size()];
}

#ifdef TFWN_TEST_CUDA

// Draws the device properties that decide how the work is split, and the order of the threads.
inline void PickDevice(std::mt19937_64* random) {
  cuda_on_cpu::multiprocessors = static_cast<int>(Pick(random, {1, 4, 16, 132, 400}));
  cuda_on_cpu::architecture = static_cast<int>(Pick(random, {80, 90}));
  cuda_on_cpu::resident = static_cast<int>(Pick(random, {1, 4}));
  cuda_on_cpu::max_clusters = static_cast<int>(Pick(random, {0, 16, 16}));
  cuda_on_cpu::shared_memory_per_block = Pick(random, {64, 99, 227}) << 10;
  cuda_on_cpu::max_grid = static_cast<unsigned>(Pick(random, {3, 0x7fffffff, 0x7fffffff}));
  cuda_on_cpu::schedule = (*random)();
}

inline std::string DeviceName() {
  return "CUDA on CPU, " + std::to_string(cuda_on_cpu::multiprocessors) + " multiprocessors, " +
         std::to_string(cuda_on_cpu::shared_memory_per_block) + " bytes shared, grid up to " +
         std::to_string(cuda_on_cpu::max_grid) + ", sm_" +
         std::to_string(cuda_on_cpu::architecture) + ", " + std::to_string(cuda_on_cpu::resident) +
         " resident, " + std::to_string(cuda_on_cpu::max_clusters) + " clusters";
}

template <class Arguments>
size_t ScratchBytes(const Arguments& arguments) {
  return cuda::ScratchBytes(arguments.layout);
}

template <class Arguments>
std::string Run(const Arguments& arguments, void* scratch, const cpu::ParallelFor&) {
  cuda_on_cpu::left_by_launch = scratch;
  cuda_on_cpu::left_by_launch_bytes = ScratchBytes(arguments);
  const int error = cuda::Run(arguments, scratch, nullptr);
  return error == 0 ? "" : cuda::ErrorString(error);
}

#else

inline void PickDevice(std::mt19937_64*) {}

inline std::string DeviceName() { return std::string("SIMD level ") + cpu::SimdLevel(); }

using cpu::ScratchBytes;

template <class Arguments>
std::string Run(const Arguments& arguments, void* scratch, const cpu::ParallelFor& parallel_for) {
  cpu::Run(arguments, scratch, parallel_for);
  return "";
}

#endif

}  // namespace tfwn

#endif  // TFWN_TESTS_CSRC_DEVICE_H_
