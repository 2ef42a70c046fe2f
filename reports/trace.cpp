#include "reports/trace.hpp"

#include <fmt/compile.h>
#include <fmt/format.h>
#include <rapidjson/stringbuffer.h>
#include <rapidjson/writer.h>
#include <zlib.h>

#include <algorithm>
#include <span>
#include <stdexcept>

#include "reports/attribution.hpp"
#include "reports/ops_by_stream.hpp"
#include "reports/output.hpp"
#include "sim/memory.hpp"

namespace orrery {

namespace {

constexpr std::size_t kChunk = 1 << 16;

/// Text on its way to a file, compressed if asked.
class Sink {
 public:
  Sink(const std::string& path, bool gzip) : file_(path), gzip_(gzip) {
    if (!gzip_) return;
    constexpr int kGzipWindow = 15 + 16;  // +16: a gzip header; it holds no time and no name
    if (deflateInit2(&stream_, kLevel, Z_DEFLATED, kGzipWindow, 8, Z_DEFAULT_STRATEGY) != Z_OK) {
      throw std::runtime_error("zlib: no memory");
    }
  }
  ~Sink() {
    if (gzip_) deflateEnd(&stream_);
  }
  Sink(const Sink&) = delete;
  Sink& operator=(const Sink&) = delete;

  fmt::memory_buffer& text() { return text_; }
  void flush_if_full() {
    if (text_.size() >= kChunk) flush(Z_NO_FLUSH);
  }
  void finish() {
    flush(Z_FINISH);
    file_.commit();
  }

 private:
  static constexpr int kLevel = 3;  // a fifth larger than level 6, in a third of its time

  void flush(int mode) {
    if (!gzip_) {
      file_.write({text_.data(), text_.size()});
    } else {
      char out[kChunk];
      stream_.next_in = reinterpret_cast<Bytef*>(text_.data());
      stream_.avail_in = static_cast<uInt>(text_.size());
      do {
        stream_.next_out = reinterpret_cast<Bytef*>(out);
        stream_.avail_out = kChunk;
        deflate(&stream_, mode);
        file_.write({out, kChunk - stream_.avail_out});
      } while (stream_.avail_out == 0);
    }
    text_.clear();
  }

  OutputFile file_;
  bool gzip_;
  z_stream stream_{};
  fmt::memory_buffer text_;
};

std::string quoted(std::string_view text) {
  rapidjson::StringBuffer buffer;
  rapidjson::Writer<rapidjson::StringBuffer> writer(buffer);
  writer.String(text.data(), static_cast<rapidjson::SizeType>(text.size()));
  return {buffer.GetString(), buffer.GetSize()};
}

/// Rounding is monotone, so what nests in picoseconds nests in nanoseconds.
std::int64_t nanoseconds(Picoseconds t) {
  return (t + kPsPerNs / 2) / kPsPerNs;
}

// Lanes of a rank, in their order on the screen.
constexpr int kCellLane = 0;
constexpr int phase_lane(StreamKind stream) {
  return 1 + 2 * static_cast<int>(stream);
}
constexpr int stream_lane(StreamKind stream) {
  return phase_lane(stream) + 1;
}

std::string cell_name(const Cell& cell) {
  switch (cell.kind) {
    case CellKind::forward:
      return fmt::format("F{}", cell.micro_batch);
    case CellKind::backward:
    case CellKind::backward_input:
      return fmt::format("B{}", cell.micro_batch);
    case CellKind::weight:
      return fmt::format("W{}", cell.micro_batch);
    case CellKind::overlapped:
      return fmt::format("F{}&B{}", cell.micro_batch, cell.pair_micro_batch);
    case CellKind::optimizer:
      return "optimizer";
  }
  return "?";
}

class TraceWriter {
 public:
  TraceWriter(const Study& study, const std::vector<std::uint32_t>& ranks, const std::string& path)
      : program_(study.program),
        timeline_(study.run.timeline),
        report_(study.report),
        sink_(path, path.size() > 3 && path.compare(path.size() - 3, 3, ".gz") == 0),
        ranks_(ranks),
        chosen_(study.program.ranks(), false) {
    for (const std::uint32_t rank : ranks_) chosen_[rank] = true;
    for (ShapeId s{}; s.value < program_.shapes().size(); ++s) {
      const Shape& shape = program_.shapes()[s];
      shape_name_.push_back(quoted(shape.label));
      shape_args_.push_back(fmt::format(R"("shape":{},"price":{})", quoted(describe(shape)),
                                        quoted(name_of(study.run.prices.prices[s].source))));
    }
  }

  void write() {
    put(R"({{"displayTimeUnit":"ms","otherData":{{"scenario":{},"plan":{},"fingerprint":"{:016x}"}},)"
        "\n\"traceEvents\":[",
        quoted(report_.scenario), quoted(report_.plan), report_.fingerprint);
    const auto spans = cell_spans(program_, timeline_);
    const auto memory = trace_memory(program_, timeline_);
    const OpsByStream by_stream = group_ops(program_, chosen_);
    for (const std::uint32_t rank : ranks_) {
      name_process(rank);
      write_cells(rank, spans[rank]);
      for (int k = 0; k < kStreamsPerRank; ++k) {
        const auto kind = static_cast<StreamKind>(k);
        const auto ops = by_stream.of(stream_of(RankId(rank), kind));
        if (ops.empty()) continue;
        write_phases(rank, kind, ops);
        write_ops(rank, kind, ops);
      }
      write_memory(rank, memory.steps[RankId(rank)]);
    }
    put("\n]}}\n");
    sink_.finish();
  }

 private:
  template <class... Args>
  void put(fmt::format_string<Args...> format, Args&&... args) {
    fmt::format_to(std::back_inserter(sink_.text()), format, std::forward<Args>(args)...);
    sink_.flush_if_full();
  }

  void separate() {
    if (!first_) sink_.text().push_back(',');
    sink_.text().push_back('\n');
    first_ = false;
  }

  void name_process(std::uint32_t rank) {
    const RankReport& r = report_.ranks[rank];
    separate();
    put(R"({{"name":"process_name","ph":"M","pid":{},"args":{{"name":"rank {}, position {}, stages {}"}}}})",
        rank, rank, r.position, fmt::join(r.stages, " "));
    separate();
    put(R"({{"name":"process_sort_index","ph":"M","pid":{},"args":{{"sort_index":{}}}}})", rank,
        rank);
  }

  void name_lane(std::uint32_t rank, int lane, std::string_view name) {
    separate();
    put(R"({{"name":"thread_name","ph":"M","pid":{},"tid":{},"args":{{"name":"{}"}}}})", rank, lane,
        name);
    separate();
    put(R"({{"name":"thread_sort_index","ph":"M","pid":{},"tid":{},"args":{{"sort_index":{}}}}})",
        rank, lane, lane);
  }

  /// Up to and without the closing brace of args. `name` is a JSON string.
  void begin_slice(std::string_view name, std::string_view category, std::uint32_t rank, int lane,
                   Picoseconds start_ps, Picoseconds end_ps) {
    const std::int64_t start = nanoseconds(start_ps);
    const std::int64_t duration = nanoseconds(end_ps) - start;
    separate();
    fmt::format_to(std::back_inserter(sink_.text()),
                   FMT_COMPILE(R"({{"name":{},"cat":"{}","ph":"X","pid":{},"tid":{},"ts":{}.{:03},)"
                               R"("dur":{}.{:03},"args":{{)"),
                   name, category, rank, lane, start / 1000, start % 1000, duration / 1000,
                   duration % 1000);
  }

  /// Cells one after the other, each from where the one before it ended.
  void write_cells(std::uint32_t rank, const std::vector<CellSpan>& spans) {
    name_lane(rank, kCellLane, "cells");
    for (const CellSpan* span : owned_in_order(spans)) {
      const Cell& cell = program_.cells()[span->cell];
      begin_slice(quoted(cell_name(cell)), "cell", rank, kCellLane, span->owned_from_ps,
                  span->end_ps);
      put(R"("kind":"{}","stage":{},"pair_stage":{},"span_ms":{:.6f}}}}})", name_of(cell.kind),
          cell.stage, cell.pair_stage, milliseconds(span->end_ps - span->start_ps));
    }
  }

  /// A slice for every run of ops that share phase, layer, stage and micro-batch.
  void write_phases(std::uint32_t rank, StreamKind stream, std::span<const OpId> ops) {
    const int lane = phase_lane(stream);
    name_lane(rank, lane, fmt::format("phases of {}", name_of(stream)));
    for (std::size_t i = 0; i < ops.size();) {
      const OpTag& tag = program_.tag(ops[i]);
      std::size_t end = i + 1;
      while (end < ops.size() && program_.tag(ops[end]) == tag) ++end;
      const Picoseconds from = timeline_.start_ps[ops[i]];
      const Picoseconds to = timeline_.end_ps[ops[end - 1]];
      i = end;
      if (from == to) continue;
      begin_slice(quoted(name_of(tag.phase)), "phase", rank, lane, from, to);
      write_place(tag);
      put("}}}}");
    }
  }

  void write_place(const OpTag& tag) {
    put(R"("stage":{},"micro_batch":{})", tag.stage, tag.micro_batch);
    if (tag.layer != kNoLayer) put(R"(,"layer":{})", tag.layer);
  }

  void write_ops(std::uint32_t rank, StreamKind stream, std::span<const OpId> ops) {
    const int lane = stream_lane(stream);
    name_lane(rank, lane, name_of(stream));
    for (const OpId op : ops) {
      const Picoseconds start = timeline_.start_ps[op];
      const Picoseconds end = timeline_.end_ps[op];
      if (start == end) continue;
      const OpTag& tag = program_.tag(op);
      begin_slice(shape_name_[program_.shape(op)], name_of(program_.kind(op)), rank, lane, start,
                  end);
      fmt::format_to(std::back_inserter(sink_.text()), FMT_COMPILE(R"("op":{},"phase":"{}",{},)"),
                     op.value, name_of(tag.phase), shape_args_[program_.shape(op)]);
      write_place(tag);
      put("}}}}");
      if (program_.kind(op) == OpKind::transfer) write_flow(rank, stream, op);
    }
  }

  /// Both ends of a transfer occupy a lane each; the arrow joins them.
  void write_flow(std::uint32_t rank, StreamKind stream, OpId op) {
    const auto streams = program_.streams_of(op);
    if (streams.size() != 2) return;
    for (const StreamId s : streams) {
      if (!chosen_[rank_of(s).value]) return;
    }
    const bool sends = streams.front() == stream_of(RankId(rank), stream);
    const std::int64_t start = nanoseconds(timeline_.start_ps[op]);
    const std::int64_t at = sends ? start : start + (nanoseconds(timeline_.end_ps[op]) - start) / 2;
    separate();
    put(R"({{"name":"send","cat":"pipeline","ph":"{}","id":{},"pid":{},"tid":{},"ts":{}.{:03}{}}})",
        sends ? "s" : "f", op.value, rank, stream_lane(stream), at / 1000, at % 1000,
        sends ? "" : R"(,"bp":"e")");
  }

  /// The sum after everything of one instant has happened.
  void write_memory(std::uint32_t rank, const std::vector<MemoryStep>& steps) {
    std::array<std::int64_t, kMemoryKinds> held{};
    for (std::size_t i = 0; i < steps.size(); ++i) {
      held[static_cast<std::size_t>(steps[i].kind)] += steps[i].bytes;
      if (i + 1 < steps.size() && nanoseconds(steps[i + 1].at_ps) == nanoseconds(steps[i].at_ps)) {
        continue;
      }
      const std::int64_t at = nanoseconds(steps[i].at_ps);
      separate();
      put(R"({{"name":"memory, bytes","ph":"C","pid":{},"ts":{}.{:03},"args":{{)", rank, at / 1000,
          at % 1000);
      for (std::size_t k = 0; k < kMemoryKinds; ++k) {
        put(R"({}"{}":{})", k == 0 ? "" : ",", name_of(static_cast<MemoryKind>(k)), held[k]);
      }
      put("}}}}");
    }
  }

  const Program& program_;
  const Timeline& timeline_;
  const Report& report_;
  Sink sink_;
  const std::vector<std::uint32_t>& ranks_;
  std::vector<bool> chosen_;
  IdVector<ShapeId, std::string> shape_name_;
  IdVector<ShapeId, std::string> shape_args_;
  bool first_ = true;
};

}  // namespace

std::vector<std::uint32_t> representative_ranks(const Report& report) {
  std::vector<std::uint32_t> ranks;
  int last_position = -1;
  for (const RankReport& rank : report.ranks) {
    if (rank.position != last_position) ranks.push_back(rank.rank);
    last_position = rank.position;
  }
  return ranks;
}

void write_trace(const Study& study, const std::vector<std::uint32_t>& ranks,
                 const std::string& path) {
  TraceWriter(study, ranks, path).write();
}

}  // namespace orrery
