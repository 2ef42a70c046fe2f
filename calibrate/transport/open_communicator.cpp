#include "calibrate/transport/open_communicator.hpp"

#include <fmt/core.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string_view>

#include "calibrate/transport/collectives.hpp"
#include "sim/check.hpp"

namespace orrery {

std::unique_ptr<kernels::Communicator> open_communicator(
    Transport& transport, std::shared_ptr<const kernels::Nccl> nccl, kernels::Device& device,
    kernels::StreamHandle stream, std::span<const int> members, std::uint64_t tag, int max_ctas,
    OpName name, std::function<void()> look) {
  const auto self = std::find(members.begin(), members.end(), transport.rank());
  ORRERY_CHECK(self != members.end(), "rank {} is no member of {}", transport.rank(), name.str());
  kernels::CommunicatorOptions options{.member = static_cast<int>(self - members.begin()),
                                       .members = static_cast<int>(members.size()),
                                       .max_ctas = max_ctas,
                                       .while_waiting = std::move(look)};
  try {
    if (options.member == 0) options.id = nccl->make_id();
    broadcast({.transport = transport, .group = members, .tag = tag, .name = name}, 0, options.id);
    return std::make_unique<kernels::Communicator>(std::move(nccl), device, stream,
                                                   std::move(options));
  } catch (const TransportError&) {
    throw;
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(fmt::format("rank {}: communicator of {} ({}): {}", transport.rank(),
                                         list_ranks(members), name.str(), error.what()));
  }
}

LocalPlace local_place(Transport& transport) {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  std::uint64_t hash = 0xcbf29ce484222325;  // FNV-1a
  for (const char c : std::string_view(host)) {
    hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001b3;
  }
  const std::vector<std::uint64_t> hosts = transport.roll_call(hash, "ranks of a machine");
  const auto begin = hosts.begin();
  return {.index = static_cast<int>(std::count(begin, begin + transport.rank(), hash)),
          .ranks = static_cast<int>(std::count(begin, hosts.end(), hash))};
}

int gpu_of(const LocalPlace& place, int gpus) {
  if (place.ranks <= gpus) return place.index;
  // Several processes that see one GPU each: NCCL says so if it is the same one.
  if (gpus == 1) return 0;
  throw std::runtime_error(fmt::format(
      "{} ranks on this machine, and {} GPUs: each rank takes one of its own", place.ranks, gpus));
}

}  // namespace orrery
