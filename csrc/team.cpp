#include "team.h"

#include <utility>

namespace clsp {

Team::Team(int threads) {
  if (threads < 2) return;
  try {
    helpers_.reserve(static_cast<std::size_t>(threads - 1));  // what grows later could lose threads
    for (int i = 1; i < threads; ++i) helpers_.emplace_back([this] { help(); });
  } catch (const std::exception&) {
    // The system has no more threads, or memory, to give: those that started and this one go on.
  }
}

Team::~Team() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    over_ = true;
  }
  begun_.notify_all();
  for (std::thread& helper : helpers_) helper.join();
}

void Team::for_each(std::size_t count, const std::function<void(std::size_t)>& work) {
  std::unique_lock<std::mutex> lock(mutex_);
  work_ = &work;
  count_ = count;
  next_ = finished_ = 0;
  if (count > 1) begun_.notify_all();
  work_on(lock);
  done_.wait(lock, [this] { return finished_ == count_; });
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

// Holds the lock but for the work itself. Taking a unit costs a fraction of a microsecond, and
// units are thousands of times as long.
void Team::work_on(std::unique_lock<std::mutex>& lock) {
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
    if (++finished_ == count_) done_.notify_one();
  }
}

void Team::help() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (!over_) {
    work_on(lock);
    begun_.wait(lock, [this] { return over_ || next_ < count_; });
  }
}

}  // namespace clsp
