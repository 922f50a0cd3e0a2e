// Runs the CPU kernels in parallel when there is no framework to do it.
//
// An idle worker polls for 50 microseconds before it sleeps, because the passes of a kernel follow
// each other that closely, and waking a sleeping thread takes longer than most passes.

#ifndef TFWN_CSRC_THREAD_POOL_H_
#define TFWN_CSRC_THREAD_POOL_H_

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "weight_norm.h"

#if defined(__GLIBCXX__) && defined(__x86_64__)
// Binds std::condition_variable::wait to the symbol version that every libstdc++ has. GCC 12 added
// a newer one, with which the module would not load on slightly older systems.
__asm__(
    ".symver _ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,"
    "_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");
#endif

namespace tfwn {

class ThreadPool {
 public:
  // Calls task(0) ... task(n - 1), each on its own thread if the pool is free, or one after another
  // if it is busy. Returns when all are done.
  void Run(int n, const std::function<void(int)>& task) {
    std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) {
      for (int i = 0; i < n; ++i) task(i);
      return;
    }
    while (static_cast<int>(workers_.size()) < n - 1)
      workers_.push_back(std::make_unique<Worker>());
    Job job{&task, {n - 1}};
    for (int i = 1; i < n; ++i) workers_[i - 1]->Give(&job, i);
    task(0);
    while (job.left.load(std::memory_order_acquire) != 0) std::this_thread::yield();
  }

  // The process's pool. It is never destroyed, because its threads never end. A forked child
  // process gets a new pool, because it does not inherit the threads.
  static ThreadPool* Global() {
    static std::mutex mutex;
    static ThreadPool* pool = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
      pool = new ThreadPool;
      owner = getpid();
    }
    return pool;
  }

 private:
  struct Job {
    const std::function<void(int)>* task;
    std::atomic<int> left;
  };

  class Worker {
   public:
    Worker() {
      std::thread([this] {
        for (;;) Work();
      }).detach();
    }

    void Give(Job* job, int index) {
      index_ = index;
      job_.store(job);
      if (asleep_.load()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_one();
      }
    }

   private:
    void Work() {
      Job* job = nullptr;
      const auto patience = std::chrono::steady_clock::now() + std::chrono::microseconds(50);
      while ((job = job_.load()) == nullptr && std::chrono::steady_clock::now() < patience) {
        std::this_thread::yield();
      }
      if (job == nullptr) {
        std::unique_lock<std::mutex> lock(mutex_);
        // Sequentially consistent, as in Give, so that either this sees the job or Give sees
        // asleep_.
        asleep_.store(true);
        while ((job = job_.load()) == nullptr) wake_.wait(lock);
        asleep_.store(false);
      }
      const int index = index_;
      job_.store(nullptr);
      (*job->task)(index);
      job->left.fetch_sub(1, std::memory_order_release);  // the job may be gone from here on
    }

    std::atomic<Job*> job_{nullptr};
    int index_ = 0;
    std::atomic<bool> asleep_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
  };

  std::mutex mutex_;
  std::vector<std::unique_ptr<Worker>> workers_;
};

// Uses at most `threads` threads, and fewer if there is too little work for them.
inline cpu::ParallelFor ParallelForOn(int threads) {
  return [threads](int64_t n, int64_t bytes_per_task,
                   const std::function<void(int64_t, int64_t)>& body) {
    constexpr int64_t kBytesPerThread = 64 << 10;
    const double bytes = static_cast<double>(n) * static_cast<double>(bytes_per_task);
    const int64_t worthwhile = std::max<int64_t>(1, static_cast<int64_t>(bytes / kBytesPerThread));
    const int64_t pieces = std::min({static_cast<int64_t>(threads), n, worthwhile});
    if (pieces <= 1) {
      body(0, n);
      return;
    }
    ThreadPool::Global()->Run(static_cast<int>(pieces), [&](int i) {
      const int64_t each = n / pieces, more = n % pieces;
      const int64_t begin = i * each + std::min<int64_t>(i, more);
      body(begin, begin + each + (i < more ? 1 : 0));
    });
  };
}

}  // namespace tfwn

#endif  // TFWN_CSRC_THREAD_POOL_H_
