// Distributes work over threads.
//
// Threads end with the call into the engine that started them. A fork() between calls therefore
// cannot break them, and an exiting interpreter need not stop them. Threads that stay between calls
// would save about 10 us a call (docs/log.md).
#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace clsp {

// Calls work(0) .. work(count - 1), each once, from at most `threads` threads. Returns when all
// calls are done. Rethrows the first exception.
void for_each(std::size_t count, int threads, const std::function<void(std::size_t)>& work);

// Threads for several steps of work, one step after the other.
//
// A step ends when all of its calls are done, even if some threads made none of them. On a busy
// machine, a thread therefore delays a step only if it loses the CPU in the middle of a call.
// Waiting threads sleep, which leaves the CPU to the others.
class ThreadPool {
 public:
  // Starts threads - 1 threads; the calling thread works too. Starts fewer threads if the system
  // has no more.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Runs one step, like clsp::for_each(). Only the thread that made the pool may call it.
  void for_each(std::size_t count, const std::function<void(std::size_t)>& work);

 private:
  void take_work(std::unique_lock<std::mutex>& lock);
  void run_helper();

  std::mutex mutex_;  // guards all members below except `helpers_`
  std::condition_variable step_begun_, step_done_;
  const std::function<void(std::size_t)>* work_ = nullptr;
  std::size_t count_ = 0, next_ = 0, finished_ = 0;
  bool closing_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> helpers_;
};

}  // namespace clsp
