// Views of memory, uninitialised arrays, and sizes that are checked for overflow.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

namespace clsp {

// A view of `size` elements, which it does not own.
template <class T>
class Span {
 public:
  Span() = default;
  Span(T* data, std::size_t size) : data_(data), size_(size) {}
  template <class U>
  Span(const Span<U>& other) : data_(other.data()), size_(other.size()) {}

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T& operator[](std::size_t i) const { return data_[i]; }
  T* begin() const { return data_; }
  T* end() const { return data_ + size_; }
  Span subspan(std::size_t first, std::size_t count) const {
    if (first > size_ || count > size_ - first) throw std::out_of_range("Span::subspan");
    return Span(data_ + first, count);
  }

 private:
  T* data_ = nullptr;
  std::size_t size_ = 0;
};

inline std::size_t checked_multiply(std::size_t a, std::size_t b) {
  if (b != 0 && a > std::numeric_limits<std::size_t>::max() / b) throw std::bad_alloc();
  return a * b;
}

inline std::size_t checked_size(std::uint64_t value) {
  if (value > std::numeric_limits<std::size_t>::max()) throw std::bad_alloc();
  return static_cast<std::size_t>(value);
}

// A resizable float array. It is not initialised, because every caller writes all of it.
class Samples {
 public:
  Samples() = default;
  explicit Samples(std::size_t size) : size_(size) {
    if (size == 0) return;
    data_.reset(static_cast<float*>(std::malloc(checked_multiply(size, sizeof(float)))));
    if (!data_) throw std::bad_alloc();
  }
  // Keeps the first samples; added samples are not initialised.
  void resize(std::size_t size) {
    if (size == 0) {
      data_.reset();
    } else {
      void* moved = std::realloc(data_.get(), checked_multiply(size, sizeof(float)));
      if (moved == nullptr) throw std::bad_alloc();
      static_cast<void>(data_.release());
      data_.reset(static_cast<float*>(moved));
    }
    size_ = size;
  }
  float* data() const { return data_.get(); }
  std::size_t size() const { return size_; }
  Span<const float> view() const { return {data_.get(), size_}; }
  Span<float> span() { return {data_.get(), size_}; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float[], Free> data_;
  std::size_t size_ = 0;
};

// An array of fixed size, aligned to a cache line and not initialised.
template <class T>
class Buffer {
 public:
  explicit Buffer(std::size_t size)
      : data_(static_cast<T*>(::operator new(checked_multiply(size, sizeof(T)), kCacheLine))) {}
  ~Buffer() { ::operator delete(data_, kCacheLine); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  const T* data() const { return data_; }

 private:
  static constexpr std::align_val_t kCacheLine{64};
  T* data_;
};

}  // namespace clsp
