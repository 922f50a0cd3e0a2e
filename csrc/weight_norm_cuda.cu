// Forward and backward of weight normalization (weight_norm.h) on CUDA: chooses a plan
// (weight_norm_cuda_plan.h) and launches its kernels (weight_norm_cuda_kernels.h).
//
// There are no atomics, and the split of the work depends only on sizes, types, alignment and the
// device, so results are the same from run to run. Nothing here waits for the device, so calls can
// be captured in a CUDA graph. The kernels' limits are looked up only once, so a call costs little.

#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "weight_norm.h"
#include "weight_norm_cuda_kernels.h"
#include "weight_norm_cuda_plan.h"

namespace tfwn {
namespace cuda {
namespace {

// The limits of a kernel on one device.
struct Limits {
  int resident = 0;       // blocks per multiprocessor, with the shared memory of a single stage
  bool sm_90 = false;     // compiled for clusters and overlapping launches
  bool clusters = false;  // of the largest size, whatever memory their blocks need
};

struct Device {
  int number = 0;
  int multiprocessors = 0;
  int shared_memory = 0;  // per block, bytes
};

cudaError_t FindDevice(Device* device) {
  cudaError_t error = cudaGetDevice(&device->number);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->multiprocessors, cudaDevAttrMultiProcessorCount,
                                   device->number);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&device->shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device->number);
  }
  return error;
}

void SetCluster(int blocks, cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = static_cast<unsigned>(blocks);
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
}

cudaError_t LookUp(const void* kernel, const Device& device, int64_t ring_bytes, Limits* limits) {
  cudaFuncAttributes attributes = {};
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  // The limit applies to the kernel, not to a launch, and other threads may be launching it. So it
  // is set to the device's maximum.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 device.shared_memory);
  }
  // Shared memory gets as much of the L1 cache as possible, because elements bypass that cache.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&limits->resident, kernel, kThreads,
                                                          static_cast<size_t>(ring_bytes));
  }
  if (error != cudaSuccess) return error;
  limits->sm_90 = attributes.ptxVersion >= 90;
  if (limits->sm_90) {
    cudaLaunchAttribute cluster = {};
    SetCluster(kLargestCluster, &cluster);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(kLargestCluster);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = static_cast<size_t>(device.shared_memory);
    config.attrs = &cluster;
    config.numAttrs = 1;
    int clusters = 0;
    if (cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) != cudaSuccess) {
      cudaGetLastError();  // clears the error: a partition of a device may support none
      clusters = 0;
    }
    limits->clusters = clusters > 0;
  }
  return cudaSuccess;
}

// Looks up a kernel's limits once per device. The first time this loads the kernel, which a thread
// that is capturing a CUDA graph may do only in the relaxed mode.
cudaError_t LimitsOf(const void* kernel, const Device& device, int64_t ring_bytes, Limits* limits) {
  static std::mutex mutex;
  static auto* const known = new std::map<std::pair<const void*, int>, Limits>;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known->find({kernel, device.number});
  if (found != known->end()) {
    *limits = found->second;
    return cudaSuccess;
  }
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
  cudaError_t error = cudaThreadExchangeStreamCaptureMode(&mode);
  if (error != cudaSuccess) return error;
  error = LookUp(kernel, device, ring_bytes, limits);
  cudaThreadExchangeStreamCaptureMode(&mode);
  if (error == cudaSuccess) known->emplace(std::pair(kernel, device.number), *limits);
  return error;
}

// A forward or backward call.
struct Call {
  Work work;
  Type v_type, w_type;
};

using KernelPointer = void (*)(Work);

// The kernels of a call and their parameters, for one pair of types.
struct Launches {
  Problem problem;
  Work work;
  KernelPointer sum, scale, fused;
  bool overlap;  // the second launch may start while the first one runs
};

// The number of elements between a pointer and the vector boundary before it.
template <class T>
int Misalignment(const void* pointer, int vector) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(pointer) / sizeof(T) % vector);
}

// The type of w for which a sum is compiled. In the forward pass, w only determines the size of a
// vector and the type of the sum, so many pairs of types share a kernel.
template <class V, class W, bool kBackward>
using SummedWith = typename std::conditional<!kBackward && kVector<V, W> == kVector<V, V> &&
                                                 std::is_same<Real<V, W>, Real<V, V>>::value,
                                             V, W>::type;

template <class V, class W, bool kBackward, bool kColumns>
void ChooseKernels(Launches* launches) {
  launches->sum = Kernel<V, SummedWith<V, W, kBackward>, kBackward, Phase::kSum, kColumns>;
  launches->scale = Kernel<V, W, kBackward, Phase::kScale, kColumns>;
  launches->fused = Kernel<V, W, kBackward, Phase::kFused, kColumns>;
}

template <class V, class W, bool kBackward>
cudaError_t PlanTyped(const Call& call, Launches* launches) {
  constexpr int kVec = kVector<V, W>;
  using Result = typename std::conditional<kBackward, V, W>::type;
  Device device;
  cudaError_t error = FindDevice(&device);
  if (error != cudaSuccess) return error;

  Work work = call.work;
  work.layout = Collapse(work.layout);
  work.alignment = Misalignment<V>(work.v, kVec);
  work.vectors = Misalignment<Result>(work.result, kVec) == work.alignment &&
                 (!kBackward || Misalignment<W>(work.grad_w, kVec) == work.alignment);
  if (!work.vectors) work.alignment = 0;
  const bool columns = AsColumns(work.layout);
  const int64_t row = columns ? work.layout.units * work.layout.inner : work.layout.inner;
  work.ragged = work.alignment != 0 || row % kVec != 0;

  Problem& problem = launches->problem;
  problem.layout = work.layout;
  problem.vector = kVec;
  problem.v_bytes = sizeof(V);
  problem.read_bytes = sizeof(V) + (kBackward ? sizeof(W) : 0);
  problem.factors_bytes = sizeof(Factors<Real<V, W>>);
  problem.backward = kBackward;
  problem.ragged = work.ragged;
  problem.multiprocessors = std::max(1, device.multiprocessors);
  problem.shared_memory = device.shared_memory;

  if (columns) {
    ChooseKernels<V, W, kBackward, true>(launches);
  } else {
    ChooseKernels<V, W, kBackward, false>(launches);
  }
  Limits sum, scale, fused;
  for (const auto& [kernel, limits] :
       {std::pair(launches->sum, &sum), std::pair(launches->scale, &scale),
        std::pair(launches->fused, &fused)}) {
    error = LimitsOf(reinterpret_cast<const void*>(kernel), device, RingBytes(problem), limits);
    if (error != cudaSuccess) return error;
  }
  problem.resident = std::max(1, std::min(sum.resident, scale.resident));
  problem.cluster = fused.clusters ? kLargestCluster : 1;
  launches->overlap = sum.sm_90 && scale.sm_90;
  work.plan = MakePlan(problem);
  launches->work = work;
  return cudaSuccess;
}

template <class V, bool kBackward>
cudaError_t PlanV(const Call& call, Launches* launches) {
  switch (call.w_type) {
    case Type::kHalf:
      return PlanTyped<V, __half, kBackward>(call, launches);
    case Type::kBfloat16:
      return PlanTyped<V, __nv_bfloat16, kBackward>(call, launches);
    case Type::kFloat:
      return PlanTyped<V, float, kBackward>(call, launches);
    default:
      return PlanTyped<V, double, kBackward>(call, launches);
  }
}

template <bool kBackward>
cudaError_t MakeLaunches(const Call& call, Launches* launches) {
  switch (call.v_type) {
    case Type::kHalf:
      return PlanV<__half, kBackward>(call, launches);
    case Type::kBfloat16:
      return PlanV<__nv_bfloat16, kBackward>(call, launches);
    case Type::kFloat:
      return PlanV<float, kBackward>(call, launches);
    default:
      return PlanV<double, kBackward>(call, launches);
  }
}

cudaError_t Launch(Launches* launches, KernelPointer kernel, Phase phase, cudaStream_t stream) {
  Work& work = launches->work;
  const Plan& plan = work.plan;
  work.memory = SharedMemoryOf(launches->problem, plan, phase);
  work.parts = PartsOf(plan, phase);
  cudaLaunchAttribute attribute = {};
  cudaLaunchConfig_t config = {};
  const int64_t most = INT_MAX / plan.cluster * plan.cluster;
  config.gridDim = dim3(static_cast<unsigned>(std::min(plan.blocks(), most)));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = static_cast<size_t>(work.memory.bytes);
  config.stream = stream;
  config.attrs = &attribute;
  if (phase == Phase::kFused && plan.cluster > 1) {
    SetCluster(plan.cluster, &attribute);
    config.numAttrs = 1;
  } else if (phase == Phase::kScale && launches->overlap) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<const Work&>(work));
}

template <bool kBackward>
cudaError_t RunCall(const Call& call, void* scratch, cudaStream_t stream) {
  const Layout& layout = call.work.layout;
  if (layout.units == 0) return cudaSuccess;
  if (layout.size() == 0) {  // empty sums
    const Type type = kBackward ? call.work.g_type : call.work.norm_type;
    return cudaMemsetAsync(kBackward ? call.work.grad_g : call.work.norm, 0,
                           layout.units * SizeOf(type), stream);
  }
  Launches launches = {};
  cudaError_t error = MakeLaunches<kBackward>(call, &launches);
  if (error != cudaSuccess) return error;
  if (launches.work.plan.fused) return Launch(&launches, launches.fused, Phase::kFused, stream);
  launches.work.partials = static_cast<double*>(scratch);
  error = Launch(&launches, launches.sum, Phase::kSum, stream);
  if (error != cudaSuccess) return error;
  return Launch(&launches, launches.scale, Phase::kScale, stream);
}

Call CallOf(const Forward& a) {
  Call call = {};
  call.v_type = a.v_type;
  call.w_type = a.w_type;
  call.work.layout = a.layout;
  call.work.g_type = a.g_type;
  call.work.norm_type = NormType(a.v_type);
  call.work.v = a.v;
  call.work.g = a.g;
  call.work.result = a.w;
  call.work.norm = a.norm;
  return call;
}

Call CallOf(const Backward& a) {
  Call call = {};
  call.v_type = a.v_type;
  call.w_type = a.w_type;
  call.work.layout = a.layout;
  call.work.g_type = a.g_type;
  call.work.norm_type = NormType(a.v_type);
  call.work.grad_w = a.grad_w;
  call.work.v = a.v;
  call.work.g = a.g;
  call.work.norm = const_cast<void*>(a.norm);
  call.work.result = a.grad_v;
  call.work.grad_g = a.grad_g;
  return call;
}

}  // namespace

size_t ScratchBytes(const Layout& layout) {
  return static_cast<size_t>(MostPartials(layout)) * sizeof(double);
}

int Run(const Forward& a, void* scratch, void* stream) {
  return RunCall<false>(CallOf(a), scratch, static_cast<cudaStream_t>(stream));
}

int Run(const Backward& a, void* scratch, void* stream) {
  return RunCall<true>(CallOf(a), scratch, static_cast<cudaStream_t>(stream));
}

const char* ErrorString(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace cuda
}  // namespace tfwn
