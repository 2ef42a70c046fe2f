#include "calibrate/execute/communicate.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "calibrate/transport.hpp"
#include "sim/check.hpp"

namespace orrery {
namespace {

using kernels::Format;
using kernels::Matrix;

/// The messages of one op in one step, which come in numbered parts.
class Messages {
 public:
  Messages(const Communication& c, Transport& transport, std::int64_t step, OpId op,
           const Program& program)
      : members_(c.members), transport_(transport), program_(program), op_(op) {
    constexpr int kPartBits = 3, kOpBits = 36;
    ORRERY_CHECK(op.value < std::uint64_t{1} << kOpBits, "op {}", op.value);
    tag_ = (static_cast<std::uint64_t>(step) << (kOpBits + kPartBits)) |
           (std::uint64_t{op.value} << kPartBits);
    ORRERY_CHECK(tag_ < kOwnTags, "step {}", step);
  }

  template <class T>
  void send(std::size_t member, int part, std::span<const T> data) {
    transport_.send(members_[member], tag_ + static_cast<std::uint64_t>(part), std::as_bytes(data));
  }
  template <class T>
  void receive(std::size_t member, int part, std::span<T> data) {
    transport_.receive(members_[member], tag_ + static_cast<std::uint64_t>(part),
                       std::as_writable_bytes(data), program_.name(op_));
  }

 private:
  const std::vector<int>& members_;
  Transport& transport_;
  const Program& program_;
  OpId op_;
  std::uint64_t tag_ = 0;
};

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

/// out[i] = the sum of all parts' element i, in their order, rounded once.
void sum_up(const std::vector<std::span<const std::byte>>& parts, Format format,
            std::span<std::byte> out) {
  const auto count = static_cast<std::int64_t>(out.size()) * 8 / kernels::bits_of(format);
  const auto row = [&](std::span<const std::byte> bytes) {
    Matrix m;
    m.data = const_cast<std::byte*>(bytes.data());
    m.rows = 1;
    m.columns = m.pitch = count;
    m.format = format;
    return m;
  };
  const Matrix to = row(out);
  for (std::int64_t i = 0; i < count; ++i) {
    float sum = 0;
    for (const auto& part : parts) sum += element(row(part), 0, i);
    set_element(to, 0, i, sum);
  }
}

/// Where member `index`'s part of `bytes` begins, in whole elements; parts are equal where that
/// goes.
std::size_t part_begin(std::size_t bytes, std::size_t width, std::size_t members,
                       std::size_t index) {
  return bytes / width * index / members * width;
}

/// Every member sends each other one its part, and adds up its own from all: bytes (n - 1) / n each
/// way, as in a ring.
void reduce_parts(std::span<const std::byte> all, Format format, std::size_t members,
                  std::size_t self, Messages& messages, std::span<std::byte> out) {
  const auto width = static_cast<std::size_t>(kernels::bits_of(format) / 8);
  const auto part_of = [&](std::size_t i) {
    const std::size_t begin = part_begin(all.size(), width, members, i);
    return all.subspan(begin, part_begin(all.size(), width, members, i + 1) - begin);
  };
  for (std::size_t i = 0; i < members; ++i) {
    if (i != self) messages.send(i, 0, part_of(i));
  }
  std::vector<std::vector<std::byte>> received(members);
  std::vector<std::span<const std::byte>> parts(members);
  for (std::size_t i = 0; i < members; ++i) {
    if (i == self) {
      // Kept apart, since `out` may be its place.
      received[i].assign(part_of(i).begin(), part_of(i).end());
    } else {
      received[i].resize(out.size());
      messages.receive(i, 0, std::span<std::byte>(received[i]));
    }
    parts[i] = received[i];
  }
  sum_up(parts, format, out);
}

/// Every member's part to all others.
void gather_parts(std::span<std::byte> all, std::size_t width, std::size_t members,
                  std::size_t self, Messages& messages) {
  const auto part_of = [&](std::size_t i) {
    const std::size_t begin = part_begin(all.size(), width, members, i);
    return all.subspan(begin, part_begin(all.size(), width, members, i + 1) - begin);
  };
  for (std::size_t i = 0; i < members; ++i) {
    if (i != self) messages.send(i, 1, std::span<const std::byte>(part_of(self)));
  }
  for (std::size_t i = 0; i < members; ++i) {
    if (i != self) messages.receive(i, 1, part_of(i));
  }
}

void collective(const Communication& c, Messages& messages) {
  const std::size_t n = c.members.size();
  const auto self = static_cast<std::size_t>(c.self);
  switch (c.kind) {
    case Communication::Kind::all_reduce: {
      const auto all = memory(c.out);
      const auto width = static_cast<std::size_t>(kernels::bits_of(c.out.format) / 8);
      const std::size_t begin = part_begin(all.size(), width, n, self);
      const auto own = all.subspan(begin, part_begin(all.size(), width, n, self + 1) - begin);
      reduce_parts(all, c.out.format, n, self, messages, own);
      return gather_parts(all, width, n, self, messages);
    }
    case Communication::Kind::reduce_scatter:
      return reduce_parts(memory(c.in), c.in.format, n, self, messages, memory(c.out));
    case Communication::Kind::all_gather: {
      const auto own = memory(c.in), all = memory(c.out);
      const auto place = all.subspan(self * own.size(), own.size());
      if (place.data() != own.data()) std::memcpy(place.data(), own.data(), own.size());
      return gather_parts(all, static_cast<std::size_t>(kernels::bits_of(c.out.format) / 8), n,
                          self, messages);
    }
    case Communication::Kind::sum_of_squares: {
      for (std::size_t i = 0; i < n; ++i) {
        if (i != self) messages.send(i, 0, std::span<const double>(c.value, 1));
      }
      double sum = 0;
      for (std::size_t i = 0; i < n; ++i) {
        double part = *c.value;
        if (i != self) messages.receive(i, 0, std::span<double>(&part, 1));
        sum += part;
      }
      *c.value = sum;
      return;
    }
    default:
      ORRERY_CHECK(false, "no collective");
  }
}

// ---- experts ----

/// Which of this rank's tokens each member gets: those that chose one of its experts.
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

/// The experts of the member that gets the tokens, by their index there, and the weights; -1 and 0
/// for experts elsewhere.
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

void dispatch(const Communication& c, Messages& messages) {
  const std::size_t n = c.members.size();
  const auto self = static_cast<std::size_t>(c.self);
  ExchangeRoute& route = *c.route;
  if (c.new_route) {
    make_route(c);
    route.received.assign(n, 0);
    for (std::size_t i = 0; i < n; ++i) {
      const auto count = static_cast<std::int32_t>(route.sent[i].size());
      if (i == self) {
        route.received[i] = count;
      } else {
        messages.send(i, 0, std::span<const std::int32_t>(&count, 1));
      }
    }
  }
  const std::size_t width = row_bytes(c.in);
  const auto choices = static_cast<std::size_t>(c.top_k);
  std::vector<std::byte> own_rows;
  std::vector<std::int32_t> own_experts;
  std::vector<float> own_weights;
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<std::byte> rows(route.sent[i].size() * width);
    for (std::size_t r = 0; r < route.sent[i].size(); ++r) {
      pack_row(c.in, route.sent[i][r], rows.data() + r * width);
    }
    std::vector<std::int32_t> experts;
    std::vector<float> weights;
    if (c.new_route) pack_choices(c, i, experts, weights);
    if (i == self) {
      own_rows = std::move(rows);
      own_experts = std::move(experts);
      own_weights = std::move(weights);
      continue;
    }
    messages.send(i, 1, std::span<const std::byte>(rows));
    if (c.new_route) {
      messages.send(i, 2, std::span<const std::int32_t>(experts));
      messages.send(i, 3, std::span<const float>(weights));
    }
  }
  std::int64_t row = 0;
  for (std::size_t i = 0; i < n; ++i) {
    if (c.new_route && i != self)
      messages.receive(i, 0, std::span<std::int32_t>(&route.received[i], 1));
    const auto count = static_cast<std::size_t>(route.received[i]);
    ORRERY_CHECK(row + route.received[i] <= c.out.rows, "more than {} tokens received", c.out.rows);
    std::vector<std::byte> rows =
        i == self ? std::move(own_rows) : std::vector<std::byte>(count * width);
    if (i != self) messages.receive(i, 1, std::span<std::byte>(rows));
    for (std::size_t r = 0; r < count; ++r) {
      unpack_row(c.out, row + static_cast<std::int64_t>(r), rows.data() + r * width);
    }
    if (c.new_route) {
      std::int32_t* experts = c.received_experts + row * c.top_k;
      float* weights = c.received_weights + row * c.top_k;
      if (i == self) {
        std::copy(own_experts.begin(), own_experts.end(), experts);
        std::copy(own_weights.begin(), own_weights.end(), weights);
      } else {
        messages.receive(i, 2, std::span<std::int32_t>(experts, count * choices));
        messages.receive(i, 3, std::span<float>(weights, count * choices));
      }
    }
    row += route.received[i];
  }
  if (c.new_route) *c.received_tokens = static_cast<std::int32_t>(row);
}

void combine(const Communication& c, Messages& messages) {
  const std::size_t n = c.members.size();
  const auto self = static_cast<std::size_t>(c.self);
  const ExchangeRoute& route = *c.route;
  const std::size_t width = row_bytes(c.in);
  const auto choices = static_cast<std::size_t>(c.top_k);
  std::vector<std::byte> own_rows;
  std::int64_t row = 0, own_first = 0;
  for (std::size_t i = 0; i < n; ++i) {
    const auto count = static_cast<std::size_t>(route.received[i]);
    std::vector<std::byte> rows(count * width);
    for (std::size_t r = 0; r < count; ++r) {
      pack_row(c.in, row + static_cast<std::int64_t>(r), rows.data() + r * width);
    }
    if (i == self) {
      own_rows = std::move(rows);
      own_first = row;
    } else {
      messages.send(i, 1, std::span<const std::byte>(rows));
      if (c.slot_values != nullptr) {
        messages.send(i, 2, std::span<const float>(c.slot_values + row * c.top_k, count * choices));
      }
    }
    row += route.received[i];
  }
  const auto columns = static_cast<std::size_t>(c.out.columns);
  std::vector<float> sum(static_cast<std::size_t>(c.out.rows) * columns, 0.0F);
  if (c.token_values != nullptr) {
    std::fill_n(c.token_values, static_cast<std::size_t>(c.out.rows) * choices, 0.0F);
  }
  // In the order of the members, so that the sum is the same in every run.
  for (std::size_t i = 0; i < n; ++i) {
    const auto& tokens = route.sent[i];
    std::vector<std::byte> rows =
        i == self ? std::move(own_rows) : std::vector<std::byte>(tokens.size() * width);
    if (i != self) messages.receive(i, 1, std::span<std::byte>(rows));
    std::vector<float> values;
    const float* of_slots = nullptr;
    if (c.token_values != nullptr) {
      of_slots = c.slot_values + own_first * c.top_k;
      if (i != self) {
        values.resize(tokens.size() * choices);
        messages.receive(i, 2, std::span<float>(values));
        of_slots = values.data();
      }
    }
    Matrix view = c.out;
    view.data = rows.data();
    view.pitch = c.out.columns;
    for (std::size_t r = 0; r < tokens.size(); ++r) {
      float* to = sum.data() + static_cast<std::size_t>(tokens[r]) * columns;
      for (std::size_t k = 0; k < columns; ++k) {
        to[k] += element(view, static_cast<std::int64_t>(r), static_cast<std::int64_t>(k));
      }
      if (of_slots == nullptr) continue;
      for (std::size_t k = 0; k < choices; ++k) {
        // A choice has its expert on one member; the others say 0.
        c.token_values[static_cast<std::size_t>(tokens[r]) * choices + k] +=
            of_slots[r * choices + k];
      }
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

void communicate(const Communication& c, Transport& transport, std::int64_t step, OpId op,
                 const Program& program) {
  Messages messages(c, transport, step, op, program);
  switch (c.kind) {
    case Communication::Kind::send:
      return messages.send(0, 0, std::span<const std::byte>(memory(c.in)));
    case Communication::Kind::receive:
      return messages.receive(0, 0, memory(c.out));
    case Communication::Kind::dispatch:
      return dispatch(c, messages);
    case Communication::Kind::combine:
      return combine(c, messages);
    default:
      return collective(c, messages);
  }
}

}  // namespace orrery
