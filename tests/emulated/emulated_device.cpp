#include "emulated_device.hpp"

#include <cstdlib>
#include <cstring>
#include <ctime>
#include <new>
#include <stdexcept>
#include <vector>

#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/libraries.hpp"

namespace orrery::kernels {

namespace cuda {

void check(cudaError_t result, const char* what) {
  if (result != cudaSuccess) throw std::runtime_error(what);
}

void launch(const Gemm&, const LaunchContext&) {
  throw std::logic_error("no products in the emulator");
}
void launch(const AttentionForward&, const LaunchContext&) {
  throw std::logic_error("no attention in the emulator");
}
void launch(const AttentionBackward&, const LaunchContext&) {
  throw std::logic_error("no attention in the emulator");
}

}  // namespace cuda

namespace {

constexpr std::size_t kWorkspaceBytes = std::size_t{4} << 20U;

class EmulatedDevice final : public Device {
 public:
  EmulatedDevice(int sms, bool backwards)
      : sms_(sms), backwards_(backwards), workspace_(kWorkspaceBytes) {}

  std::string name() const override { return "emulated GPU"; }
  int sms() const override { return sms_; }

  void* allocate(std::size_t bytes) override {
    void* const memory = std::aligned_alloc(256, (bytes + 255) / 256 * 256 + 256);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
  }
  void release(void* memory) override { std::free(memory); }
  void upload(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }

  StreamHandle create_stream() override { return {streams_++}; }
  EventHandle create_event() override {
    reached_ns_.push_back(0);
    return {static_cast<int>(reached_ns_.size()) - 1};
  }

  void enqueue(StreamHandle, const Call& call, int sms) override {
    // What a kernel finds in its workspace is anything.
    std::memset(workspace_.data(), 0xa5, workspace_.size());
    const cuda::LaunchContext context{
        .sms = sms > 0 && sms < sms_ ? sms : sms_,
        .limits = {.sms = sms_,
                   .shared_bytes_per_block = 232'448,  // of Hopper
                   .l2_bytes = std::size_t{50} << 20U,
                   .compute_capability = 90},
        .workspace = workspace_.data(),
        .workspace_bytes = workspace_.size(),
        .libraries = &libraries_,
    };
    emulator::backwards = backwards_;
    std::visit([&](const auto& c) { cuda::launch(c, context); }, call);
  }
  void enqueue_host(StreamHandle, std::function<void()> work) override { work(); }
  void enqueue_copy_from(StreamHandle, void* to, const Device&, const void* from,
                         std::size_t bytes) override {
    std::memcpy(to, from, bytes);
  }
  bool reached(EventHandle) const override { return true; }
  void record(StreamHandle, EventHandle event) override {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    reached_ns_.at(static_cast<std::size_t>(event.index)) =
        static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
  }
  void wait(StreamHandle, EventHandle) override {}

  void synchronize() override {}
  std::int64_t reached_ns(EventHandle event) const override {
    return reached_ns_.at(static_cast<std::size_t>(event.index));
  }
  void flush_cache(StreamHandle) override {}

 private:
  int sms_;
  bool backwards_;
  std::vector<unsigned char> workspace_;
  cuda::Libraries libraries_;
  int streams_ = 0;
  std::vector<std::int64_t> reached_ns_;
};

}  // namespace

std::unique_ptr<Device> open_emulated_device(int sms, bool backwards) {
  return std::make_unique<EmulatedDevice>(sms, backwards);
}

}  // namespace orrery::kernels
