#pragma once
// Streams and events on this machine's processor. A stream is a queue with a thread of its own,
// which sleeps while there is nothing to do; kernels run in an arena of oneTBB with as many threads
// as they may use.

#include <atomic>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "kernels/device.hpp"

namespace orrery::kernels {

/// All members but those of the streams' own threads are called by one thread at a time.
class CpuDevice : public Device {
 public:
  /// Threads that a call may use; 0, or more than there are: all that this process may use.
  explicit CpuDevice(int threads);
  /// What has not begun does not run any more.
  ~CpuDevice() override;
  CpuDevice(const CpuDevice&) = delete;
  CpuDevice& operator=(const CpuDevice&) = delete;

  std::string name() const override;
  int sms() const override { return threads_; }

  void* allocate(std::size_t bytes) override;
  void release(void* memory) override;
  void upload(void* to, const void* from, std::size_t bytes) override;
  void download(void* to, const void* from, std::size_t bytes) override;

  StreamHandle create_stream() override;
  EventHandle create_event() override;

  void enqueue(StreamHandle stream, const Call& call, int sms) override;
  void enqueue_host(StreamHandle stream, std::function<void()> work) override;
  void enqueue_copy_from(StreamHandle stream, void* to, const Device& peer, const void* from,
                         std::size_t bytes) override;
  void record(StreamHandle stream, EventHandle event) override;
  /// Throws std::logic_error for an event that was never recorded: on a GPU this would wait for
  /// nothing.
  void wait(StreamHandle stream, EventHandle event) override;

  void synchronize() override;
  /// 0 if an error kept the stream from reaching it.
  std::int64_t reached_ns(EventHandle event) const override;
  bool reached(EventHandle event) const override;

  void flush_cache(StreamHandle stream) override;

 private:
  class Stream;
  class Arena;
  /// Thousands a step, of which few are waited for: reaching one wakes nobody else. libstdc++ waits
  /// on an int in the kernel at its own address, while all smaller types share some counters, and
  /// each change of one would wake, for nothing, a thread that waits for another.
  struct Event {
    std::atomic<int> pending = 0;  ///< 1: recorded, but not reached
    std::atomic<int> waiting = 0;  ///< streams
    bool ever_recorded = false;
    std::atomic<std::int64_t> reached_ns = 0;

    void end_pending() {
      pending = 0;
      if (waiting > 0) pending.notify_all();
    }
    void wait() {
      ++waiting;
      pending.wait(1);
      --waiting;
    }
  };

  Stream& at(StreamHandle stream);
  Event& at(EventHandle event);
  Arena& arena_of(int sms);
  /// Nothing that has not begun runs until the next synchronize().
  void stop(std::exception_ptr error);

  int threads_;
  std::map<int, std::unique_ptr<Arena>> arenas_;  ///< by number of threads
  std::mutex cache_mutex_;
  std::vector<std::uint64_t> cache_;  ///< what flush_cache writes to
  mutable std::mutex mutex_;          ///< of the next two
  std::deque<Event> events_;
  std::exception_ptr error_;
  std::atomic<bool> stopped_ = false;
  std::deque<Stream> streams_;  ///< last: their threads use all of the above
};

}  // namespace orrery::kernels
