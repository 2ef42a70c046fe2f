#pragma once
// Where Calls run: memory, in-order streams and events, as CUDA has them. The CPU's is
// kernels/cpu/cpu_device.hpp; CUDA's is a module that is loaded when asked for (open_cuda_device),
// so that the program starts on a machine without a driver.

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <variant>

#include "kernels/call.hpp"

namespace orrery::kernels {

/// A device's queue of work. Work of one stream runs in order; streams run beside each other.
struct StreamHandle {
  int index = 0;
};
/// A point in a stream's work that others can wait for.
struct EventHandle {
  int index = 0;
};

/// A sequence of work that is enqueued once and run many times.
struct RecordingHandle {
  int index = 0;
};

class Profiler;  // kernels/profiler.hpp

/// CUDA graphs. Between begin() and end(), what is enqueued on the streams of the device, with
/// record() and wait(), is kept and not run; memory is not allocated and nothing is synchronised.
class Recorder {
 public:
  virtual ~Recorder() = default;
  virtual void begin() = 0;
  virtual RecordingHandle end() = 0;
  /// Behind all that was enqueued on any stream, and before all that will be. Its events are reached
  /// anew each time; it runs at most once between two synchronize().
  virtual void enqueue(RecordingHandle recording) = 0;
};

class Device {
 public:
  virtual ~Device() = default;

  /// "Intel Xeon Processor, 2 threads", "NVIDIA H200".
  virtual std::string name() const = 0;
  /// SMs of a GPU, threads of a CPU: what Shape::sms counts.
  virtual int sms() const = 0;

  /// Aligned to 256 bytes, never null; throws std::bad_alloc. Contents are undefined.
  virtual void* allocate(std::size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  /// Wait for nothing: what streams are doing to this memory is the caller's business.
  virtual void upload(void* to, const void* from, std::size_t bytes) = 0;
  virtual void download(void* to, const void* from, std::size_t bytes) = 0;

  virtual StreamHandle create_stream() = 0;
  virtual EventHandle create_event() = 0;

  /// The call must be possible (why_impossible) and its operands live until it has run. `sms`: how
  /// many it may use; 0: all. Errors of kernels are thrown by synchronize().
  virtual void enqueue(StreamHandle stream, const Call& call, int sms = 0) = 0;
  /// Runs on the host in the stream's order. What it throws is thrown again by synchronize(), and
  /// host work behind it in any stream does not run. Calls behind it do not run on a CPU; on a GPU
  /// those that are enqueued already may.
  virtual void enqueue_host(StreamHandle stream, std::function<void()> work) = 0;
  /// Memory of `peer`, a device of the same kind in this process, into this one's: between GPUs over
  /// NVLink where there is a way, else over PCIe. Bytes do not change meanwhile.
  virtual void enqueue_copy_from(StreamHandle stream, void* to, const Device& peer,
                                 const void* from, std::size_t bytes) = 0;
  /// An event is recorded at most once between two synchronize().
  virtual void record(StreamHandle stream, EventHandle event) = 0;
  virtual void wait(StreamHandle stream, EventHandle event) = 0;

  /// All streams are idle afterwards. Throws the first error of what was enqueued since the last.
  virtual void synchronize() = 0;
  /// When the stream reached the event, in nanoseconds of a clock that all ranks of this machine
  /// share (CLOCK_MONOTONIC). Of events recorded before the last synchronize().
  virtual std::int64_t reached_ns(EventHandle event) const = 0;
  /// Whether the event, recorded since the last synchronize(), was reached. Waits for nothing. Throws
  /// what has gone wrong meanwhile, which synchronize() will throw again.
  virtual bool reached(EventHandle event) const = 0;

  /// CUDA's own handle of a stream (cudaStream_t), for libraries that enqueue to it; this device is
  /// then the calling thread's current one. Null where streams have none.
  virtual void* native_stream(StreamHandle) { return nullptr; }

  /// Writes over the device's last-level cache, so that what follows reads memory.
  virtual void flush_cache(StreamHandle stream) = 0;

  /// Null where the device has none. Belongs to the device.
  virtual Recorder* recorder() { return nullptr; }
  virtual Profiler* profiler() { return nullptr; }
};

/// `threads` of this machine (0: all that this process may use).
std::unique_ptr<Device> open_cpu_device(int threads = 0);

/// A GPU of this machine, or why there is none ("no NVIDIA driver", "built without CUDA: configure
/// with the preset cuda", "liborrery_cuda.so not found beside the program"). The module is looked
/// for beside the running program, or is the file that the environment variable ORRERY_CUDA_MODULE
/// names.
std::variant<std::unique_ptr<Device>, std::string> open_cuda_device(int ordinal = 0);
/// GPUs that the driver shows to this process; 0 where open_cuda_device(0) says why there is none.
int count_cuda_devices();

}  // namespace orrery::kernels
