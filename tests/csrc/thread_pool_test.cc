// Checks that tfwn.native's thread pool runs every task exactly once, even after its workers have
// slept and with several callers at once. Meant for the thread sanitizer (see sanitize.sh).

#include "thread_pool.h"

#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

namespace {

bool failed = false;

// Adds 1 to each of n counters, `times` times. This needs no lock because no two threads share a
// counter.
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
      Check(CountInParallel(threads, n, 200), "a task did not run exactly once");
    }
  }
  for (int i = 0; i < 20; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    Check(CountInParallel(4, 100, 1), "a task did not run exactly once after a pause");
  }
  std::vector<std::thread> callers;
  std::vector<char> right(4);
  for (size_t i = 0; i < right.size(); ++i) {
    callers.emplace_back([&right, i] { right[i] = CountInParallel(3, 50, 300); });
  }
  for (std::thread& caller : callers) caller.join();
  for (const char ok : right) Check(ok, "a task of several callers did not run exactly once");
  std::printf(failed ? "failed\n" : "passed\n");
  return failed;
}
