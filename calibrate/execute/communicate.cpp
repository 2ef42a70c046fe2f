#include "calibrate/execute/communicate.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "calibrate/transport/collectives.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using kernels::Format;
using kernels::Matrix;

std::int64_t bytes_of(const Matrix& m) {
  return m.rows * m.columns * kernels::bits_of(m.format) / 8;
}

std::span<std::byte> memory(const Matrix& m) {
  ORRERY_CHECK(m.pitch == m.columns || m.rows == 1, "{} columns of {}", m.columns, m.pitch);
  return {static_cast<std::byte*>(m.data), static_cast<std::size_t>(bytes_of(m))};
}

/// Rows of a matrix as they travel: the elements of each, then their scales.
std::size_t row_bytes(const Matrix& m) {
  const auto elements = static_cast<std::size_t>(m.columns * kernels::bits_of(m.format) / 8);
  return elements +
         (m.scales == nullptr
              ? 0
              : 4 * static_cast<std::size_t>((m.columns + kernels::kTile - 1) / kernels::kTile));
}

void pack_row(const Matrix& m, std::int64_t row, std::byte* to) {
  const auto elements = static_cast<std::size_t>(m.columns * kernels::bits_of(m.format) / 8);
  const auto pitch = static_cast<std::size_t>(m.pitch * kernels::bits_of(m.format) / 8);
  std::memcpy(to, static_cast<const std::byte*>(m.data) + static_cast<std::size_t>(row) * pitch,
              elements);
  if (m.scales == nullptr) return;
  for (std::int64_t t = 0; t * kernels::kTile < m.columns; ++t) {
    std::memcpy(to + elements + 4 * static_cast<std::size_t>(t), m.scales + t * m.scale_pitch + row,
                4);
  }
}

void unpack_row(const Matrix& m, std::int64_t row, const std::byte* from) {
  const auto elements = static_cast<std::size_t>(m.columns * kernels::bits_of(m.format) / 8);
  const auto pitch = static_cast<std::size_t>(m.pitch * kernels::bits_of(m.format) / 8);
  std::memcpy(static_cast<std::byte*>(m.data) + static_cast<std::size_t>(row) * pitch, from,
              elements);
  if (m.scales == nullptr) return;
  for (std::int64_t t = 0; t * kernels::kTile < m.columns; ++t) {
    std::memcpy(m.scales + t * m.scale_pitch + row,
                from + elements + 4 * static_cast<std::size_t>(t), 4);
  }
}

float element(const Matrix& m, std::int64_t row, std::int64_t column) {
  const std::int64_t i = row * m.pitch + column;
  return m.format == Format::fp32
             ? static_cast<const float*>(m.data)[i]
             : kernels::float_of_bf16(static_cast<const std::uint16_t*>(m.data)[i]);
}

void set_element(const Matrix& m, std::int64_t row, std::int64_t column, float value) {
  const std::int64_t i = row * m.pitch + column;
  if (m.format == Format::fp32) {
    static_cast<float*>(m.data)[i] = value;
  } else {
    static_cast<std::uint16_t*>(m.data)[i] = kernels::bf16_of(value);
  }
}

void collective(const Communication& c, const GroupOp& op) {
  switch (c.kind) {
    case Communication::Kind::all_reduce:
      return all_reduce(op, element_type(c.out.format), memory(c.out));
    case Communication::Kind::reduce_scatter:
      return reduce_scatter(op, element_type(c.in.format), memory(c.in), memory(c.out));
    case Communication::Kind::all_gather:
      return all_gather(op, memory(c.in), memory(c.out));
    case Communication::Kind::sum_of_squares:
      return all_reduce(op, ElementType::fp64, std::as_writable_bytes(std::span(c.value, 1)));
    default:
      ORRERY_CHECK(false, "no collective");
  }
}

// ---- experts ----

/// Bytes that go to (or come from) each member, of so many rows.
template <class Count>
std::vector<std::uint64_t> bytes_of_rows(const std::vector<Count>& rows, std::size_t row_bytes) {
  std::vector<std::uint64_t> bytes;
  for (const Count count : rows) bytes.push_back(static_cast<std::uint64_t>(count) * row_bytes);
  return bytes;
}

void dispatch(const Communication& c, const GroupOp& op) {
  ExchangeRoute& route = *c.route;
  if (c.new_route) {
    make_route(c);
    const std::vector<std::uint64_t> coming = exchange_counts(op, rows_sent(route));
    route.received.assign(coming.begin(), coming.end());
  }
  const auto received =
      std::accumulate(route.received.begin(), route.received.end(), std::int64_t{0});
  ORRERY_CHECK(received <= c.out.rows, "{} tokens received, room for {}", received, c.out.rows);

  const std::size_t width = row_bytes(c.in);
  std::vector<std::byte> packed;
  for (const auto& tokens : route.sent) {
    for (const std::int32_t token : tokens) {
      packed.resize(packed.size() + width);
      pack_row(c.in, token, packed.data() + packed.size() - width);
    }
  }
  std::vector<std::byte> came(static_cast<std::size_t>(received) * width);
  all_to_all(op, packed, bytes_of_rows(rows_sent(route), width), came,
             bytes_of_rows(route.received, width));
  for (std::int64_t r = 0; r < received; ++r) {
    unpack_row(c.out, r, came.data() + static_cast<std::size_t>(r) * width);
  }
  if (!c.new_route) return;

  std::vector<std::int32_t> experts;
  std::vector<float> weights;
  for (std::size_t m = 0; m < c.members.size(); ++m) pack_choices(c, m, experts, weights);
  const auto choices = static_cast<std::size_t>(c.top_k);
  const auto sent_bytes = bytes_of_rows(rows_sent(route), choices * 4);
  const auto received_bytes = bytes_of_rows(route.received, choices * 4);
  const std::size_t slots = static_cast<std::size_t>(received) * choices;
  all_to_all(op, std::as_bytes(std::span(experts)), sent_bytes,
             std::as_writable_bytes(std::span(c.received_experts, slots)), received_bytes);
  all_to_all(op, std::as_bytes(std::span(weights)), sent_bytes,
             std::as_writable_bytes(std::span(c.received_weights, slots)), received_bytes);
  *c.received_tokens = static_cast<std::int32_t>(received);
}

void combine(const Communication& c, const GroupOp& op) {
  const ExchangeRoute& route = *c.route;
  const std::size_t width = row_bytes(c.in);
  const auto choices = static_cast<std::size_t>(c.top_k);
  const auto received = static_cast<std::size_t>(
      std::accumulate(route.received.begin(), route.received.end(), std::int64_t{0}));
  const std::vector<std::uint64_t> sent = rows_sent(route);
  const std::size_t back = std::accumulate(sent.begin(), sent.end(), std::size_t{0});

  std::vector<std::byte> packed(received * width);
  for (std::size_t r = 0; r < received; ++r) {
    pack_row(c.in, static_cast<std::int64_t>(r), packed.data() + r * width);
  }
  std::vector<std::byte> rows(back * width);
  all_to_all(op, packed, bytes_of_rows(route.received, width), rows, bytes_of_rows(sent, width));
  std::vector<float> values;
  if (c.slot_values != nullptr) {
    values.resize(back * choices);
    all_to_all(op, std::as_bytes(std::span(c.slot_values, received * choices)),
               bytes_of_rows(route.received, choices * 4),
               std::as_writable_bytes(std::span(values)), bytes_of_rows(sent, choices * 4));
  }

  const auto columns = static_cast<std::size_t>(c.out.columns);
  std::vector<float> sum(static_cast<std::size_t>(c.out.rows) * columns, 0.0F);
  if (c.token_values != nullptr) {
    std::fill_n(c.token_values, static_cast<std::size_t>(c.out.rows) * choices, 0.0F);
  }
  Matrix view = c.out;
  view.data = rows.data();
  view.pitch = c.out.columns;
  // In the order of the members, so that the sum is the same in every run.
  std::size_t row = 0;
  for (const auto& tokens : route.sent) {
    for (const std::int32_t token : tokens) {
      float* to = sum.data() + static_cast<std::size_t>(token) * columns;
      for (std::size_t k = 0; k < columns; ++k) {
        to[k] += element(view, static_cast<std::int64_t>(row), static_cast<std::int64_t>(k));
      }
      for (std::size_t k = 0; c.token_values != nullptr && k < choices; ++k) {
        // A choice has its expert on one member; the others say 0.
        c.token_values[static_cast<std::size_t>(token) * choices + k] += values[row * choices + k];
      }
      ++row;
    }
  }
  for (std::int64_t r = 0; r < c.out.rows; ++r) {
    for (std::int64_t k = 0; k < c.out.columns; ++k) {
      set_element(c.out, r, k,
                  sum[static_cast<std::size_t>(r) * columns + static_cast<std::size_t>(k)]);
    }
  }
}

}  // namespace

ElementType element_type(Format format) {
  ORRERY_CHECK(format == Format::fp32 || format == Format::bf16, "sums of {}",
               kernels::name_of(format));
  return format == Format::fp32 ? ElementType::fp32 : ElementType::bf16;
}

void make_route(const Communication& c) {
  ExchangeRoute& route = *c.route;
  route.sent.assign(c.members.size(), {});
  for (std::int64_t t = 0; t < c.in.rows; ++t) {
    for (std::int64_t i = 0; i < c.top_k; ++i) {
      const std::int64_t member = c.experts[t * c.top_k + i] / c.local_experts;
      auto& list = route.sent[static_cast<std::size_t>(member)];
      if (list.empty() || list.back() != t) list.push_back(static_cast<std::int32_t>(t));
    }
  }
}

void pack_choices(const Communication& c, std::size_t member, std::vector<std::int32_t>& experts,
                  std::vector<float>& weights) {
  const auto first = static_cast<std::int64_t>(member) * c.local_experts;
  for (const std::int32_t t : c.route->sent[member]) {
    for (std::int64_t i = 0; i < c.top_k; ++i) {
      const std::int64_t local = c.experts[t * c.top_k + i] - first;
      const bool there = local >= 0 && local < c.local_experts;
      experts.push_back(there ? static_cast<std::int32_t>(local) : -1);
      weights.push_back(there ? c.weights[t * c.top_k + i] : 0.0F);
    }
  }
}

std::vector<std::uint64_t> rows_sent(const ExchangeRoute& route) {
  std::vector<std::uint64_t> rows;
  for (const auto& tokens : route.sent) rows.push_back(tokens.size());
  return rows;
}

void communicate(const Communication& c, Transport& transport, std::int64_t step, OpId op,
                 const Program& program) {
  const auto name = [&] { return program.name(op); };
  const std::uint64_t tag = tag_of(static_cast<std::uint64_t>(step), op);
  const GroupOp group{.transport = transport, .group = c.members, .tag = tag, .name = name};
  switch (c.kind) {
    case Communication::Kind::send:
      return send(transport, c.members[0], tag, memory(c.in), name);
    case Communication::Kind::receive:
      return receive(transport, c.members[0], tag, memory(c.out), name);
    case Communication::Kind::dispatch:
      return dispatch(c, group);
    case Communication::Kind::combine:
      return combine(c, group);
    default:
      return collective(c, group);
  }
}

}  // namespace orrery
