// Registers a CUDA device that does nothing, for tests of a CPU build of torch. Autograd needs a
// device guard for the device of its tensors, and copies need page-locked memory.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <new>

namespace {

const c10::Device kCard(c10::DeviceType::CUDA, 0);

struct Guard final : public c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::DeviceType::CUDA; }
  c10::Device exchangeDevice(c10::Device) const override { return kCard; }
  c10::Device getDevice() const override { return kCard; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, kCard);
  }
  c10::Stream exchangeStream(c10::Stream) const override { return getStream(kCard); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
};

// Ordinary memory whose addresses are remembered, so that Tensor.is_pinned() knows them.
class PinnedMemory final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    void* start = bytes == 0 ? nullptr : std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (bytes != 0 && start == nullptr) throw std::bad_alloc();
    if (start != nullptr) {
      const std::lock_guard<std::mutex> lock(mutex_);
      sizes_[static_cast<char*>(start)] = bytes;
    }
    return {start, start, &PinnedMemory::release, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &PinnedMemory::release; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  bool holds(const void* address) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto* at = static_cast<const char*>(address);
    auto next = sizes_.upper_bound(const_cast<char*>(at));
    if (next == sizes_.begin()) return false;
    --next;
    return at < next->first + next->second;
  }
  static PinnedMemory& instance() {
    static auto* memory = new PinnedMemory;  // never destroyed: tensors may outlive static objects
    return *memory;
  }

 private:
  static void release(void* start) {
    if (start == nullptr) return;
    const std::lock_guard<std::mutex> lock(instance().mutex_);
    instance().sizes_.erase(static_cast<char*>(start));
    std::free(start);
  }
  std::mutex mutex_;
  std::map<char*, size_t> sizes_;
};

struct Hooks final : public at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &PinnedMemory::instance(); }
  bool isPinnedPtr(const void* address) const override {
    return PinnedMemory::instance().holds(address);
  }
};

c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new Guard);
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)

}  // namespace
