#include "threads.h"

#include <algorithm>
#include <utility>

namespace clsp {

void for_each(std::size_t count, int threads, const std::function<void(std::size_t)>& work) {
  const std::size_t useful = std::min(count, static_cast<std::size_t>(std::max(threads, 1)));
  ThreadPool(static_cast<int>(useful)).for_each(count, work);
}

ThreadPool::ThreadPool(int threads) {
  if (threads < 2) return;
  try {
    // Without the reservation, growing the vector could fail and lose a running thread.
    helpers_.reserve(static_cast<std::size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { run_helper(); });
  } catch (const std::exception&) {
    // The system has no more threads or memory. The threads that started do the work.
  }
}

ThreadPool::~ThreadPool() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
  }
  step_begun_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void ThreadPool::for_each(std::size_t count, const std::function<void(std::size_t)>& work) {
  std::unique_lock<std::mutex> lock(mutex_);
  work_ = &work;
  count_ = count;
  next_ = finished_ = 0;
  if (count > 1) step_begun_.notify_all();
  take_work(lock);
  step_done_.wait(lock, [this] { return finished_ == count_; });
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Holds the lock except during the calls. To take the lock costs a fraction of a microsecond; a
// call takes thousands of times as long.
void ThreadPool::take_work(std::unique_lock<std::mutex>& lock) {
  while (next_ < count_) {
    const std::size_t i = next_++;
    const auto& work = *work_;
    lock.unlock();
    std::exception_ptr failure;
    try {
      work(i);
    } catch (...) {
      failure = std::current_exception();
    }
    lock.lock();
    if (failure && !failure_) failure_ = failure;
    if (++finished_ == count_) step_done_.notify_one();
  }
}

void ThreadPool::run_helper() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!closing_) {
    take_work(lock);
    step_begun_.wait(lock, [this] { return closing_ || next_ < count_; });
  }
}

}  // namespace clsp
