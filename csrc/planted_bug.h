// Bugs on purpose, compiled only in sanitizer builds. The tests check that the sanitizers report
// them.
#pragma once

#include <atomic>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace clsp {

// `kind` is "heap" (reads past an allocation), "overflow" (of a signed integer) or "race" (two
// threads write one variable). The result depends on the bug, so the compiler cannot remove it.
inline int planted_bug(const std::string& kind) {
  volatile int value = 2147483600;
  if (kind == "heap") {
    const std::vector<int> heap(static_cast<std::size_t>(value) % 10 + 1);
    const volatile int* const behind = heap.data() + heap.size();
    return *behind;
  }
  if (kind == "overflow") return value + static_cast<int>(kind.size()) * 10;
  if (kind != "race") throw std::invalid_argument("kind must be heap, overflow or race");
  int shared = 0;
  std::atomic<int> started{0};
  const auto write = [&] {
    for (++started; started < 2;) std::this_thread::yield();
    for (int i = 0; i < 1000; ++i) *const_cast<volatile int*>(&shared) = i;
  };
  std::thread other(write);
  write();
  other.join();
  return shared;
}

}  // namespace clsp
