// Runs the threads of a CUDA block as fibers of one CPU thread (see cuda_runtime.h in this folder).

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <tuple>
#include <vector>

#include "cooperative_groups.h"
#include "cuda_pipeline_primitives.h"
#include "cuda_runtime.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace tfwn {
namespace cuda {
constexpr size_t kSharedBytes = 256 << 10;
alignas(256) char shared_memory[kSharedBytes];
}  // namespace cuda
}  // namespace tfwn

namespace cuda_on_cpu {

int64_t shared_memory_per_block = 227 << 10;
int multiprocessors = 132;
int architecture = 90;
int resident = 4;
int max_clusters = 16;
unsigned max_grid = 0x7fffffff;
uint64_t schedule = 0;
void* left_by_launch = nullptr;
size_t left_by_launch_bytes = 0;
int64_t launches = 0, cluster_launches = 0, overlapping_launches = 0;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

enum State { kRunning, kAtBlockBarrier, kAtWarpBarrier, kAtClusterBarrier, kAtLaunch, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  double shuffled;
  bool arrived;                           // arrived at a cluster barrier, but not yet waited
  int64_t phase;                          // of that cluster barrier on arrival
  std::vector<std::vector<Copy>> copies;  // by group; the last group is still open
  void* sanitizer_stack = nullptr;
};

ucontext_t scheduler;
void* scheduler_sanitizer_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
std::vector<Fiber> fibers;  // the threads of the cluster, block by block
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::map<std::tuple<const void*, int, cudaFuncAttribute>, int64_t> attributes;
// The shared memory of each block in the cluster. That of the block that runs, `current`, is in
// tfwn::cuda::shared_memory instead.
std::vector<std::vector<char>> memories;
unsigned cluster = 1, current = 0, first_block = 0;
size_t shared_bytes = 0;
int64_t cluster_phase = 0, cluster_arrivals = 0;
bool overlapping = false, waited_for_launch = false;
std::vector<char> left;  // the true contents of left_by_launch while that is NaN

[[noreturn]] void Fail(const char* what) {
  std::printf("FAILED: CUDA: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

// The address sanitizer must be notified of every stack switch.
void Leave(void** save, const void* stack, size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, stack, bytes);
#else
  (void)save, (void)stack, (void)bytes;
#endif
}

void Arrive(void* saved, const void** from, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, from, bytes);
#else
  (void)saved, (void)from, (void)bytes;
#endif
}

void Yield(State state) {
  running->state = state;
  Leave(state == kDone ? nullptr : &running->sanitizer_stack, scheduler_stack,
        scheduler_stack_bytes);
  Fiber* const self = running;
  swapcontext(&self->context, &scheduler);
  Arrive(self->sanitizer_stack, nullptr, nullptr);
}

void Main() {
  Arrive(nullptr, &scheduler_stack, &scheduler_stack_bytes);
  (*body)();
  Yield(kDone);
}

void RunFiber(unsigned index) {
  running = &fibers[index];
  threadIdx = dim3(index % blockDim.x);
  running->state = kRunning;
  Leave(&scheduler_sanitizer_stack, running->stack.get(), kStackBytes);
  swapcontext(&scheduler, &running->context);
  Arrive(scheduler_sanitizer_stack, nullptr, nullptr);
}

unsigned Count(State state, unsigned begin, unsigned end) {
  return static_cast<unsigned>(std::count_if(fibers.begin() + begin, fibers.begin() + end,
                                             [&](const Fiber& f) { return f.state == state; }));
}

// Opens a barrier if all fibers in [begin, end) have reached it, and returns whether they have.
bool Open(State barrier, unsigned begin, unsigned end) {
  if (Count(barrier, begin, end) != end - begin) return false;
  for (unsigned i = begin; i < end; ++i) fibers[i].state = kRunning;
  return true;
}

// Runs a block's fibers until each is done or waits for the rest of the cluster.
void RunBlock(unsigned rank, std::mt19937_64* random) {
  const unsigned threads = blockDim.x, first = rank * threads, last = first + threads;
  blockIdx = dim3(first_block + rank);
  current = rank;
  std::memcpy(tfwn::cuda::shared_memory, memories[rank].data(), shared_bytes);
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = first + i;
  for (bool opened = true; opened;) {
    std::shuffle(order.begin(), order.end(), *random);
    for (const unsigned i : order) {
      if (fibers[i].state == kRunning) RunFiber(i);
    }
    opened = false;
    for (unsigned begin = first; begin < last; begin += kWarp) {
      opened |= Open(kAtWarpBarrier, begin, std::min(last, begin + kWarp));
    }
    opened |= Open(kAtBlockBarrier, first, last);
  }
  std::memcpy(memories[rank].data(), tfwn::cuda::shared_memory, shared_bytes);
}

void RunCluster(std::mt19937_64* random) {
  const unsigned all = cluster * blockDim.x;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.state = kRunning;
    fiber.arrived = false;
    fiber.copies.assign(1, {});
    fiber.sanitizer_stack = nullptr;
    makecontext(&fiber.context, Main, 0);
  }
  // Filled with NaN to expose reads of memory that was never written.
  memories.assign(cluster, std::vector<char>(shared_bytes, '\xff'));
  cluster_phase = cluster_arrivals = 0;
  waited_for_launch = !overlapping;
  if (overlapping) std::memset(left_by_launch, 0xff, left_by_launch_bytes);
  std::vector<unsigned> ranks(cluster);
  for (unsigned i = 0; i < cluster; ++i) ranks[i] = i;
  while (Count(kDone, 0, all) < all) {
    std::shuffle(ranks.begin(), ranks.end(), *random);
    for (const unsigned rank : ranks) RunBlock(rank, random);
    bool opened = false;
    for (Fiber& fiber : fibers) {
      if (fiber.state != kAtClusterBarrier || fiber.phase == cluster_phase) continue;
      fiber.state = kRunning;
      opened = true;
    }
    if (Open(kAtLaunch, 0, all)) {
      std::memcpy(left_by_launch, left.data(), left.size());
      waited_for_launch = opened = true;
    }
    if (!opened && Count(kDone, 0, all) < all) Fail("not all threads reached a barrier");
  }
  if (!waited_for_launch) Fail("an overlapping launch did not wait for the previous launch");
  for (const Fiber& fiber : fibers) {
    if (fiber.arrived) Fail("a thread arrived at a cluster barrier but did not wait");
  }
}

}  // namespace

int DeviceNumber() {
  static std::map<std::tuple<int64_t, int, int, int, int>, int> numbers;
  const std::tuple device(shared_memory_per_block, multiprocessors, architecture, resident,
                          max_clusters);
  return numbers.emplace(device, static_cast<int>(numbers.size())).first->second;
}

void SetAttribute(const void* kernel, cudaFuncAttribute attribute, int64_t value) {
  if (!attributes.emplace(std::tuple(kernel, DeviceNumber(), attribute), value).second) {
    Fail("a kernel attribute was set twice");
  }
}

int64_t SharedMemoryAllowed(const void* kernel) {
  const auto found =
      attributes.find({kernel, DeviceNumber(), cudaFuncAttributeMaxDynamicSharedMemorySize});
  return std::max<int64_t>(48 << 10, found == attributes.end() ? 0 : found->second);
}

double ShuffleXor(double value, int lane_mask) {
  Fiber* const self = running;
  self->shuffled = value;
  Yield(kAtWarpBarrier);
  const double result = fibers[static_cast<size_t>(self - fibers.data()) ^ lane_mask].shuffled;
  Yield(kAtWarpBarrier);
  return result;
}

cudaError_t LaunchBlocks(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  using tfwn::cuda::kSharedBytes;
  using tfwn::cuda::shared_memory;
  cluster = 1;
  overlapping = false;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (architecture < 90) Fail("a launch attribute that the device does not support");
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster = config.attrs[i].val.clusterDim.x;
    } else {
      overlapping = config.attrs[i].val.programmaticStreamSerializationAllowed != 0;
    }
  }
  if (config.gridDim.x == 0 || config.gridDim.x > 0x7fffffff || config.blockDim.x == 0 ||
      config.blockDim.x > 1024 || cluster == 0 || cluster > 8 || config.gridDim.x % cluster != 0) {
    return cudaErrorInvalidValue;
  }
  ++launches;
  cluster_launches += cluster > 1;
  overlapping_launches += overlapping;
  std::mt19937_64 random(schedule++);
  gridDim = dim3(std::min(config.gridDim.x, (max_grid + cluster - 1) / cluster * cluster));
  blockDim = config.blockDim;
  shared_bytes = config.dynamicSmemBytes;
  if (fibers.size() != cluster * blockDim.x) {
    fibers.clear();
    fibers = std::vector<Fiber>(cluster * blockDim.x);
  }
  body = &thread;
  if (overlapping) {
    const char* const bytes = static_cast<const char*>(left_by_launch);
    left.assign(bytes, bytes + left_by_launch_bytes);
  }
  std::vector<unsigned> clusters(gridDim.x / cluster);
  for (unsigned i = 0; i < clusters.size(); ++i) clusters[i] = i;
  std::shuffle(clusters.begin(), clusters.end(), random);
  std::memset(shared_memory, 0xff, kSharedBytes);
#if defined(__SANITIZE_ADDRESS__)
  ASAN_POISON_MEMORY_REGION(shared_memory + shared_bytes, kSharedBytes - shared_bytes);
#endif
  for (const unsigned number : clusters) {
    first_block = number * cluster;
    RunCluster(&random);
  }
#if defined(__SANITIZE_ADDRESS__)
  ASAN_UNPOISON_MEMORY_REGION(shared_memory, kSharedBytes);
#else
  for (size_t i = shared_bytes; i < kSharedBytes; ++i) {
    if (shared_memory[i] != '\xff') Fail("a write beyond the requested shared memory");
  }
#endif
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

using cuda_on_cpu::Copy;
using cuda_on_cpu::Fail;
using cuda_on_cpu::running;

void __syncthreads() { cuda_on_cpu::Yield(cuda_on_cpu::kAtBlockBarrier); }

void cooperative_groups::cluster_group::barrier_arrive() {
  if (cuda_on_cpu::architecture < 90) Fail("a cluster barrier on a device without clusters");
  if (running->arrived) Fail("a thread arrived at a cluster barrier twice");
  running->arrived = true;
  running->phase = cuda_on_cpu::cluster_phase;
  const size_t all = cuda_on_cpu::fibers.size();
  if (static_cast<size_t>(++cuda_on_cpu::cluster_arrivals) < all) return;
  cuda_on_cpu::cluster_arrivals = 0;
  ++cuda_on_cpu::cluster_phase;
}

void cooperative_groups::cluster_group::barrier_wait() {
  if (!running->arrived) Fail("a thread waited at a cluster barrier before arriving there");
  if (running->phase == cuda_on_cpu::cluster_phase) {
    cuda_on_cpu::Yield(cuda_on_cpu::kAtClusterBarrier);
  }
  running->arrived = false;
}

const void* cooperative_groups::cluster_group::MapSharedRank(const void* shared, int rank_number) {
  const unsigned rank = static_cast<unsigned>(rank_number);
  if (rank >= cuda_on_cpu::cluster) Fail("access to a block outside the cluster");
  if (rank == cuda_on_cpu::current) return shared;
  const unsigned first = rank * blockDim.x;
  if (cuda_on_cpu::Count(cuda_on_cpu::kDone, first, first + blockDim.x) > 0) {
    Fail("access to the shared memory of a block that has ended");
  }
  const auto at = static_cast<const char*>(shared) - tfwn::cuda::shared_memory;
  return cuda_on_cpu::memories[rank].data() + at;
}

void cudaGridDependencySynchronize() {
  if (cuda_on_cpu::architecture < 90) return;
  if (!cuda_on_cpu::waited_for_launch) cuda_on_cpu::Yield(cuda_on_cpu::kAtLaunch);
}

void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  const auto aligned = [&](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  if ((bytes != 4 && bytes != 8 && bytes != 16) || !aligned(to) || !aligned(from)) {
    Fail("an asynchronous copy of invalid size or alignment");
  }
  std::memset(to, 0xff, bytes);
  running->copies.back().push_back({to, from, bytes});
}

void __pipeline_commit() { running->copies.emplace_back(); }

void __pipeline_wait_prior(size_t groups) {
  auto& copies = running->copies;
  const size_t done = copies.size() - 1 > groups ? copies.size() - 1 - groups : 0;
  for (size_t i = 0; i < done; ++i) {
    for (const Copy& copy : copies[i]) std::memcpy(copy.to, copy.from, copy.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<std::ptrdiff_t>(done));
}
