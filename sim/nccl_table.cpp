#include "sim/nccl_table.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>

#include "sim/check.hpp"

namespace orrery {

std::string_view name_of(NcclOp op) {
  switch (op) {
    case NcclOp::all_reduce:
      return "all_reduce";
    case NcclOp::all_gather:
      return "all_gather";
    case NcclOp::reduce_scatter:
      return "reduce_scatter";
    case NcclOp::alltoall:
      return "alltoall";
    case NcclOp::broadcast:
      return "broadcast";
    case NcclOp::reduce:
      return "reduce";
    case NcclOp::gather:
      return "gather";
    case NcclOp::scatter:
      return "scatter";
    case NcclOp::sendrecv:
      return "sendrecv";
    case NcclOp::other:
      return "other";
  }
  return "";
}

namespace {

/// Each rank gives or gets an n-th of the buffer.
bool in_parts(NcclOp op) {
  return op == NcclOp::all_gather || op == NcclOp::reduce_scatter || op == NcclOp::alltoall ||
         op == NcclOp::gather || op == NcclOp::scatter;
}

}  // namespace

double bus_factor(NcclOp op, std::int64_t ranks) {
  const auto n = static_cast<double>(ranks);
  if (op == NcclOp::other || ranks < 1) return 0;
  if (op == NcclOp::all_reduce) return 2 * (n - 1) / n;
  return in_parts(op) ? (n - 1) / n : 1;
}

std::optional<Shape> shape_of(NcclOp op, std::int64_t bytes, std::int64_t ranks,
                              std::int64_t ranks_per_node) {
  const auto collective = [&](CollectiveKind kind) {
    return Shape{.work = Collective{kind, bytes, ranks, ranks_per_node}};
  };
  switch (op) {
    case NcclOp::all_reduce:
      return collective(CollectiveKind::all_reduce);
    case NcclOp::all_gather:
      return collective(CollectiveKind::all_gather);
    case NcclOp::reduce_scatter:
      return collective(CollectiveKind::reduce_scatter);
    case NcclOp::alltoall:
      return collective(CollectiveKind::all_to_all);
    case NcclOp::broadcast:
      return collective(CollectiveKind::broadcast);
    case NcclOp::sendrecv:
      return Shape{.work = Send{bytes, ranks <= ranks_per_node}};
    case NcclOp::reduce:
    case NcclOp::gather:
    case NcclOp::scatter:
    case NcclOp::other:
      return std::nullopt;
  }
  return std::nullopt;
}

NcclTable simulated_nccl_table(NcclOp op, std::int64_t ranks, std::int64_t ranks_per_node,
                               const std::vector<std::int64_t>& sizes, const SecondsOf& seconds) {
  ORRERY_CHECK(ranks >= 1, "ranks {}", ranks);
  constexpr std::int64_t kElement = 4;
  const std::int64_t unit = in_parts(op) ? 16 * ranks : kElement;
  NcclTable table{.op = op, .ranks = ranks, .ranks_per_node = ranks_per_node};
  std::int64_t last = 0;
  for (const std::int64_t size : sizes) {
    const std::int64_t bytes = size / unit * unit;
    if (bytes <= last) continue;
    last = bytes;
    const double s = seconds(bytes);
    ORRERY_CHECK(s > 0, "{} of {} bytes takes {} s", name_of(op), bytes, s);
    NcclRow row{.size_bytes = bytes, .count = bytes / kElement / (in_parts(op) ? ranks : 1)};
    row.type = "float";
    row.redop = op == NcclOp::all_reduce || op == NcclOp::reduce_scatter || op == NcclOp::reduce
                    ? "sum"
                    : "none";
    row.root = op == NcclOp::broadcast || op == NcclOp::reduce || op == NcclOp::gather ||
                       op == NcclOp::scatter
                   ? 0
                   : -1;
    const double algbw = static_cast<double>(bytes) / s / 1e9;
    row.out_of_place = NcclTiming{s * 1e6, algbw, algbw * bus_factor(op, ranks), std::nullopt};
    row.in_place = row.out_of_place;
    table.rows.push_back(std::move(row));
  }
  return table;
}

std::string nccl_number(double value, int width) {
  const auto wide = static_cast<std::size_t>(width);
  for (const int decimals : {2, 1, 0}) {
    std::string text = fmt::format("{:>{}.{}f}", value, width, decimals);
    if (text.size() <= wide) return text;
  }
  return fmt::format("{:>{}.{}e}", value, width, width >= 7 ? 1 : 0);
}

std::string format_nccl_table(const NcclTable& table, const std::vector<std::string>& remarks) {
  std::string out;
  const auto line = [&out](std::string text) {
    text.erase(text.find_last_not_of(' ') + 1);
    out += text + '\n';
  };
  line(fmt::format("# Collective test starting: {}_perf", name_of(table.op)));
  line(fmt::format("# simulated by orrery: {} ranks, {} per node", table.ranks,
                   table.ranks_per_node));
  for (const std::string& remark : remarks) line("# " + remark);
  line("#");
  constexpr auto kHead = "# {:>10}  {:>12}  {:>8}  {:>6}  {:>6}";
  constexpr auto kBody = "  {:>7}  {:>6}  {:>6}  {:>6}";
  line(fmt::format(kHead, "", "", "", "", "") +
       "           out-of-place                       in-place");
  const std::string names = fmt::format(kBody, "time", "algbw", "busbw", "#wrong");
  const std::string units = fmt::format(kBody, "(us)", "(GB/s)", "(GB/s)", "");
  line(fmt::format(kHead, "size", "count", "type", "redop", "root") + names + names);
  line(fmt::format(kHead, "(B)", "(elements)", "", "", "") + units + units);
  double sum = 0;
  std::size_t timings = 0;
  const auto body = [&](const std::optional<NcclTiming>& t) {
    if (!t) return std::string(33, ' ');
    sum += t->busbw_gbps;
    ++timings;
    return fmt::format(kBody, nccl_number(t->time_us, 7), nccl_number(t->algbw_gbps, 6),
                       nccl_number(t->busbw_gbps, 6), t->wrong ? fmt::to_string(*t->wrong) : "N/A");
  };
  for (const NcclRow& row : table.rows) {
    line(fmt::format("{:>12}  {:>12}  {:>8}  {:>6}  {:>6}", row.size_bytes, row.count, row.type,
                     row.redop, row.root) +
         body(row.out_of_place) + body(row.in_place));
  }
  if (timings > 0) {
    line(fmt::format("# Avg bus bandwidth    : {:g}", sum / static_cast<double>(timings)));
  }
  line("#");
  return out;
}

}  // namespace orrery
