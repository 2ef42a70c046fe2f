// orrery_probe [BUFFER_MIB]: measures on this machine's first NVIDIA GPU what a profile otherwise
// only argues for, and prints it as keys of a profile (YAML) on standard output:
//   - the gap between dependent kernels of one stream, and what a tiny kernel takes;
//   - the memory bandwidth that a copy, a read or a write reaches on some of the SMs and on all;
//   - how well launch + gap + bytes / bandwidth foretells copies of other sizes.
// Every result is checked: buffers are poisoned before and compared after. It changes no setting of
// the GPU. Exit status: 0 fine, 1 no GPU or a CUDA call or check that failed, 2 wrong arguments.

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "kernels/probe_plan.hpp"

namespace orrery {
namespace {

using Word = uint4;  ///< 16 bytes, what one load or store instruction moves at most

constexpr unsigned kStreamThreads = 1024;  ///< one block an SM, half of its warps
constexpr unsigned kLoads = 8;             ///< in flight a thread: 128 KiB an SM
constexpr unsigned kChunkLoads = 2 * kLoads;
constexpr unsigned kChunkWords = 32 * kChunkLoads;  ///< 8 KiB, handed out to one warp at a time
constexpr unsigned kTinyThreads = 128;
/// Kernels of a chain. The driver queues about a thousand launches; the launch after that would
/// wait for the kernel that waits for the launches.
constexpr unsigned kChain = 512;
constexpr unsigned kChainRounds = 4;
constexpr unsigned kMaxSlices = 64;
constexpr std::uint64_t kSmallestCopyBytes = std::uint64_t{16} << 20;
constexpr std::uint32_t kCopySalt = 0x1b873593u;
constexpr std::uint32_t kWriteSalt = 0xcc9e2d51u;
constexpr int kPoison = 0xa5;

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
  }
}

void check_launch(const char* kernel) {
  check(cudaGetLastError(), kernel);
}

void require(bool condition, const std::string& message) {
  if (!condition) throw std::runtime_error(message);
}

/// Device memory; freed when it goes out of scope.
template <class T>
class DeviceArray {
 public:
  explicit DeviceArray(std::size_t size) : size_(size) {
    check(cudaMalloc(&data_, size * sizeof(T)), "cudaMalloc");
  }
  ~DeviceArray() { cudaFree(data_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return data_; }
  std::size_t size() const { return size_; }
  void fill_bytes(int byte) { check(cudaMemsetAsync(data_, byte, size_ * sizeof(T)), "memset"); }
  std::vector<T> to_host() const {
    std::vector<T> host(size_);
    check(cudaMemcpy(host.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost), "copy back");
    return host;
  }

 private:
  T* data_ = nullptr;
  std::size_t size_;
};

/// Two points in a stream and the time between them.
class EventTimer {
 public:
  EventTimer() {
    check(cudaEventCreate(&begin_), "cudaEventCreate");
    check(cudaEventCreate(&end_), "cudaEventCreate");
  }
  ~EventTimer() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  EventTimer(const EventTimer&) = delete;
  EventTimer& operator=(const EventTimer&) = delete;

  void begin(cudaStream_t stream) { check(cudaEventRecord(begin_, stream), "cudaEventRecord"); }
  void end(cudaStream_t stream) { check(cudaEventRecord(end_, stream), "cudaEventRecord"); }
  /// Waits for the second point.
  double seconds() {
    float ms = 0;
    check(cudaEventSynchronize(end_), "cudaEventSynchronize");
    check(cudaEventElapsedTime(&ms, begin_, end_), "cudaEventElapsedTime");
    return ms * 1e-3;
  }

 private:
  cudaEvent_t begin_ = nullptr;
  cudaEvent_t end_ = nullptr;
};

__device__ std::uint64_t timer_ns() {
  std::uint64_t ns;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(ns)::"memory");
  return ns;
}

__device__ unsigned this_sm() {
  unsigned sm;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(sm));
  return sm;
}

// ---------------------------------------------------------------------------------------------
// Data: words that differ from each other and are computed, not stored, for the comparison.

__device__ Word pattern(std::uint64_t index, std::uint32_t salt) {
  std::uint32_t h = (static_cast<std::uint32_t>(index) ^ salt) * 0x9e3779b1u;
  h = (h ^ (h >> 15)) * 0x85ebca77u;
  h ^= h >> 13;
  return {h, ~h, h + static_cast<std::uint32_t>(index), h ^ salt};
}

__device__ bool equal(const Word& a, const Word& b) {
  return a.x == b.x && a.y == b.y && a.z == b.z && a.w == b.w;
}

__device__ unsigned sum_of(const Word& w) {
  return w.x + w.y + w.z + w.w;
}

__device__ std::uint64_t first_index() {
  return std::uint64_t{blockIdx.x} * blockDim.x + threadIdx.x;
}

__device__ std::uint64_t index_step() {
  return std::uint64_t{gridDim.x} * blockDim.x;
}

__global__ void fill_words(Word* words, std::uint64_t count, std::uint32_t salt) {
  for (std::uint64_t i = first_index(); i < count; i += index_step()) words[i] = pattern(i, salt);
}

__global__ void count_mismatches(const Word* words, std::uint64_t count, std::uint32_t salt,
                                 unsigned long long* mismatches) {
  for (std::uint64_t i = first_index(); i < count; i += index_step()) {
    if (!equal(words[i], pattern(i, salt))) atomicAdd(mismatches, 1ull);
  }
}

/// Sum of the pattern, modulo 2^32, without reading memory.
__global__ void sum_pattern(std::uint64_t count, std::uint32_t salt, unsigned* total) {
  unsigned sum = 0;
  for (std::uint64_t i = first_index(); i < count; i += index_step())
    sum += sum_of(pattern(i, salt));
  atomicAdd(total, sum);
}

// ---------------------------------------------------------------------------------------------
// Streaming. Warps take chunks in turn, so that no SM waits for a slower one at the end.

enum class Access { copy, read, write };

struct StreamJob {
  const Word* source;
  Word* target;
  std::uint64_t chunks;
  unsigned long long* ticket;  ///< zero before the launch
  unsigned* sums;              ///< one a thread; written by Access::read
  unsigned* sm_of_block;
};

__device__ std::uint64_t take_chunk(unsigned long long* ticket) {
  unsigned long long chunk = 0;
  if (threadIdx.x % 32 == 0) chunk = atomicAdd(ticket, 1ull);
  return __shfl_sync(0xffffffffu, chunk, 0);
}

template <Access kAccess>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_words(StreamJob job) {
  if (threadIdx.x == 0) job.sm_of_block[blockIdx.x] = this_sm();
  unsigned sum = 0;
  std::uint64_t chunk = take_chunk(job.ticket);
  while (chunk < job.chunks) {
    const std::uint64_t next = take_chunk(job.ticket);  // its latency hides behind this chunk
#pragma unroll 1
    for (unsigned part = 0; part < kChunkLoads; part += kLoads) {
      const std::uint64_t base = chunk * kChunkWords + part * 32 + threadIdx.x % 32;
      Word words[kLoads];
#pragma unroll
      for (unsigned i = 0; i < kLoads; ++i) {
        words[i] = kAccess == Access::write ? pattern(base + i * 32, kWriteSalt)
                                            : job.source[base + i * 32];
      }
#pragma unroll
      for (unsigned i = 0; i < kLoads; ++i) {
        if (kAccess == Access::read) {
          sum += sum_of(words[i]);
        } else {
          job.target[base + i * 32] = words[i];
        }
      }
    }
    chunk = next;
  }
  if (kAccess == Access::read) job.sums[first_index()] = sum;
}

using StreamKernel = void (*)(StreamJob);

class StreamProbe {
 public:
  StreamProbe(int sms, std::size_t shared_bytes_per_block, std::uint64_t words)
      : sms_(sms),
        shared_bytes_(shared_bytes_per_block),
        chunks_(words / kChunkWords),
        source_(words),
        target_(words),
        tickets_(kMaxSlices),
        sums_(static_cast<std::size_t>(sms) * kStreamThreads),
        sm_of_block_(static_cast<std::size_t>(sms)),
        mismatches_(1),
        pattern_sum_(1) {
    for (const StreamKernel kernel :
         {stream_words<Access::copy>, stream_words<Access::read>, stream_words<Access::write>}) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes_)),
            "shared memory of stream_words");
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 52),
            "shared memory of stream_words");
      int blocks_per_sm = 0;
      check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks_per_sm, kernel, kStreamThreads,
                                                          shared_bytes_),
            "occupancy of stream_words");
      require(blocks_per_sm == 1, "stream_words must have an SM to itself, but " +
                                      std::to_string(blocks_per_sm) + " blocks fit");
    }
    fill_words<<<8 * sms_, 256>>>(source_.data(), words, kCopySalt);
    check_launch("fill_words");
    pattern_sum_.fill_bytes(0);
    sum_pattern<<<8 * sms_, 256>>>(words, kCopySalt, pattern_sum_.data());
    check_launch("sum_pattern");
    check(cudaDeviceSynchronize(), "filling the source");
  }

  std::uint64_t buffer_bytes() const { return source_.size() * sizeof(Word); }

  BandwidthPoint bandwidth_on(int sms) {
    BandwidthPoint point;
    point.sms = sms;
    point.copy = bandwidth<Access::copy>(sms, 2, point.sms_seen);
    int seen = 0;
    point.read = bandwidth<Access::read>(sms, 1, seen);
    if (seen != sms) point.sms_seen = seen;
    point.write = bandwidth<Access::write>(sms, 1, seen);
    if (seen != sms) point.sms_seen = seen;
    return point;
  }

  /// Time from copy to copy in a row of them on all SMs. Each copies another part of the buffers.
  CopyPeriod period_of_copies(std::uint64_t bytes) {
    const std::uint64_t slice = bytes / sizeof(Word) / kChunkWords;  // chunks
    const auto slices = static_cast<unsigned>(std::min<std::uint64_t>(chunks_ / slice, kMaxSlices));
    std::vector<double> samples;
    target_.fill_bytes(kPoison);
    do {
      tickets_.fill_bytes(0);
      timer_.begin(nullptr);
      for (unsigned i = 0; i < slices; ++i) {
        launch<Access::copy>(sms_, i * slice * kChunkWords, slice, i);
      }
      timer_.end(nullptr);
      samples.push_back(timer_.seconds() / slices);
    } while (!enough_samples(samples));
    expect_target(kCopySalt, slices * slice * kChunkWords, "copies in a row");
    return {.bytes = bytes, .seconds = median(samples)};
  }

 private:
  template <Access kAccess>
  void launch(int sms, std::uint64_t first_word, std::uint64_t chunks, unsigned ticket) {
    stream_words<kAccess>
        <<<sms, kStreamThreads, shared_bytes_>>>({.source = source_.data() + first_word,
                                                  .target = target_.data() + first_word,
                                                  .chunks = chunks,
                                                  .ticket = tickets_.data() + ticket,
                                                  .sums = sums_.data(),
                                                  .sm_of_block = sm_of_block_.data()});
    check_launch("stream_words");
  }

  /// Runs once on poisoned outputs and checks them, then times runs until there are enough.
  template <Access kAccess>
  Summary bandwidth(int sms, int bytes_moved_per_byte, int& sms_seen) {
    target_.fill_bytes(kPoison);
    sums_.fill_bytes(kPoison);
    sm_of_block_.fill_bytes(kPoison);
    tickets_.fill_bytes(0);
    launch<kAccess>(sms, 0, chunks_, 0);
    const std::string what = "on " + std::to_string(sms) + " SMs";
    if (kAccess == Access::copy) expect_target(kCopySalt, source_.size(), "copy " + what);
    if (kAccess == Access::write) expect_target(kWriteSalt, source_.size(), "write " + what);
    if (kAccess == Access::read) expect_sum(sms, "read " + what);
    sms_seen = distinct_sms(sms);

    const double bytes = static_cast<double>(buffer_bytes()) * bytes_moved_per_byte;
    std::vector<double> samples;
    do {
      tickets_.fill_bytes(0);
      timer_.begin(nullptr);
      launch<kAccess>(sms, 0, chunks_, 0);
      timer_.end(nullptr);
      samples.push_back(bytes / timer_.seconds());
      const int seen = distinct_sms(sms);
      if (seen != sms) sms_seen = seen;
    } while (!enough_samples(samples));
    return summarise_samples(samples);
  }

  void expect_target(std::uint32_t salt, std::uint64_t words, const std::string& what) {
    mismatches_.fill_bytes(0);
    count_mismatches<<<8 * sms_, 256>>>(target_.data(), words, salt, mismatches_.data());
    check_launch("count_mismatches");
    const auto wrong = mismatches_.to_host().front();
    require(wrong == 0, what + ": " + std::to_string(wrong) + " of " + std::to_string(words) +
                            " words are wrong");
  }

  void expect_sum(int sms, const std::string& what) {
    const std::vector<unsigned> sums = sums_.to_host();
    unsigned total = 0;
    for (std::size_t i = 0; i < static_cast<std::size_t>(sms) * kStreamThreads; ++i) {
      total += sums[i];
    }
    require(total == pattern_sum_.to_host().front(), what + ": the sum of all words is wrong");
  }

  int distinct_sms(int blocks) {
    const std::vector<unsigned> seen = sm_of_block_.to_host();
    return static_cast<int>(std::set<unsigned>(seen.begin(), seen.begin() + blocks).size());
  }

  int sms_;
  std::size_t shared_bytes_;
  std::uint64_t chunks_;
  DeviceArray<Word> source_;
  DeviceArray<Word> target_;
  DeviceArray<unsigned long long> tickets_;
  DeviceArray<unsigned> sums_;
  DeviceArray<unsigned> sm_of_block_;
  DeviceArray<unsigned long long> mismatches_;
  DeviceArray<unsigned> pattern_sum_;
  EventTimer timer_;
};

// ---------------------------------------------------------------------------------------------
// Chains of tiny kernels.

/// Adds one to the first number of every thread's word. Each kernel of a chain needs what the one
/// before it wrote, and at the end the numbers tell how many ran.
__global__ void tiny_kernel(Word* words, Stamp* stamps) {
  const std::uint64_t begin_ns = timer_ns();
  const std::uint64_t i = first_index();
  Word w = words[i];
  w.x += 1;
  words[i] = w;
  __syncthreads();
  if (threadIdx.x == 0) stamps[blockIdx.x] = {begin_ns, timer_ns()};
}

/// Holds the stream until the host has set `go`, half a second at most; says if it was in time.
__global__ void wait_for_host(const volatile int* go, int* in_time) {
  const std::uint64_t begin_ns = timer_ns();
  int seen = 0;
  while (seen == 0 && timer_ns() - begin_ns < 500'000'000) seen = *go;
  *in_time = seen;
}

/// Memory that both the host and the device see.
class HostFlag {
 public:
  HostFlag() { check(cudaHostAlloc(&data_, sizeof(int), cudaHostAllocMapped), "cudaHostAlloc"); }
  ~HostFlag() { cudaFreeHost(data_); }
  HostFlag(const HostFlag&) = delete;
  HostFlag& operator=(const HostFlag&) = delete;
  void set(int value) { *static_cast<volatile int*>(data_) = value; }
  const int* on_device() const {
    void* pointer = nullptr;
    check(cudaHostGetDevicePointer(&pointer, data_, 0), "cudaHostGetDevicePointer");
    return static_cast<const int*>(pointer);
  }

 private:
  int* data_ = nullptr;
};

class ChainProbe {
 public:
  ChainProbe(int sms, double timer_step_ns)
      : blocks_(static_cast<unsigned>(sms)),
        timer_step_ns_(timer_step_ns),
        words_(std::size_t{blocks_} * kTinyThreads),
        stamps_(std::size_t{blocks_} * kChain),
        in_time_(1) {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
    enqueue_chain();  // once to load the code, which a capture does not wait for
    check(cudaStreamSynchronize(stream_), "first chain");
    cudaGraph_t graph = nullptr;
    check(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), "capture");
    enqueue_chain();
    check(cudaStreamEndCapture(stream_, &graph), "capture");
    check(cudaGraphInstantiate(&graph_, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
    check(cudaGraphUpload(graph_, stream_), "cudaGraphUpload");
  }
  ~ChainProbe() {
    cudaGraphExecDestroy(graph_);
    cudaStreamDestroy(stream_);
  }
  ChainProbe(const ChainProbe&) = delete;
  ChainProbe& operator=(const ChainProbe&) = delete;

  ChainResult in_stream() {
    return measure([this] { enqueue_chain(); });
  }
  ChainResult in_graph() {
    return measure([this] { check(cudaGraphLaunch(graph_, stream_), "cudaGraphLaunch"); });
  }

 private:
  void enqueue_chain() {
    for (unsigned i = 0; i < kChain; ++i) {
      tiny_kernel<<<blocks_, kTinyThreads, 0, stream_>>>(words_.data(),
                                                         stamps_.data() + std::size_t{i} * blocks_);
      check_launch("tiny_kernel");
    }
  }

  template <class Enqueue>
  ChainResult measure(const Enqueue& enqueue) {
    // Once to warm up: the first launch of a kernel loads its code, which must not happen while
    // another one waits for the host.
    go_.set(1);
    wait_for_host<<<1, 1, 0, stream_>>>(go_.on_device(), in_time_.data());
    check_launch("wait_for_host");
    enqueue();
    check(cudaStreamSynchronize(stream_), "warming up the chain");

    ChainTimes all;
    std::vector<double> event_periods_ns;
    for (unsigned round = 0; round < kChainRounds; ++round) {
      words_.fill_bytes(0);
      stamps_.fill_bytes(kPoison);
      check(cudaDeviceSynchronize(), "clearing the chain");
      go_.set(0);
      wait_for_host<<<1, 1, 0, stream_>>>(go_.on_device(), in_time_.data());
      check_launch("wait_for_host");
      timer_.begin(stream_);
      enqueue();
      timer_.end(stream_);
      go_.set(1);
      event_periods_ns.push_back(timer_.seconds() / kChain * 1e9);
      require(in_time_.to_host().front() == 1, "the host took too long to enqueue a chain");
      append(all, chain_times(checked_stamps(), blocks_));
    }
    return {.gap_ns = summarise_samples(all.gap_ns),
            .gap_centre_ns = centre_ns(all.gap_ns, timer_step_ns_),
            .period_centre_ns = centre_ns(all.period_ns, timer_step_ns_),
            .duration_centre_ns = centre_ns(all.duration_ns, timer_step_ns_),
            .event_period_ns = median(event_periods_ns)};
  }

  /// Every kernel ran once, after the one before it, and every block wrote its stamp.
  std::vector<Stamp> checked_stamps() const {
    for (const Word& w : words_.to_host()) {
      require(w.x == kChain && w.y == 0 && w.z == 0 && w.w == 0, "a chain's result is wrong");
    }
    std::vector<Stamp> stamps = stamps_.to_host();
    std::uint64_t poison = 0;
    for (int i = 0; i < 8; ++i) poison = poison << 8 | kPoison;
    for (const Stamp& s : stamps) {
      require(s.begin_ns != poison && s.end_ns != poison && s.begin_ns <= s.end_ns,
              "a block of a chain left no stamp");
    }
    return stamps;
  }

  static void append(ChainTimes& all, const ChainTimes& more) {
    const auto join = [](std::vector<double>& to, const std::vector<double>& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    join(all.duration_ns, more.duration_ns);
    join(all.gap_ns, more.gap_ns);
    join(all.period_ns, more.period_ns);
  }

  unsigned blocks_;
  double timer_step_ns_;
  DeviceArray<Word> words_;
  DeviceArray<Stamp> stamps_;
  DeviceArray<int> in_time_;
  HostFlag go_;
  EventTimer timer_;
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
};

// ---------------------------------------------------------------------------------------------
// Clocks.

struct ClockReading {
  long long cycles;
  std::uint64_t ns;
  std::uint64_t smallest_step_ns;
};

/// Counts cycles of one SM and nanoseconds for 20 ms.
__global__ void read_clocks(ClockReading* reading) {
  const std::uint64_t begin_ns = timer_ns();
  const long long begin_cycles = clock64();
  std::uint64_t last_ns = begin_ns;
  std::uint64_t smallest_step_ns = ~std::uint64_t{0};
  while (last_ns - begin_ns < 20'000'000) {
    const std::uint64_t now_ns = timer_ns();
    if (now_ns != last_ns && now_ns - last_ns < smallest_step_ns) {
      smallest_step_ns = now_ns - last_ns;
    }
    last_ns = now_ns;
  }
  *reading = {clock64() - begin_cycles, last_ns - begin_ns, smallest_step_ns};
}

ClockReading clocks_now() {
  DeviceArray<ClockReading> reading(1);
  read_clocks<<<1, 1>>>(reading.data());
  check_launch("read_clocks");
  return reading.to_host().front();
}

double mhz(const ClockReading& reading) {
  return static_cast<double>(reading.cycles) / static_cast<double>(reading.ns) * 1e3;
}

// ---------------------------------------------------------------------------------------------

int attribute(cudaDeviceAttr which, const char* name) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, which, 0), name);
  return value;
}

std::string installed_driver() {
  std::ifstream file("/proc/driver/nvidia/version");
  return driver_release({std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()});
}

void open_device(ProbeResult& result) {
  result.driver = installed_driver();
  check(cudaDriverGetVersion(&result.driver_cuda), "cudaDriverGetVersion");
  check(cudaRuntimeGetVersion(&result.runtime_cuda), "cudaRuntimeGetVersion");
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    throw std::runtime_error("no CUDA device: driver " + result.driver + " (CUDA " +
                             cuda_version(result.driver_cuda) + "), runtime CUDA " +
                             cuda_version(result.runtime_cuda) + ": " + cudaGetErrorString(error));
  }
  check(cudaSetDevice(0), "cudaSetDevice");
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  result.device = properties.name;
  result.sms = properties.multiProcessorCount;
  result.rated_sm_mhz = attribute(cudaDevAttrClockRate, "cudaDevAttrClockRate") * 1e-3;
  result.rated_memory_mhz =
      attribute(cudaDevAttrMemoryClockRate, "cudaDevAttrMemoryClockRate") * 1e-3;
}

ProbeResult probe(std::uint64_t wanted_buffer_bytes) {
  ProbeResult result;
  open_device(result);

  std::size_t free_bytes = 0;
  std::size_t total_bytes = 0;
  check(cudaMemGetInfo(&free_bytes, &total_bytes), "cudaMemGetInfo");
  const std::uint64_t words =
      buffer_words(free_bytes, wanted_buffer_bytes, sizeof(Word), kChunkWords);
  result.buffer_bytes = words * sizeof(Word);
  const auto l2_bytes =
      static_cast<std::uint64_t>(attribute(cudaDevAttrL2CacheSize, "cudaDevAttrL2CacheSize"));
  require(result.buffer_bytes >= 2 * kSmallestCopyBytes,
          "buffers of " + std::to_string(result.buffer_bytes) + " bytes are too small");
  if (result.buffer_bytes < 8 * l2_bytes) {
    std::cerr << "orrery_probe: warning: buffers of " << result.buffer_bytes
              << " bytes are partly cached, bandwidths are too high\n";
  }
  // A little more than half of an SM's shared memory, so that two blocks never share an SM, and the
  // rest stays L1 cache.
  const auto shared_bytes =
      static_cast<std::size_t>(attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor,
                                         "cudaDevAttrMaxSharedMemoryPerMultiprocessor")) /
          2 +
      1024;

  StreamProbe streaming(result.sms, shared_bytes, words);
  clocks_now();  // loads the kernel and wakes the device up
  const ClockReading before = clocks_now();
  result.timer_step_ns = static_cast<double>(before.smallest_step_ns);
  result.sm_mhz_before = mhz(before);

  ChainProbe chain(result.sms, result.timer_step_ns);
  result.stream = chain.in_stream();
  result.graph = chain.in_graph();
  for (const int sms : sms_to_measure(result.sms)) {
    result.bandwidth.push_back(streaming.bandwidth_on(sms));
    std::cerr << "orrery_probe: " << sms << " of " << result.sms << " SMs\n";
  }
  for (std::uint64_t bytes = kSmallestCopyBytes; 2 * bytes <= result.buffer_bytes; bytes *= 2) {
    result.copies.push_back(streaming.period_of_copies(bytes));
  }
  result.sm_mhz_after = mhz(clocks_now());
  return result;
}

}  // namespace
}  // namespace orrery

int main(int argc, char** argv) {
  std::uint64_t buffer_bytes = orrery::kWantedBufferBytes;
  if (argc == 2) buffer_bytes = std::strtoull(argv[1], nullptr, 10) << 20;
  if (argc > 2 || buffer_bytes == 0) {
    std::cerr << "usage: orrery_probe [BUFFER_MIB]\n";
    return 2;
  }
  try {
    std::cout << orrery::to_yaml(orrery::probe(buffer_bytes)) << std::flush;
  } catch (const std::exception& error) {
    std::cerr << "orrery_probe: " << error.what() << "\n";
    return 1;
  }
  return std::cout ? 0 : 1;
}
