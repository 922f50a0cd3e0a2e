// Runs a CUDA block's threads as fibers of one CPU thread (see cuda_runtime.h here).

#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <random>
#include <vector>

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
unsigned max_grid = 0x7fffffff;
uint64_t schedule = 0;
int64_t launches = 0;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = 64 << 10;

enum State { kRunning, kAtBlockBarrier, kAtWarpBarrier, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  double shuffled;
  void* sanitizer_stack = nullptr;
};

ucontext_t scheduler;
void* scheduler_sanitizer_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
std::vector<Fiber> fibers;
Fiber* running = nullptr;
const std::function<void()>* body = nullptr;
std::map<std::pair<const void*, int64_t>, int64_t> allowed;  // By kernel and device.

[[noreturn]] void Fail(const char* what) {
  std::printf("FAILED: CUDA: %s\n", what);
  std::fflush(stdout);
  std::abort();
}

// The address sanitizer has to be told of each change of stack.
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
  threadIdx = dim3(index);
  running->state = kRunning;
  Leave(&scheduler_sanitizer_stack, running->stack.get(), kStackBytes);
  swapcontext(&scheduler, &running->context);
  Arrive(scheduler_sanitizer_stack, nullptr, nullptr);
}

unsigned Count(State state, unsigned begin, unsigned end) {
  return static_cast<unsigned>(std::count_if(fibers.begin() + begin, fibers.begin() + end,
                                             [&](const Fiber& f) { return f.state == state; }));
}

void RunBlock(std::mt19937_64* random) {
  const unsigned threads = blockDim.x;
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    fiber.state = kRunning;
    fiber.sanitizer_stack = nullptr;
    makecontext(&fiber.context, Main, 0);
  }
  std::vector<unsigned> order(threads);
  for (unsigned i = 0; i < threads; ++i) order[i] = i;
  while (Count(kDone, 0, threads) < threads) {
    std::shuffle(order.begin(), order.end(), *random);
    for (const unsigned i : order) {
      if (fibers[i].state == kRunning) RunFiber(i);
    }
    // A barrier opens once all have come to it.
    bool opened = false;
    for (unsigned begin = 0; begin < threads; begin += kWarp) {
      const unsigned end = std::min(threads, begin + kWarp);
      if (Count(kAtWarpBarrier, begin, end) != end - begin) continue;
      for (unsigned i = begin; i < end; ++i) fibers[i].state = kRunning;
      opened = true;
    }
    if (Count(kAtBlockBarrier, 0, threads) == threads) {
      for (Fiber& fiber : fibers) fiber.state = kRunning;
      opened = true;
    }
    if (!opened && Count(kDone, 0, threads) < threads) Fail("a barrier that not all threads reach");
  }
}

}  // namespace

void AllowSharedMemory(const void* kernel, int64_t bytes) {
  const auto found = allowed.emplace(std::pair(kernel, shared_memory_per_block), bytes).first;
  if (found->second != bytes) Fail("a kernel's limit of shared memory is changed");
}

int64_t SharedMemoryAllowed(const void* kernel) {
  const auto found = allowed.find({kernel, shared_memory_per_block});
  return std::max<int64_t>(48 << 10, found == allowed.end() ? 0 : found->second);
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
  if (config.gridDim.x == 0 || config.gridDim.x > 0x7fffffff || config.blockDim.x == 0 ||
      config.blockDim.x > 1024) {
    return cudaErrorInvalidValue;
  }
  ++launches;
  std::mt19937_64 random(schedule++);
  gridDim = dim3(std::min(config.gridDim.x, max_grid));
  blockDim = config.blockDim;
  if (fibers.size() != blockDim.x) {
    fibers.clear();
    fibers = std::vector<Fiber>(blockDim.x);
  }
  body = &thread;
  using tfwn::cuda::kSharedBytes;
  using tfwn::cuda::shared_memory;
  std::vector<unsigned> blocks(gridDim.x);
  for (unsigned i = 0; i < gridDim.x; ++i) blocks[i] = i;
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const unsigned block : blocks) {
    std::memset(shared_memory, 0xff, kSharedBytes);  // NaN, were it used without being set
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(shared_memory + config.dynamicSmemBytes,
                              kSharedBytes - config.dynamicSmemBytes);
#endif
    blockIdx = dim3(block);
    RunBlock(&random);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(shared_memory, kSharedBytes);
#else
    for (size_t i = config.dynamicSmemBytes; i < kSharedBytes; ++i) {
      if (shared_memory[i] != '\xff') Fail("a write beyond the shared memory asked for");
    }
#endif
  }
  return cudaSuccess;
}

}  // namespace cuda_on_cpu

void __syncthreads() { cuda_on_cpu::Yield(cuda_on_cpu::kAtBlockBarrier); }
