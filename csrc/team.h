// Threads that share the work of several steps, one step after the other.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace clsp {

// Threads live as long as their team, and a team as long as a call into the engine: nothing is left
// behind that a fork() could break or an exiting interpreter would have to end.
//
// A step ends when all of its work is done. A thread without work is not waited for, so on a busy
// machine a thread that has no CPU delays a step only if it lost its CPU in the middle of a unit
// of work. Whoever waits sleeps, which leaves the CPU to a thread of the team that has none.
class Team {
 public:
  // Of `threads` threads, the calling one included; of less, where the system has no more to give.
  explicit Team(int threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  // Calls work(0) .. work(count - 1), each once, and returns when all are done; the first exception
  // is thrown again. To be called by the thread that made the team.
  void for_each(std::size_t count, const std::function<void(std::size_t)>& work);

 private:
  void work_on(std::unique_lock<std::mutex>& lock);
  void help();

  std::mutex mutex_;  // guards all that follows but the threads
  std::condition_variable begun_, done_;
  const std::function<void(std::size_t)>* work_ = nullptr;
  std::size_t count_ = 0, next_ = 0, finished_ = 0;
  bool over_ = false;
  std::exception_ptr failure_;
  std::vector<std::thread> helpers_;
};

}  // namespace clsp
