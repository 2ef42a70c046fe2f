// A GPU as a Device: memory, streams, events, host work, recordings; Calls go to cuda::launch.

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "kernels/cuda/activity.hpp"
#include "kernels/cuda/launch.hpp"
#include "kernels/cuda/libraries.hpp"
#include "kernels/cuda_module.hpp"
#include "kernels/device.hpp"

namespace orrery::kernels::cuda {

void check(cudaError_t result, const char* what) {
  if (result == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(result) + ", " +
                           cudaGetErrorString(result));
}

namespace {

/// cuBLASLt's recommendation for Hopper is 32 MiB (cuBLAS documentation, cublasSetWorkspace); twice
/// that also holds the partial sums of any kernel here.
constexpr std::size_t kWorkspaceBytes = std::size_t{64} << 20U;

std::int64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<std::int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  explicit Event(unsigned flags) {
    check(cudaEventCreateWithFlags(&event_, flags), "cudaEventCreate");
  }
  ~Event() { cudaEventDestroy(event_); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class Memory {
 public:
  explicit Memory(std::size_t bytes) {
    check(cudaMalloc(&data_, bytes), "cudaMalloc of a workspace");
  }
  ~Memory() { cudaFree(data_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  void* get() const { return data_; }

 private:
  void* data_ = nullptr;
};

/// Ties the time of events to CLOCK_MONOTONIC: one event at a known time. The event happens between
/// two readings of the clock, some microseconds apart, and counts as in the middle of them: half of
/// that is the error of all times by this anchor. Differences of times by one anchor have the
/// resolution of cudaEventElapsedTime, about half a microsecond (CUDA Runtime API, event
/// management), and that of a float of milliseconds: 60 ns up to 1 s behind the anchor, 4 us at a
/// minute.
class ClockAnchor {
 public:
  ClockAnchor() { set(); }

  void set() {
    constexpr int kTries = 8;
    std::int64_t shortest_ns = 0;
    for (int i = 0; i < kTries; ++i) {
      Event& event = events_[1 - best_];
      const std::int64_t before_ns = monotonic_ns();
      check(cudaEventRecord(event.get(), stream_.get()), "cudaEventRecord of the clock");
      check(cudaEventSynchronize(event.get()), "cudaEventSynchronize of the clock");
      const std::int64_t after_ns = monotonic_ns();
      if (i > 0 && after_ns - before_ns >= shortest_ns) continue;
      shortest_ns = after_ns - before_ns;
      at_ns_ = before_ns + shortest_ns / 2;
      best_ = 1 - best_;
    }
  }

  std::int64_t age_ns() const { return monotonic_ns() - at_ns_; }

  std::int64_t time_of(const Event& event) const {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, events_[best_].get(), event.get()), "cudaEventElapsedTime");
    return at_ns_ + static_cast<std::int64_t>(static_cast<double>(ms) * 1e6);
  }

 private:
  Stream stream_;
  Event events_[2] = {Event(cudaEventDefault), Event(cudaEventDefault)};
  int best_ = 0;
  std::int64_t at_ns_ = 0;
};

/// What went wrong first, of all threads.
class FirstError {
 public:
  void keep(std::exception_ptr error) {
    const std::lock_guard lock(mutex_);
    if (!error_) error_ = std::move(error);
    set_ = true;
  }
  bool set() const { return set_; }
  /// Throws it and keeps it.
  void show() {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
  }
  void rethrow() {
    const std::lock_guard lock(mutex_);
    set_ = false;
    if (auto error = std::exchange(error_, nullptr)) std::rethrow_exception(error);
  }

 private:
  std::mutex mutex_;
  std::exception_ptr error_;
  std::atomic<bool> set_ = false;
};

struct HostWork {
  std::function<void()> work;
  FirstError* error = nullptr;
};

void CUDART_CB run_host_work(void* data) {
  auto& host = *static_cast<HostWork*>(data);
  if (host.error->set()) return;
  try {
    host.work();
  } catch (...) {
    host.error->keep(std::current_exception());
  }
}

/// An event that is recorded into a graph cannot be waited for outside of it, nor timed; so there
/// are two. `time` is recorded in streams, and in graphs as a node of its own; `order` only tells a
/// graph who waits for whom.
struct TimedEvent {
  Event time{cudaEventDefault};
  Event order{cudaEventDisableTiming};
  /// Number of the recording that it was last recorded into; 0: a stream. A recording runs behind
  /// all that was enqueued before and before all that comes, so nobody else has to wait for its
  /// events.
  int recorded_in = 0;
  std::int64_t reached_ns = 0;
};

struct WorkStream {
  Stream stream;
  Memory workspace{kWorkspaceBytes};
  Event joint{cudaEventDisableTiming};  ///< for waits between this stream and the recorder's
};

struct Recording {
  cudaGraphExec_t graph = nullptr;
  std::vector<int> events;
  std::vector<std::unique_ptr<HostWork>> host_work;

  Recording() = default;
  ~Recording() {
    if (graph != nullptr) cudaGraphExecDestroy(graph);
  }
  Recording(const Recording&) = delete;
  Recording& operator=(const Recording&) = delete;
};

class CudaDevice final : public Device, private Recorder {
 public:
  CudaDevice(int ordinal, const cudaDeviceProp& properties)
      : ordinal_(ordinal), name_(properties.name) {
    limits_.sms = properties.multiProcessorCount;
    limits_.shared_bytes_per_block = static_cast<int>(properties.sharedMemPerBlockOptin);
    limits_.l2_bytes = static_cast<std::size_t>(properties.l2CacheSize);
    limits_.compute_capability = properties.major * 10 + properties.minor;
  }
  ~CudaDevice() override {
    cudaSetDevice(ordinal_);
    cudaDeviceSynchronize();  // host work uses this object
  }

  std::string name() const override { return name_; }
  int sms() const override { return limits_.sms; }

  void* allocate(std::size_t bytes) override {
    use();
    void* memory = nullptr;
    if (cudaMalloc(&memory, std::max<std::size_t>(bytes, 1)) != cudaSuccess) {
      cudaGetLastError();  // or the next launch reports it
      throw std::bad_alloc();
    }
    return memory;
  }
  void release(void* memory) override {
    use();
    check(cudaFree(memory), "cudaFree");
  }
  void upload(void* to, const void* from, std::size_t bytes) override {
    copy(to, from, bytes, cudaMemcpyHostToDevice);
  }
  void download(void* to, const void* from, std::size_t bytes) override {
    copy(to, from, bytes, cudaMemcpyDeviceToHost);
  }

  StreamHandle create_stream() override {
    use();
    streams_.push_back(std::make_unique<WorkStream>());
    return {static_cast<int>(streams_.size()) - 1};
  }
  EventHandle create_event() override {
    use();
    events_.push_back(std::make_unique<TimedEvent>());
    return {static_cast<int>(events_.size()) - 1};
  }

  void enqueue(StreamHandle stream, const Call& call, int sms) override {
    if (error_.set()) return;
    use();
    WorkStream& s = at(stream);
    const LaunchContext context{
        .stream = s.stream.get(),
        .sms = sms > 0 ? std::min(sms, limits_.sms) : limits_.sms,
        .limits = limits_,
        .workspace = s.workspace.get(),
        .workspace_bytes = kWorkspaceBytes,
        .libraries = &libraries_,
    };
    try {
      std::visit([&](const auto& c) { launch(c, context); }, call);
    } catch (const std::exception& e) {
      error_.keep(std::make_exception_ptr(std::runtime_error(describe(call) + ": " + e.what())));
    }
  }
  void enqueue_host(StreamHandle stream, std::function<void()> work) override {
    if (error_.set()) return;
    use();
    auto& kept = recording_ ? recording_->host_work : host_work_;
    kept.push_back(std::make_unique<HostWork>(std::move(work), &error_));
    check(cudaLaunchHostFunc(at(stream).stream.get(), run_host_work, kept.back().get()),
          "cudaLaunchHostFunc");
  }
  void enqueue_copy_from(StreamHandle stream, void* to, const Device& peer, const void* from,
                         std::size_t bytes) override {
    const int other = dynamic_cast<const CudaDevice&>(peer).ordinal_;
    use();
    reach(other);
    check(cudaMemcpyPeerAsync(to, ordinal_, from, other, bytes, at(stream).stream.get()),
          "cudaMemcpyPeerAsync");
  }
  void record(StreamHandle stream, EventHandle event) override {
    use();
    const cudaStream_t s = at(stream).stream.get();
    TimedEvent& e = at(event);
    e.recorded_in = this_recording();
    if (recording_) {
      check(cudaEventRecord(e.order.get(), s), "cudaEventRecord");
      check(cudaEventRecordWithFlags(e.time.get(), s, cudaEventRecordExternal), "cudaEventRecord");
      recording_->events.push_back(event.index);
      return;
    }
    if (pending_.empty()) renew_anchor();
    check(cudaEventRecord(e.time.get(), s), "cudaEventRecord");
    pending_.push_back(event.index);
  }
  void wait(StreamHandle stream, EventHandle event) override {
    use();
    const TimedEvent& e = at(event);
    if (e.recorded_in != this_recording()) return;
    check(cudaStreamWaitEvent(at(stream).stream.get(), (recording_ ? e.order : e.time).get(), 0),
          "cudaStreamWaitEvent");
  }

  void synchronize() override {
    use();
    const auto wait_for = [&](const Stream& stream) {
      try {
        check(cudaStreamSynchronize(stream.get()), "a kernel failed");
      } catch (...) {
        error_.keep(std::current_exception());
      }
    };
    for (const auto& s : streams_) wait_for(s->stream);
    wait_for(recorder_stream_);
    host_work_.clear();
    if (!error_.set()) {
      for (const int i : pending_) {
        TimedEvent& event = *events_[static_cast<std::size_t>(i)];
        event.reached_ns = anchor_.time_of(event.time);
      }
    }
    pending_.clear();
    error_.rethrow();
  }
  std::int64_t reached_ns(EventHandle event) const override {
    return events_.at(static_cast<std::size_t>(event.index))->reached_ns;
  }

  bool reached(EventHandle event) const override {
    use();
    error_.show();
    const cudaError_t state = cudaEventQuery(at(event).time.get());
    if (state == cudaErrorNotReady) {
      cudaGetLastError();  // or the next launch reports it
      return false;
    }
    check(state, "a kernel failed");
    return true;
  }
  void* native_stream(StreamHandle stream) override {
    use();
    return at(stream).stream.get();
  }

  void flush_cache(StreamHandle stream) override {
    use();
    const std::size_t bytes = 2 * limits_.l2_bytes;
    if (!flush_memory_) flush_memory_ = std::make_unique<Memory>(bytes);
    check(cudaMemsetAsync(flush_memory_->get(), 0, bytes, at(stream).stream.get()),
          "cudaMemsetAsync");
  }

  Recorder* recorder() override { return this; }
  Profiler* profiler() override {
    use();  // it synchronises the device of this thread
    return &cuda::profiler();
  }

 private:
  void use() const { check(cudaSetDevice(ordinal_), "cudaSetDevice"); }
  /// Counted from 1; 0 while nothing is recorded.
  int this_recording() const { return recording_ ? recordings_begun_ : 0; }
  WorkStream& at(StreamHandle stream) const {
    return *streams_.at(static_cast<std::size_t>(stream.index));
  }
  TimedEvent& at(EventHandle event) const {
    return *events_.at(static_cast<std::size_t>(event.index));
  }

  void copy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    use();
    check(cudaMemcpyAsync(to, from, bytes, kind, copy_stream_.get()), "cudaMemcpyAsync");
    check(cudaStreamSynchronize(copy_stream_.get()), "cudaMemcpyAsync");
  }

  /// Copies from that GPU go straight, where there is a way; else CUDA takes them through the host.
  void reach(int other) {
    if (other == ordinal_ || !reached_peers_.insert(other).second) return;
    int can = 0;
    check(cudaDeviceCanAccessPeer(&can, ordinal_, other), "cudaDeviceCanAccessPeer");
    if (can == 0) return;
    const cudaError_t enabled = cudaDeviceEnablePeerAccess(other, 0);
    if (enabled == cudaErrorPeerAccessAlreadyEnabled) {
      cudaGetLastError();
    } else {
      check(enabled, "cudaDeviceEnablePeerAccess");
    }
  }

  /// Before events are recorded, never while some are on their way: they are timed by one anchor.
  void renew_anchor() {
    constexpr std::int64_t kRenewNs = 50'000'000;
    if (anchor_.age_ns() > kRenewNs) anchor_.set();
  }

  // All streams fork from the recorder's stream in the beginning, and join it in the end: that is
  // what makes them one graph.
  void begin() override {
    use();
    if (recording_) throw std::logic_error("a recording has begun already");
    recording_ = std::make_unique<Recording>();
    ++recordings_begun_;
    // Relaxed: the first use of a kernel or of a library may allocate, which no graph sees.
    check(cudaStreamBeginCapture(recorder_stream_.get(), cudaStreamCaptureModeRelaxed),
          "cudaStreamBeginCapture");
    fork();
  }
  RecordingHandle end() override {
    use();
    if (!recording_) throw std::logic_error("no recording has begun");
    join();
    cudaGraph_t graph = nullptr;
    const cudaError_t captured = cudaStreamEndCapture(recorder_stream_.get(), &graph);
    auto recording = std::move(recording_);
    cudaError_t made = captured;
    if (captured == cudaSuccess) {
      made = cudaGraphInstantiate(&recording->graph, graph, 0);
      cudaGraphDestroy(graph);
    }
    error_.rethrow();
    check(captured, "cudaStreamEndCapture");
    check(made, "cudaGraphInstantiate");
    check(cudaGraphUpload(recording->graph, recorder_stream_.get()), "cudaGraphUpload");
    recordings_.push_back(std::move(recording));
    return {static_cast<int>(recordings_.size()) - 1};
  }
  void enqueue(RecordingHandle handle) override {
    if (error_.set()) return;
    use();
    const Recording& recording = *recordings_.at(static_cast<std::size_t>(handle.index));
    if (pending_.empty()) renew_anchor();
    join();
    check(cudaGraphLaunch(recording.graph, recorder_stream_.get()), "cudaGraphLaunch");
    fork();
    pending_.insert(pending_.end(), recording.events.begin(), recording.events.end());
  }

  /// What streams do next waits for the recorder's stream.
  void fork() {
    check(cudaEventRecord(joint_.get(), recorder_stream_.get()), "cudaEventRecord");
    for (const auto& s : streams_) {
      check(cudaStreamWaitEvent(s->stream.get(), joint_.get(), 0), "cudaStreamWaitEvent");
    }
  }
  /// What the recorder's stream does next waits for all streams.
  void join() {
    for (const auto& s : streams_) {
      check(cudaEventRecord(s->joint.get(), s->stream.get()), "cudaEventRecord");
      check(cudaStreamWaitEvent(recorder_stream_.get(), s->joint.get(), 0), "cudaStreamWaitEvent");
    }
  }

  int ordinal_;
  std::string name_;
  Limits limits_;
  Libraries libraries_;
  mutable FirstError error_;
  std::set<int> reached_peers_;
  Stream copy_stream_;
  Stream recorder_stream_;
  Event joint_{cudaEventDisableTiming};
  ClockAnchor anchor_;
  std::unique_ptr<Memory> flush_memory_;
  std::vector<std::unique_ptr<WorkStream>> streams_;
  std::vector<std::unique_ptr<TimedEvent>> events_;
  std::vector<std::unique_ptr<HostWork>> host_work_;
  std::vector<std::unique_ptr<Recording>> recordings_;
  int recordings_begun_ = 0;
  std::unique_ptr<Recording> recording_;  ///< while it is being made
  std::vector<int> pending_;              ///< events recorded since the last synchronize()
};

std::string version_text(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

std::unique_ptr<Device> open(int ordinal) {
  int driver = 0;
  cudaDriverGetVersion(&driver);
  int count = 0;
  const cudaError_t counted = cudaGetDeviceCount(&count);
  if (counted == cudaErrorInsufficientDriver) {
    throw std::runtime_error("the NVIDIA driver is too old or has no GPU: it knows CUDA " +
                             version_text(driver) + ", this program was built with CUDA " +
                             version_text(CUDART_VERSION));
  }
  if (counted == cudaErrorNoDevice || (counted == cudaSuccess && count == 0)) {
    throw std::runtime_error("no NVIDIA GPU: the driver is there, but it shows none");
  }
  check(counted, "looking for NVIDIA GPUs");
  if (ordinal < 0 || ordinal >= count) {
    throw std::runtime_error("GPU " + std::to_string(ordinal) + " asked for, but there are " +
                             std::to_string(count) + ", counted from 0");
  }
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, ordinal), "cudaGetDeviceProperties");
  if (properties.major != 9 || properties.minor != 0) {
    throw std::runtime_error(std::string(properties.name) + " has compute capability " +
                             std::to_string(properties.major) + "." +
                             std::to_string(properties.minor) +
                             "; these kernels are for 9.0 (H100, H200, H800)");
  }
  check(cudaSetDevice(ordinal), "cudaSetDevice");
  return std::make_unique<CudaDevice>(ordinal, properties);
}

}  // namespace
}  // namespace orrery::kernels::cuda

extern "C" {

__attribute__((visibility("default"))) int orrery_cuda_module_version() {
  return orrery::kernels::kCudaModuleVersion;
}

__attribute__((visibility("default"))) int orrery_count_cuda_devices() {
  int count = 0;
  const bool counted = cudaGetDeviceCount(&count) == cudaSuccess;
  cudaGetLastError();
  return counted ? count : 0;
}

__attribute__((visibility("default"))) orrery::kernels::Device* orrery_open_cuda_device(
    int ordinal, char* reason, std::size_t reason_bytes) {
  try {
    return orrery::kernels::cuda::open(ordinal).release();
  } catch (const std::exception& e) {
    std::snprintf(reason, reason_bytes, "%s", e.what());
    return nullptr;
  }
}
}
