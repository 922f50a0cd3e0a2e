// The thread pool of tfwn.native: every task runs once, after the workers have slept too, and from
// several callers at once. For the thread sanitizer (see sanitize.sh).

#include "thread_pool.h"

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

bool failed = false;

// Adds 1 to each of n counters, `times` times: without a lock, since no two threads share any.
bool CountInParallel(int threads, int64_t n, int times) {
  std::vector<int> counts(n);
  const auto parallel_for = tfwn::ParallelForOn(threads);
  for (int i = 0; i < times; ++i) {
    parallel_for(n, 1 << 20, [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) ++counts[k];
    });
  }
  for (const int count : counts) {
    if (count != times) return false;
  }
  return true;
}

void Check(bool condition, const char* what) {
  if (condition) return;
  std::printf("FAILED: %s\n", what);
  failed = true;
}

}  // namespace

int main() {
  for (const int threads : {1, 2, 3, 8}) {
    for (const int64_t n : {0, 1, 2, 7, 1000}) {
      Check(CountInParallel(threads, n, 200), "a task ran not once");
    }
  }
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    Check(CountInParallel(4, 100, 1), "a task ran not once after a pause");
  }
  std::vector<std::thread> callers;
  std::vector<char> right(4);
  for (size_t i = 0; i < right.size(); ++i) {
    callers.emplace_back([&right, i] { right[i] = CountInParallel(3, 50, 300); });
  }
  for (std::thread& caller : callers) caller.join();
  for (const char ok : right) Check(ok, "a task ran not once among several callers");
  std::printf(failed ? "failed\n" : "passed\n");
  return failed;
}
