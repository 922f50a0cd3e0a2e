// Emulates on the CPU those parts of CUDA that csrc/weight_norm_cuda.cu uses, so that its kernels
// can be run and checked without a GPU: g++ -x c++ -Itests/csrc/cuda_on_cpu -Icsrc
// csrc/weight_norm_cuda.cu.
//
// Clusters of blocks run one after another. The threads of a cluster are fibers that switch at
// barriers and shuffles, in a new random order each time, so a missing barrier changes the results.
// Memory whose contents are not yet defined is filled with NaN: shared memory that was never
// written, the target of an asynchronous copy until its thread has waited for it, and the output of
// the previous launch until an overlapping launch has waited for that launch.
//
// Errors it detects: a barrier that not all threads reach; access to the shared memory of a block
// that has ended; more shared memory than the device has; an asynchronous copy with an unaligned
// address; a kernel attribute set twice on one device; and features of sm_90 on an older device.
// It shows neither speed nor errors in the code that nvcc generates.

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
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize,
  cudaFuncAttributePreferredSharedMemoryCarveout
};
enum { cudaSharedmemCarveoutMaxShared = 100 };
using cudaStream_t = void*;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeClusterDimension,
  cudaLaunchAttributeProgrammaticStreamSerialization
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int programmaticStreamSerializationAllowed;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

struct cudaFuncAttributes {
  int ptxVersion;
};

namespace cuda_on_cpu {

// Properties of the emulated device, set by the tests.
extern int64_t shared_memory_per_block;
extern int multiprocessors;
extern int architecture;   // 90 and later have clusters and overlapping launches
extern int resident;       // resident blocks per multiprocessor
extern int max_clusters;   // clusters that can run at once
extern unsigned max_grid;  // maximum number of blocks that run; their loops must cover all work
extern uint64_t schedule;  // seed of the order in which threads run
// The memory through which a launch passes results to the launch that overlaps it.
extern void* left_by_launch;
extern size_t left_by_launch_bytes;
extern int64_t launches, cluster_launches, overlapping_launches;

int DeviceNumber();
cudaError_t LaunchBlocks(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
void SetAttribute(const void* kernel, cudaFuncAttribute attribute, int64_t value);
int64_t SharedMemoryAllowed(const void* kernel);
double ShuffleXor(double value, int lane_mask);

}  // namespace cuda_on_cpu

void __syncthreads();

template <class T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return static_cast<T>(cuda_on_cpu::ShuffleXor(value, lane_mask));
}

inline void cudaTriggerProgrammaticLaunchCompletion() {}
void cudaGridDependencySynchronize();

inline cudaError_t cudaGetDevice(int* device) {
  *device = cuda_on_cpu::DeviceNumber();
  return cudaSuccess;
}

inline cudaError_t cudaSetDevice(int device) {
  return device == cuda_on_cpu::DeviceNumber() ? cudaSuccess : cudaErrorInvalidValue;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount
               ? cuda_on_cpu::multiprocessors
               : static_cast<int>(cuda_on_cpu::shared_memory_per_block);
  return cudaSuccess;
}

inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = cuda_on_cpu::architecture;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute,
                                        int value) {
  const bool carveout = attribute == cudaFuncAttributePreferredSharedMemoryCarveout;
  if (value > (carveout ? 100 : cuda_on_cpu::shared_memory_per_block)) return cudaErrorInvalidValue;
  cuda_on_cpu::SetAttribute(kernel, attribute, value);
  return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* kernel,
                                                                 int, size_t shared_bytes) {
  if (static_cast<int64_t>(shared_bytes) > cuda_on_cpu::SharedMemoryAllowed(kernel)) {
    return cudaErrorInvalidValue;
  }
  *blocks = cuda_on_cpu::resident;
  return cudaSuccess;
}

inline cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                                  const cudaLaunchConfig_t*) {
  if (cuda_on_cpu::architecture < 90) return cudaErrorInvalidValue;
  *clusters = cuda_on_cpu::max_clusters;
  return cudaSuccess;
}

inline cudaError_t cudaGetLastError() { return cudaSuccess; }

enum cudaStreamCaptureMode { cudaStreamCaptureModeRelaxed };
inline cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) {
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

// All host memory counts as memory of this device.
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeDevice, cudaMemoryTypeManaged };

struct cudaPointerAttributes {
  cudaMemoryType type;
  int device;
};

inline cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void*) {
  *attributes = {cudaMemoryTypeDevice, cuda_on_cpu::DeviceNumber()};
  return cudaSuccess;
}

// All work is synchronous, so events have nothing to wait for.
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
