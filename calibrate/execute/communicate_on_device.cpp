#include "calibrate/execute/communicate_on_device.hpp"

#include <fmt/core.h>

#include <algorithm>
#include <chrono>
#include <numeric>
#include <set>
#include <stdexcept>
#include <thread>

#include "calibrate/execute/communicate.hpp"
#include "calibrate/transport/collectives.hpp"
#include "calibrate/transport/open_communicator.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using kernels::Communicator;
using kernels::Format;
using kernels::Matrix;
using kernels::Piece;
using Kind = Communication::Kind;

std::size_t bytes_of(const Matrix& m) {
  ORRERY_CHECK(m.pitch == m.columns || m.rows == 1, "{} columns of {}", m.columns, m.pitch);
  return static_cast<std::size_t>(m.rows * m.columns * kernels::bits_of(m.format) / 8);
}

std::size_t elements_of(const Matrix& m) {
  return static_cast<std::size_t>(m.rows * m.columns);
}

/// A token goes to so many members at most.
std::int64_t slots_of(const Communication& c) {
  return std::min(c.top_k, static_cast<std::int64_t>(c.members.size()));
}

std::int64_t own_tokens(const Communication& c) {
  return c.kind == Kind::combine ? c.out.rows : c.in.rows;
}

std::int64_t tiles_of(const Matrix& m) {
  return (m.columns + kernels::kTile - 1) / kernels::kTile;
}

using Rows = std::vector<std::uint64_t>;  ///< by member

std::uint64_t sum_of(const Rows& rows) {
  return std::accumulate(rows.begin(), rows.end(), std::uint64_t{0});
}

Rows rows_received(const ExchangeRoute& route) {
  return {route.received.begin(), route.received.end()};
}

/// Consecutive pieces of an array, of so many rows for each member.
void add_pieces(std::vector<Piece>& pieces, const void* data, const Rows& rows,
                std::size_t row_bytes) {
  auto* at = static_cast<std::byte*>(const_cast<void*>(data));
  for (std::size_t m = 0; m < rows.size(); ++m) {
    pieces.push_back({static_cast<int>(m), at, rows[m] * row_bytes});
    at += rows[m] * row_bytes;
  }
}

std::size_t row_bytes_of(const Matrix& m) {
  ORRERY_CHECK(m.pitch == m.columns, "{} columns of {}", m.columns, m.pitch);
  return static_cast<std::size_t>(m.columns * kernels::bits_of(m.format) / 8);
}

/// Scales of FP8 lie by tile; of one member's rows they are columns in there. `apart` has each
/// member's behind each other. Calls that copy from one to the other.
template <class Enqueue>
void copy_scales(const Matrix& m, float* apart, const Rows& rows, bool to_apart, Enqueue enqueue) {
  const std::int64_t tiles = tiles_of(m);
  std::int64_t first = 0;
  for (const std::uint64_t count : rows) {
    const auto columns = static_cast<std::int64_t>(count);
    const Matrix among{.data = m.scales + first,
                       .rows = tiles,
                       .columns = columns,
                       .pitch = m.scale_pitch,
                       .format = Format::fp32};
    const Matrix alone{.data = apart + tiles * first,
                       .rows = tiles,
                       .columns = columns,
                       .pitch = columns,
                       .format = Format::fp32};
    if (columns > 0) {
      enqueue(kernels::Copy{.from = to_apart ? among : alone, .to = to_apart ? alone : among});
    }
    first += columns;
  }
}

}  // namespace

DeviceCommunication::DeviceCommunication(Transport& transport, kernels::Device& device,
                                         std::shared_ptr<const kernels::Nccl> nccl,
                                         const Program& program, const Lowered& lowered,
                                         Tensors& tensors, Watch& watch,
                                         const std::vector<kernels::StreamHandle>& streams)
    : transport_(transport),
      device_(device),
      nccl_(std::move(nccl)),
      program_(program),
      tensors_(tensors),
      watch_(watch),
      streams_(streams) {
  std::set<StreamKind> talking;
  for (const LoweredOp& op : lowered.ops) {
    if (op.communication) talking.insert(op.streams.front());
  }
  if (talking.empty()) return;
  constexpr int kMostCtas = 32;  // what NCCL takes at most where nobody says
  const int share = std::clamp(device.sms() / static_cast<int>(talking.size()), 1, kMostCtas);
  transport.barrier("opening communicators");
  for (const LoweredOp& op : lowered.ops) {
    if (!op.communication) continue;
    open(op, share);
    talks_[op.op.value] = device_.create_event();
    const Communication& c = *op.communication;
    if (c.route == nullptr) continue;
    room_of(op);
    if (!c.new_route) continue;
    routed_[op.op.value] = device_.create_event();
    const std::int64_t rows = own_tokens(c) * slots_of(c);
    const std::size_t number = routes_.size();
    if (routes_.count(c.route) > 0) continue;
    routes_[c.route] = {
        tensors_.array<std::int32_t>(fmt::format("tokens sent by route {}", number), rows),
        tensors_.array<std::int32_t>(fmt::format("rows of tokens by route {}", number), rows)};
  }
  look_ = [this] { watch_.look(); };
}

DeviceCommunication::~DeviceCommunication() = default;

/// The communicator of an op, unless it is there already. Ranks come here in the order of ids.
void DeviceCommunication::open(const LoweredOp& op, int max_ctas) {
  const auto on = program_.streams_of(op.op);
  std::unique_ptr<Communicator>& communicator = communicators_[{on.begin(), on.end()}];
  if (communicator) return;
  std::vector<int> members;
  for (const StreamId stream : on) members.push_back(static_cast<int>(rank_of(stream).value));
  const int sms = program_.shapes()[program_.shape(op.op)].sms;
  const auto name = [&] { return program_.name(op.op); };
  const auto until = std::chrono::steady_clock::now() + transport_.timeout();
  look_ = [this, members, until, &name] {
    transport_.check(members, name);
    if (std::chrono::steady_clock::now() < until) return;
    throw std::runtime_error(fmt::format(
        "not open within {:.3g} s", std::chrono::duration<double>(transport_.timeout()).count()));
  };
  communicator =
      open_communicator(transport_, nccl_, device_, stream_of(op), members, tag_of(0, op.op),
                        sms > 0 ? std::min(sms, max_ctas) : max_ctas, name, [this] { look_(); });
}

kernels::StreamHandle DeviceCommunication::stream_of(const LoweredOp& op) const {
  return streams_[static_cast<std::size_t>(op.streams.front())];
}

Communicator& DeviceCommunication::communicator_of(const LoweredOp& op) {
  device_.record(stream_of(op), talks_.at(op.op.value));
  const auto on = program_.streams_of(op.op);
  return *communicators_.at({on.begin(), on.end()});
}

void DeviceCommunication::check() {
  try {
    for (const auto& [streams, communicator] : communicators_) communicator->check();
  } catch (const kernels::NcclError&) {
    ask_who_failed();
    throw;
  }
}

/// NCCL knows that a rank is gone, not which; who has failed says so itself, if it still can.
void DeviceCommunication::ask_who_failed() {
  constexpr auto kPatience = std::chrono::seconds(1);
  const auto until = std::chrono::steady_clock::now() + kPatience;
  while (std::chrono::steady_clock::now() < until) {
    transport_.check({}, "communication of devices");
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
}

void DeviceCommunication::abort() {
  for (const auto& [streams, communicator] : communicators_) communicator->abort();
}

kernels::EventHandle DeviceCommunication::enqueue(const LoweredOp& op, std::int64_t step) {
  try {
    switch (op.communication->kind) {
      case Kind::dispatch:
        dispatch(op, step);
        break;
      case Kind::combine:
        combine(op);
        break;
      default:
        transfer_or_collective(op);
    }
  } catch (const kernels::NcclError&) {
    ask_who_failed();
    throw;
  }
  return talks_.at(op.op.value);
}

void DeviceCommunication::transfer_or_collective(const LoweredOp& op) {
  const Communication& c = *op.communication;
  Communicator& with = communicator_of(op);
  // A transfer's communicator has two members; the sender is the first.
  switch (c.kind) {
    case Kind::send: {
      const Piece piece{1, c.in.data, bytes_of(c.in)};
      return with.exchange({&piece, 1}, {});
    }
    case Kind::receive: {
      const Piece piece{0, c.out.data, bytes_of(c.out)};
      return with.exchange({}, {&piece, 1});
    }
    case Kind::all_reduce:
      ORRERY_CHECK(c.out.pitch == c.out.columns || c.out.rows == 1, "{} with gaps",
                   program_.name(op.op));
      return with.all_reduce(element_type(c.out.format), c.out.data, elements_of(c.out));
    case Kind::reduce_scatter:
      ORRERY_CHECK(bytes_of(c.in) == bytes_of(c.out) * c.members.size(), "{}: {} of {} bytes",
                   program_.name(op.op), bytes_of(c.out), bytes_of(c.in));
      return with.reduce_scatter(element_type(c.in.format), c.in.data, c.out.data,
                                 elements_of(c.out));
    case Kind::all_gather:
      ORRERY_CHECK(bytes_of(c.out) == bytes_of(c.in) * c.members.size(), "{}: {} of {} bytes",
                   program_.name(op.op), bytes_of(c.in), bytes_of(c.out));
      return with.all_gather(c.in.data, c.out.data, bytes_of(c.in));
    case Kind::sum_of_squares:
      return with.all_reduce(kernels::ElementType::fp64, c.value, 1);
    default:
      ORRERY_CHECK(false, "{} is an exchange", program_.name(op.op));
  }
}

DeviceCommunication::Room DeviceCommunication::room_of(const LoweredOp& op) {
  const Communication& c = *op.communication;
  const std::int64_t capacity = own_tokens(c) * slots_of(c);
  const Matrix& there = c.kind == Kind::combine ? c.in : c.out;  // rows of other ranks' tokens
  const auto name = [&](const char* what) {
    return fmt::format("exchange: {} of {} x {} {}, stream {}", what, capacity, there.columns,
                       kernels::name_of(there.format), name_of(op.streams.front()));
  };
  Room room{
      .rows = tensors_.matrix(name("rows"), capacity, there.columns, there.format, there.scaling),
      .experts = tensors_.array<std::int32_t>(name("experts"), capacity * c.top_k),
      .values = tensors_.array<float>(name("values"), capacity * c.top_k)};
  if (there.scales != nullptr) {
    ORRERY_CHECK(there.scaling == kernels::Scaling::rows, "scales that are not of rows");
    room.scales_sent = tensors_.array<float>(name("scales sent"), capacity * tiles_of(there));
    room.scales_received =
        tensors_.array<float>(name("scales received"), there.rows * tiles_of(there));
  }
  return room;
}

void DeviceCommunication::find_route(const LoweredOp& op, std::int64_t step) {
  const Communication& c = *op.communication;
  const kernels::EventHandle routed = routed_.at(op.op.value);
  device_.record(stream_of(op), routed);
  while (!device_.reached(routed)) {
    look_();
    std::this_thread::yield();
  }

  const auto choices = static_cast<std::size_t>(c.in.rows * c.top_k);
  std::vector<std::int32_t> chosen(choices);
  std::vector<float> chosen_weights(choices);
  device_.download(chosen.data(), c.experts, choices * sizeof(std::int32_t));
  device_.download(chosen_weights.data(), c.weights, choices * sizeof(float));
  Communication here = c;
  here.experts = chosen.data();
  here.weights = chosen_weights.data();
  make_route(here);

  ExchangeRoute& route = *c.route;
  const auto name = [&] { return program_.name(op.op); };
  const GroupOp group{.transport = transport_,
                      .group = c.members,
                      .tag = tag_of(static_cast<std::uint64_t>(step), op.op),
                      .name = name};
  const Rows coming = exchange_counts(group, rows_sent(route));
  route.received.assign(coming.begin(), coming.end());
  ORRERY_CHECK(sum_of(coming) <= static_cast<std::uint64_t>(c.out.rows),
               "{} tokens received, room for {}", sum_of(coming), c.out.rows);

  // The stream is idle up to here, so nothing reads what is written now.
  const auto slots = static_cast<std::size_t>(slots_of(c));
  std::vector<std::int32_t> token_of_row;
  std::vector<std::int32_t> row_of_token(static_cast<std::size_t>(c.in.rows) * slots, -1);
  std::vector<std::size_t> used(static_cast<std::size_t>(c.in.rows), 0);
  std::vector<std::int32_t> experts;
  std::vector<float> weights;
  for (std::size_t m = 0; m < c.members.size(); ++m) {
    for (const std::int32_t token : route.sent[m]) {
      const auto t = static_cast<std::size_t>(token);
      row_of_token[t * slots + used[t]++] = static_cast<std::int32_t>(token_of_row.size());
      token_of_row.push_back(token);
    }
    pack_choices(here, m, experts, weights);
  }
  const auto upload = [&](void* to, const auto& values) {
    device_.upload(to, values.data(), values.size() * sizeof values[0]);
  };
  const RouteRows& rows = routes_.at(c.route);
  const Room room = room_of(op);
  upload(rows.token, token_of_row);
  upload(rows.row, row_of_token);
  upload(room.experts, experts);
  upload(room.values, weights);
  const auto received = static_cast<std::int32_t>(sum_of(coming));
  device_.upload(c.received_tokens, &received, sizeof received);
}

void DeviceCommunication::dispatch(const LoweredOp& op, std::int64_t step) {
  const Communication& c = *op.communication;
  if (c.new_route) find_route(op, step);
  const kernels::StreamHandle stream = stream_of(op);
  const int sms = program_.shapes()[program_.shape(op.op)].sms;
  const auto call = [&](const kernels::Call& what) { device_.enqueue(stream, what, sms); };
  const Rows sent = rows_sent(*c.route);
  const Rows received = rows_received(*c.route);
  const Room room = room_of(op);
  if (const auto rows = static_cast<std::int64_t>(sum_of(sent)); rows > 0) {
    call(kernels::Permute{
        .from = c.in, .to = rows_of(room.rows, 0, rows), .row_source = routes_.at(c.route).token});
  }
  std::vector<Piece> to;
  std::vector<Piece> from;
  add_pieces(to, room.rows.data, sent, row_bytes_of(room.rows));
  add_pieces(from, c.out.data, received, row_bytes_of(c.out));
  if (c.out.scales != nullptr) {
    copy_scales(room.rows, room.scales_sent, sent, true, call);
    const auto bytes = static_cast<std::size_t>(tiles_of(c.out)) * sizeof(float);
    add_pieces(to, room.scales_sent, sent, bytes);
    add_pieces(from, room.scales_received, received, bytes);
  }
  if (c.new_route) {
    const auto bytes = static_cast<std::size_t>(c.top_k) * 4;
    add_pieces(to, room.experts, sent, bytes);
    add_pieces(from, c.received_experts, received, bytes);
    add_pieces(to, room.values, sent, bytes);
    add_pieces(from, c.received_weights, received, bytes);
  }
  communicator_of(op).exchange(to, from);
  if (c.out.scales != nullptr) copy_scales(c.out, room.scales_received, received, false, call);
}

void DeviceCommunication::combine(const LoweredOp& op) {
  const Communication& c = *op.communication;
  const kernels::StreamHandle stream = stream_of(op);
  const int sms = program_.shapes()[program_.shape(op.op)].sms;
  const Rows sent = rows_received(*c.route);  // back to where they came from
  const Rows received = rows_sent(*c.route);
  const Room room = room_of(op);
  std::vector<Piece> to;
  std::vector<Piece> from;
  add_pieces(to, c.in.data, sent, row_bytes_of(c.in));
  add_pieces(from, room.rows.data, received, row_bytes_of(room.rows));
  if (c.slot_values != nullptr) {
    const auto bytes = static_cast<std::size_t>(c.top_k) * sizeof(float);
    add_pieces(to, c.slot_values, sent, bytes);
    add_pieces(from, room.values, received, bytes);
  }
  communicator_of(op).exchange(to, from);
  // A token's rows are in the order of the members, and so are sums.
  const std::int32_t* const rows = routes_.at(c.route).row;
  const std::int64_t slots = slots_of(c);
  device_.enqueue(
      stream, kernels::Unpermute{.from = room.rows, .to = c.out, .slot_row = rows, .top_k = slots},
      sms);
  if (c.token_values == nullptr) return;
  const auto matrix = [&](float* data, std::int64_t of_rows) {
    return Matrix{.data = data,
                  .rows = of_rows,
                  .columns = c.top_k,
                  .pitch = c.top_k,
                  .format = Format::fp32};
  };
  // A choice has its expert on one member; the others say 0.
  device_.enqueue(stream,
                  kernels::Unpermute{.from = matrix(room.values, room.rows.rows),
                                     .to = matrix(c.token_values, c.out.rows),
                                     .slot_row = rows,
                                     .top_k = slots},
                  sms);
}

}  // namespace orrery
