#include "kernels/communicator.hpp"

#include <dlfcn.h>

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <utility>

#include "kernels/nccl_abi.hpp"

namespace orrery::kernels {
namespace {

constexpr const char* kNcclFile = "libnccl.so.2";

/// 22809: 2.28.9
std::string version_text(int code) {
  return std::to_string(code / 10000) + "." + std::to_string(code / 100 % 100) + "." +
         std::to_string(code % 100);
}

nccl::DataType data_type(ElementType type) {
  switch (type) {
    case ElementType::fp32:
      return nccl::float32;
    case ElementType::bf16:
      return nccl::bfloat16;
    case ElementType::fp64:
      return nccl::float64;
  }
  return nccl::int8;
}

/// Gives the processor away; for long once it has taken long.
class Patience {
 public:
  void wait() {
    constexpr auto kSpin = std::chrono::milliseconds(1);
    if (Clock::now() - began_ < kSpin) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(100));
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  Clock::time_point began_ = Clock::now();
};

}  // namespace

std::size_t bytes_of(ElementType type) {
  switch (type) {
    case ElementType::fp32:
      return 4;
    case ElementType::bf16:
      return 2;
    case ElementType::fp64:
      return 8;
  }
  return 0;
}

std::string_view name_of(ElementType type) {
  switch (type) {
    case ElementType::fp32:
      return "fp32";
    case ElementType::bf16:
      return "bf16";
    case ElementType::fp64:
      return "fp64";
  }
  return "";
}

std::variant<std::shared_ptr<const Nccl>, std::string> Nccl::load() {
  const char* const named = std::getenv("ORRERY_NCCL_LIBRARY");
  const std::string file = named != nullptr && *named != '\0' ? named : kNcclFile;
  // A kernel that is loaded when it is first launched may wait for all that run, and NCCL's wait
  // for other ranks: so all are loaded at once, unless the user knows better (CUDA programming
  // guide, "Lazy Loading", hazards of concurrent execution).
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  // Never closed: its threads may be inside.
  void* const library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* const why = dlerror();
    return "cannot load NCCL: " + std::string(why == nullptr ? file : why) +
           " (ORRERY_NCCL_LIBRARY may name it)";
  }
  auto functions = std::make_shared<NcclFunctions>();
  std::string missing;
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr && missing.empty()) missing = name;
  };
#define ORRERY_FIND(name) find(functions->name, #name)
  ORRERY_FIND(ncclGetVersion);
  ORRERY_FIND(ncclGetUniqueId);
  ORRERY_FIND(ncclCommInitRankConfig);
  ORRERY_FIND(ncclCommFinalize);
  ORRERY_FIND(ncclCommDestroy);
  ORRERY_FIND(ncclCommAbort);
  ORRERY_FIND(ncclCommGetAsyncError);
  ORRERY_FIND(ncclGetErrorString);
  ORRERY_FIND(ncclGetLastError);
  ORRERY_FIND(ncclAllReduce);
  ORRERY_FIND(ncclReduceScatter);
  ORRERY_FIND(ncclAllGather);
  ORRERY_FIND(ncclSend);
  ORRERY_FIND(ncclRecv);
  ORRERY_FIND(ncclGroupStart);
  ORRERY_FIND(ncclGroupEnd);
#undef ORRERY_FIND
  int version = 0;
  if (functions->ncclGetVersion != nullptr) functions->ncclGetVersion(&version);
  if (version < nccl::kLeastVersion) {
    return file + (version > 0 ? " is NCCL " + version_text(version) : " is no NCCL") +
           "; 2.18 or later is needed";
  }
  if (!missing.empty()) return file + " has no " + missing;
  return std::make_shared<const Nccl>(std::move(functions), version);
}

std::string Nccl::name() const {
  return "NCCL " + version_text(version_);
}

Nccl::Id Nccl::make_id() const {
  nccl::UniqueId made{};
  if (const nccl::Result result = functions_->ncclGetUniqueId(&made); result != nccl::success) {
    throw NcclError(std::string("ncclGetUniqueId: ") + functions_->ncclGetErrorString(result) +
                    ": " + functions_->ncclGetLastError(nullptr));
  }
  Id id;
  static_assert(sizeof id == sizeof made);
  std::memcpy(id.data(), &made, sizeof made);
  return id;
}

Communicator::Communicator(std::shared_ptr<const Nccl> nccl, Device& device, StreamHandle stream,
                           CommunicatorOptions options)
    : nccl_(std::move(nccl)), device_(device), stream_(stream), options_(std::move(options)) {
  // NCCL takes the GPU that is the thread's current one, which this makes it.
  if (device_.native_stream(stream_) == nullptr) {
    throw NcclError(device_.name() + " has no streams that NCCL knows");
  }
  nccl::UniqueId id{};
  std::memcpy(&id, options_.id.data(), sizeof id);
  nccl::Config config;
  config.blocking = 0;  // so that a member that does not come cannot hold this thread
  if (options_.max_ctas > 0) config.max_ctas = options_.max_ctas;
  try {
    settle(nccl_->functions().ncclCommInitRankConfig(&comm_, options_.members, id, options_.member,
                                                     &config),
           "opening a communicator");
  } catch (...) {
    abort();
    throw;
  }
}

Communicator::~Communicator() {
  if (comm_ == nullptr) return;
  // All members do this, each when its stream is idle; who waits in vain gives up.
  constexpr auto kAtMost = std::chrono::seconds(10);
  const auto until = std::chrono::steady_clock::now() + kAtMost;
  options_.while_waiting = [&] {
    if (std::chrono::steady_clock::now() > until) throw std::runtime_error("a member is gone");
  };
  try {
    settle(nccl_->functions().ncclCommFinalize(comm_), "closing a communicator");
    nccl_->functions().ncclCommDestroy(std::exchange(comm_, nullptr));
  } catch (const std::exception&) {
    abort();
  }
}

/// Until NCCL has done what was asked of it, as far as this thread is needed for it.
void Communicator::settle(int asked, const char* what) {
  const NcclFunctions& f = nccl_->functions();
  auto result = static_cast<nccl::Result>(asked);
  for (Patience patience; result == nccl::in_progress;) {
    options_.while_waiting();
    patience.wait();
    nccl::Result state = nccl::success;
    result = f.ncclCommGetAsyncError(comm_, &state);
    if (result == nccl::success) result = state;
  }
  if (result == nccl::success) return;
  const char* const details = f.ncclGetLastError(comm_);
  throw NcclError(std::string("NCCL: ") + what + ": " + f.ncclGetErrorString(result) +
                  (details == nullptr || *details == '\0' ? "" : std::string(": ") + details));
}

void Communicator::all_reduce(ElementType type, void* buffer, std::size_t elements) {
  if (elements == 0) return;
  settle(nccl_->functions().ncclAllReduce(buffer, buffer, elements, data_type(type), nccl::sum,
                                          comm_, device_.native_stream(stream_)),
         "all-reduce");
}

void Communicator::reduce_scatter(ElementType type, const void* whole, void* own,
                                  std::size_t part_elements) {
  if (part_elements == 0) return;
  settle(nccl_->functions().ncclReduceScatter(whole, own, part_elements, data_type(type), nccl::sum,
                                              comm_, device_.native_stream(stream_)),
         "reduce-scatter");
}

void Communicator::all_gather(const void* own, void* whole, std::size_t part_bytes) {
  if (part_bytes == 0) return;
  settle(nccl_->functions().ncclAllGather(own, whole, part_bytes, nccl::int8, comm_,
                                          device_.native_stream(stream_)),
         "all-gather");
}

void Communicator::exchange(std::span<const Piece> sent, std::span<const Piece> received) {
  const NcclFunctions& f = nccl_->functions();
  void* const stream = device_.native_stream(stream_);
  settle(f.ncclGroupStart(), "exchange");
  // In a group, calls only note what to do; all of it begins with the group's end.
  nccl::Result bad = nccl::success;
  const auto note = [&](nccl::Result result) {
    if (result != nccl::success && result != nccl::in_progress) bad = result;
  };
  for (const Piece& piece : sent) {
    if (piece.bytes > 0)
      note(f.ncclSend(piece.data, piece.bytes, nccl::int8, piece.member, comm_, stream));
  }
  for (const Piece& piece : received) {
    if (piece.bytes > 0)
      note(f.ncclRecv(piece.data, piece.bytes, nccl::int8, piece.member, comm_, stream));
  }
  const nccl::Result ended = f.ncclGroupEnd();
  settle(bad != nccl::success ? bad : ended, "exchange");
}

void Communicator::check() {
  nccl::Result state = nccl::success;
  const nccl::Result asked = nccl_->functions().ncclCommGetAsyncError(comm_, &state);
  if (asked != nccl::success) state = asked;
  if (state != nccl::in_progress) settle(state, "on its way");
}

void Communicator::abort() {
  if (comm_ != nullptr) nccl_->functions().ncclCommAbort(std::exchange(comm_, nullptr));
}

}  // namespace orrery::kernels
