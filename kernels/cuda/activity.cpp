// Kernel records by CUPTI's activity interface. CUPTI hands buffers out on threads of its own and
// puts records into them in any order; a launch's external id comes in a record that goes before
// that of the API call, with the call's correlation id, which its kernels have too.

#include "kernels/cuda/activity.hpp"

#include <cuda_runtime_api.h>
#include <cupti.h>

#include <algorithm>
#include <cstdlib>
#include <ctime>
#include <mutex>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <utility>

#include "kernels/cuda/counters.hpp"

namespace orrery::kernels::cuda {
namespace {

constexpr std::size_t kBufferBytes = std::size_t{4} << 20U;
constexpr std::size_t kBufferAlignment = 8;  // cupti_activity.h, ACTIVITY_RECORD_ALIGNMENT

/// API records are not read, but without them there are no external ids.
constexpr CUpti_ActivityKind kKinds[] = {
    CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL,
    CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION,
    CUPTI_ACTIVITY_KIND_RUNTIME,
    CUPTI_ACTIVITY_KIND_DRIVER,
};
constexpr auto kExternalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;

class Activity final : public Profiler {
 public:
  void begin() override {
    {
      const std::lock_guard lock(mutex_);
      if (recording_) throw std::logic_error("the profiler is recording already");
      records_.clear();
      external_ids_.clear();
      lost_ = 0;
      unreadable_ = false;
    }
    if (!registered_) {
      // GPU times are then interpolated to this clock (cupti_activity.h); before any kind is
      // enabled.
      check(cuptiActivityRegisterTimestampCallback(monotonic_ns), "CUPTI's clock");
      check(cuptiActivityRegisterCallbacks(give_buffer, take_buffer), "CUPTI's buffers");
      registered_ = true;
    }
    for (const CUpti_ActivityKind kind : kKinds) {
      const CUptiResult enabled = cuptiActivityEnable(kind);
      if (enabled != CUPTI_SUCCESS) {
        disable();
        check(enabled, "recording kernels by CUPTI");
      }
    }
    recording_ = true;
  }

  void push_external(std::uint64_t id) override {
    if (recording_) {
      check(cuptiActivityPushExternalCorrelationId(kExternalKind, id), "CUPTI's external id");
    }
  }
  void pop_external() override {
    if (recording_) {
      check(cuptiActivityPopExternalCorrelationId(kExternalKind, nullptr), "CUPTI's external id");
    }
  }

  std::vector<KernelRecord> collect() override {
    if (!recording_) throw std::logic_error("the profiler is not recording");
    const cudaError_t synchronised = cudaDeviceSynchronize();
    recording_ = false;
    disable();
    check(cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED), "the rest of CUPTI's records");
    if (synchronised != cudaSuccess) {
      throw std::runtime_error(std::string("a kernel failed while it was recorded: ") +
                               cudaGetErrorString(synchronised));
    }
    const std::lock_guard lock(mutex_);
    if (lost_ > 0) {
      throw std::runtime_error("CUPTI lost " + std::to_string(lost_) + " records");
    }
    if (unreadable_) throw std::runtime_error("CUPTI gave a buffer that it cannot read itself");
    std::vector<KernelRecord> kernels;
    kernels.reserve(records_.size());
    for (auto& [correlation, record] : records_) {
      if (const auto id = external_ids_.find(correlation); id != external_ids_.end()) {
        record.external_id = id->second;
      }
      kernels.push_back(std::move(record));
    }
    records_.clear();
    std::stable_sort(kernels.begin(), kernels.end(), [](const auto& a, const auto& b) {
      return std::pair(a.start_ns, a.end_ns) < std::pair(b.start_ns, b.end_ns);
    });
    return kernels;
  }

  std::vector<double> count(const std::vector<std::string>& metrics,
                            const std::function<void()>& work) override {
    if (recording_) throw std::logic_error("the profiler is recording kernels");
    return count_on_this_device(metrics, work);
  }

 private:
  static void disable() {
    for (const CUpti_ActivityKind kind : kKinds) cuptiActivityDisable(kind);
  }

  static std::uint64_t CUPTIAPI monotonic_ns() {
    timespec now{};
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<std::uint64_t>(now.tv_sec) * 1'000'000'000U +
           static_cast<std::uint64_t>(now.tv_nsec);
  }

  static void CUPTIAPI give_buffer(std::uint8_t** buffer, std::size_t* size,
                                   std::size_t* max_records) {
    *buffer = static_cast<std::uint8_t*>(std::aligned_alloc(kBufferAlignment, kBufferBytes));
    *size = *buffer == nullptr ? 0 : kBufferBytes;
    *max_records = 0;  // as many as there is room for
  }

  static void CUPTIAPI take_buffer(CUcontext context, std::uint32_t stream, std::uint8_t* buffer,
                                   std::size_t, std::size_t valid_bytes) {
    static_cast<Activity&>(profiler()).read(context, stream, buffer, valid_bytes);
    std::free(buffer);
  }

  void read(CUcontext context, std::uint32_t stream, std::uint8_t* buffer, std::size_t bytes) {
    const std::lock_guard lock(mutex_);
    CUpti_Activity* activity = nullptr;
    CUptiResult result = CUPTI_SUCCESS;
    while (bytes > 0 &&
           (result = cuptiActivityGetNextRecord(buffer, bytes, &activity)) == CUPTI_SUCCESS) {
      if (activity->kind == CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION) {
        const auto& r = *reinterpret_cast<const CUpti_ActivityExternalCorrelation*>(activity);
        if (r.externalKind == kExternalKind) external_ids_[r.correlationId] = r.externalId;
      } else if (activity->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
        read_kernel(*reinterpret_cast<const CUpti_ActivityKernel10*>(activity));
      }
    }
    if (result != CUPTI_SUCCESS && result != CUPTI_ERROR_MAX_LIMIT_REACHED) unreadable_ = true;
    std::size_t dropped = 0;
    if (cuptiActivityGetNumDroppedRecords(context, stream, &dropped) == CUPTI_SUCCESS) {
      lost_ += dropped;
    }
  }

  void read_kernel(const CUpti_ActivityKernel10& r) {
    if (r.start == 0 || r.end == 0) {  // CUPTI had no memory to take its times
      ++lost_;
      return;
    }
    records_.emplace_back(
        r.correlationId,
        KernelRecord{.name = r.name == nullptr ? "" : r.name,
                     .start_ns = static_cast<std::int64_t>(r.start),
                     .end_ns = static_cast<std::int64_t>(r.end),
                     .stream = r.streamId,
                     .graph_node = r.graphNodeId,
                     .registers = r.registersPerThread,
                     .shared_bytes = std::int64_t{r.staticSharedMemory} + r.dynamicSharedMemory,
                     .grid = {r.gridX, r.gridY, r.gridZ},
                     .block = {r.blockX, r.blockY, r.blockZ}});
  }

  std::mutex mutex_;                                             ///< of what CUPTI's threads fill
  std::vector<std::pair<std::uint32_t, KernelRecord>> records_;  ///< with correlation ids
  std::unordered_map<std::uint32_t, std::uint64_t> external_ids_;
  std::size_t lost_ = 0;
  bool unreadable_ = false;
  bool registered_ = false;
  bool recording_ = false;
};

}  // namespace

Profiler& profiler() {
  static Activity& activity = *new Activity;  // CUPTI may call back while the program exits
  return activity;
}

}  // namespace orrery::kernels::cuda
