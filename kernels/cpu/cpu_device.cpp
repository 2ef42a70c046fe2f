#include "kernels/cpu/cpu_device.hpp"

#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>
#include <unistd.h>
#include <limits>
#include <string>

#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <new>
#include <stdexcept>
#include <thread>
#include <utility>

#include "kernels/cpu/cpu_kernels.hpp"

namespace orrery::kernels {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr std::size_t kCacheLine = 64;
// Where the system does not tell; and what a virtual machine reports may be the cache of a whole
// host.
constexpr std::size_t kCacheBytesUnknown = std::size_t{64} << 20;
constexpr std::size_t kCacheBytesMax = std::size_t{1} << 30;

std::int64_t monotonic_ns() {
  timespec now{};
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * std::int64_t{1'000'000'000} + now.tv_nsec;
}

std::size_t last_level_cache_bytes() {
  for (const int level : {_SC_LEVEL4_CACHE_SIZE, _SC_LEVEL3_CACHE_SIZE, _SC_LEVEL2_CACHE_SIZE}) {
    const long bytes = sysconf(level);
    if (bytes > 0) return std::min(static_cast<std::size_t>(bytes), kCacheBytesMax);
  }
  return kCacheBytesUnknown;
}

void erase_all(std::string& text, std::string_view part) {
  for (auto at = text.find(part); at != std::string::npos; at = text.find(part)) {
    text.erase(at, part.size());
  }
}

/// "Intel Xeon Processor" out of /proc/cpuinfo.
std::string processor_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind("model name", 0) != 0) continue;
    const auto begin = line.find_first_not_of(" \t", line.find(':') + 1);
    if (begin == std::string::npos) break;
    std::string name = line.substr(begin);
    erase_all(name, "(R)");
    erase_all(name, "(TM)");
    return name;
  }
  return "CPU";
}

}  // namespace

/// Threads to run a call on. A thread that waits in it does nothing else meanwhile: a kernel of
/// another stream on top of the one that is timed would be a surprise.
class CpuDevice::Arena {
 public:
  explicit Arena(int threads) : arena_(threads) {}

  template <class Work>
  void run(const Work& work) {
    arena_.execute([&] { tbb::this_task_arena::isolate(work); });
  }

 private:
  tbb::task_arena arena_;
};

class CpuDevice::Stream {
 public:
  struct Run {
    Call call;
    Arena* arena;
  };
  struct Record {
    Event* event;
  };
  struct Wait {
    Event* event;
  };
  using Item = std::variant<Run, Record, Wait, std::function<void()>>;

  explicit Stream(CpuDevice& device) : device_(device), thread_([this] { work(); }) {}

  ~Stream() {
    {
      const std::lock_guard lock(mutex_);
      ending_ = true;
    }
    wake_.notify_one();
    thread_.join();
  }

  void push(Item item) {
    {
      const std::lock_guard lock(mutex_);
      queue_.push_back(std::move(item));
    }
    wake_.notify_one();  // no system call unless the thread sleeps
  }

  void wait_until_idle() {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [this] { return queue_.empty() && !busy_; });
  }

 private:
  void work() {
    std::vector<Item> items;
    std::unique_lock lock(mutex_);
    while (true) {
      wake_.wait(lock, [this] { return ending_ || !queue_.empty(); });
      if (queue_.empty()) return;
      items.swap(queue_);  // all that is there, so that locks are few
      busy_ = true;
      lock.unlock();
      for (Item& item : items) {
        if (device_.stopped_.load()) break;
        try {
          std::visit([](auto& what) { run(what); }, item);
        } catch (...) {
          device_.stop(std::current_exception());
        }
      }
      items.clear();
      lock.lock();
      busy_ = false;
      if (queue_.empty()) idle_.notify_all();
    }
  }

  static void run(const Run& what) {
    what.arena->run([&] { cpu::run(what.call); });
  }
  static void run(const std::function<void()>& what) { what(); }
  static void run(const Record& what) {
    what.event->reached_ns = monotonic_ns();
    what.event->end_pending();
  }
  static void run(const Wait& what) {
    // stop() ends the pending of all, whether reached or not.
    what.event->wait();
  }

  CpuDevice& device_;
  std::mutex mutex_;  ///< of the next three
  std::vector<Item> queue_;
  bool busy_ = false;
  bool ending_ = false;
  std::condition_variable wake_;
  std::condition_variable idle_;
  std::thread thread_;  ///< last: it uses all of the above
};

CpuDevice::CpuDevice(int threads)
    : threads_(threads > 0 ? std::min(threads, tbb::info::default_concurrency())
                           : tbb::info::default_concurrency()) {
  arena_of(threads_);
}

CpuDevice::~CpuDevice() {
  stop(nullptr);
}

std::string CpuDevice::name() const {
  return processor_name() + ", " + std::to_string(threads_) +
         (threads_ == 1 ? " thread" : " threads");
}

namespace {

constexpr std::size_t kLarge = std::size_t{16} << 20;
constexpr std::size_t kLeftToOthers = std::size_t{512} << 20;

/// What the machine has left, or all there is to address where it does not say. Linux hands out
/// more than that, and kills the process when it is touched.
std::size_t available_bytes() {
  std::ifstream file("/proc/meminfo");
  std::string word;
  while (file >> word) {
    std::size_t kib = 0;
    if (word == "MemAvailable:" && file >> kib) return kib * 1024;
  }
  return std::numeric_limits<std::size_t>::max();
}

}  // namespace

void* CpuDevice::allocate(std::size_t bytes) {
  if (bytes >= kLarge && available_bytes() < bytes + kLeftToOthers) throw std::bad_alloc();
  const std::size_t rounded = (std::max<std::size_t>(bytes, 1) + kAlignment - 1) / kAlignment;
  void* memory = std::aligned_alloc(kAlignment, rounded * kAlignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void CpuDevice::release(void* memory) {
  std::free(memory);
}

void CpuDevice::upload(void* to, const void* from, std::size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);
}

void CpuDevice::download(void* to, const void* from, std::size_t bytes) {
  upload(to, from, bytes);
}

StreamHandle CpuDevice::create_stream() {
  streams_.emplace_back(*this);
  return {static_cast<int>(streams_.size()) - 1};
}

EventHandle CpuDevice::create_event() {
  const std::lock_guard lock(mutex_);
  events_.emplace_back();
  return {static_cast<int>(events_.size()) - 1};
}

void CpuDevice::enqueue(StreamHandle stream, const Call& call, int sms) {
  at(stream).push(Stream::Run{call, &arena_of(sms)});
}

void CpuDevice::enqueue_host(StreamHandle stream, std::function<void()> work) {
  at(stream).push(std::move(work));
}

void CpuDevice::enqueue_copy_from(StreamHandle stream, void* to, const Device&, const void* from,
                                  std::size_t bytes) {
  at(stream).push([=] { std::memcpy(to, from, bytes); });
}

void CpuDevice::record(StreamHandle stream, EventHandle handle) {
  Event& event = at(handle);
  event.ever_recorded = true;
  event.reached_ns = 0;
  event.pending = 1;
  at(stream).push(Stream::Record{&event});
}

void CpuDevice::wait(StreamHandle stream, EventHandle handle) {
  Event& event = at(handle);
  if (!event.ever_recorded) {
    throw std::logic_error("stream " + std::to_string(stream.index) + " is to wait for event " +
                           std::to_string(handle.index) + ", which nothing has recorded");
  }
  // Reached, or recorded before the last synchronize(). Asking later would be wrong: by then it may
  // have been recorded again.
  if (event.pending == 0) return;
  at(stream).push(Stream::Wait{&event});
}

void CpuDevice::synchronize() {
  for (Stream& stream : streams_) stream.wait_until_idle();
  const std::lock_guard lock(mutex_);
  stopped_ = false;
  for (Event& event : events_) event.pending = 0;  // where an error kept it from being reached
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

std::int64_t CpuDevice::reached_ns(EventHandle event) const {
  return events_.at(static_cast<std::size_t>(event.index)).reached_ns;
}

bool CpuDevice::reached(EventHandle event) const {
  if (stopped_) {
    const std::lock_guard lock(mutex_);
    if (error_) std::rethrow_exception(error_);
  }
  return !events_.at(static_cast<std::size_t>(event.index)).pending;
}

void CpuDevice::flush_cache(StreamHandle stream) {
  Arena& arena = arena_of(0);
  at(stream).push([this, &arena] {
    const std::lock_guard lock(cache_mutex_);
    if (cache_.empty()) cache_.resize(last_level_cache_bytes() / sizeof(std::uint64_t));
    arena.run([this] {
      // Reading before writing: what is only written may go past the cache.
      constexpr std::size_t kStep = kCacheLine / sizeof(std::uint64_t);
      tbb::parallel_for(tbb::blocked_range<std::size_t>(0, cache_.size() / kStep, 4096),
                        [this](const tbb::blocked_range<std::size_t>& lines) {
                          for (std::size_t i = lines.begin(); i != lines.end(); ++i) {
                            ++cache_[i * kStep];
                          }
                        });
    });
  });
}

CpuDevice::Stream& CpuDevice::at(StreamHandle stream) {
  return streams_.at(static_cast<std::size_t>(stream.index));
}

CpuDevice::Event& CpuDevice::at(EventHandle event) {
  return events_.at(static_cast<std::size_t>(event.index));
}

CpuDevice::Arena& CpuDevice::arena_of(int sms) {
  const int threads = sms > 0 ? std::min(sms, threads_) : threads_;
  std::unique_ptr<Arena>& arena = arenas_[threads];
  if (!arena) arena = std::make_unique<Arena>(threads);
  return *arena;
}

void CpuDevice::stop(std::exception_ptr error) {
  const std::lock_guard lock(mutex_);
  stopped_ = true;
  if (!error_) error_ = std::move(error);
  for (Event& event : events_) event.end_pending();
}

std::unique_ptr<Device> open_cpu_device(int threads) {
  return std::make_unique<CpuDevice>(threads);
}

}  // namespace orrery::kernels
