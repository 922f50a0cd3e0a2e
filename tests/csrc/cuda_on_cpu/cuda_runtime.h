// As much of CUDA as csrc/weight_norm_cuda.cu uses, on the CPU, so that its kernels can be run and
// checked where there is no GPU: g++ -x c++ -Itests/csrc/cuda_on_cpu -Icsrc
// csrc/weight_norm_cuda.cu.
//
// Blocks run one after another. The threads of a block are fibers that take turns at
// __syncthreads() and shuffles, in an order that is drawn anew each time: where a barrier is
// missing, results depend on it. A thread that misses a barrier which others wait at is an error,
// as is a block that asks for more shared memory than the device has, and a kernel whose limit of
// it is set to different values: host threads that launch it would fall over each other. What this
// cannot show: speed, and what nvcc makes of it.

#ifndef TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_RUNTIME_H_
#define TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_RUNTIME_H_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __align__(n) __attribute__((aligned(n)))
#define __launch_bounds__(...)

using std::fabs;
using std::ilogb;
using std::isfinite;
using std::ldexp;
using std::max;
using std::min;
using std::sqrt;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern dim3 threadIdx, blockIdx, blockDim, gridDim;

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace cuda_on_cpu {

// The device, to be set by a test.
extern int64_t shared_memory_per_block;
extern int multiprocessors;
extern unsigned max_grid;  // blocks that are really launched at most: others' work loops over
extern uint64_t schedule;  // seed of the order in which threads take turns
extern int64_t launches;

cudaError_t LaunchBlocks(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void AllowSharedMemory(const void* kernel, int64_t bytes);
int64_t SharedMemoryAllowed(const void* kernel);
double ShuffleXor(double value, int lane_mask);

}  // namespace cuda_on_cpu

void __syncthreads();

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return static_cast<T>(cuda_on_cpu::ShuffleXor(value, lane_mask));
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? cuda_on_cpu::multiprocessors
               : static_cast<int>(cuda_on_cpu::shared_memory_per_block);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes > cuda_on_cpu::shared_memory_per_block) return cudaErrorInvalidValue;
  cuda_on_cpu::AllowSharedMemory(reinterpret_cast<const void*>(kernel), bytes);
  return cudaSuccess;
}

inline cudaError_t cudaMallocAsync(void** memory, size_t bytes, cudaStream_t) {
  *memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256);
  return cudaSuccess;
}

inline cudaError_t cudaFreeAsync(void* memory, cudaStream_t) {
  std::free(memory);
  return cudaSuccess;
}

// All of the host's memory is this device's.
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeManaged };

struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};

inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeDevice, 0};
  return cudaSuccess;
}

// Everything is done at once, so there is nothing to wait for.
using cudaEvent_t = void*;
enum { cudaEventDisableTiming = 2 };

inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = nullptr;
  return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
inline cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }

inline cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const int64_t allowed = cuda_on_cpu::SharedMemoryAllowed(reinterpret_cast<const void*>(kernel));
  if (static_cast<int64_t>(config->dynamicSmemBytes) > allowed) return cudaErrorInvalidValue;
  return cuda_on_cpu::LaunchBlocks(*config, [&] { kernel(arguments...); });
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}

#endif  // TFWN_TESTS_CSRC_CUDA_ON_CPU_CUDA_RUNTIME_H_
