#include "reports/measured_timeline.hpp"

#include <fmt/format.h>
#include <rapidjson/error/en.h>
#include <rapidjson/reader.h>
#include <zlib.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string_view>

namespace orrery {

namespace {

constexpr std::size_t kMostBytes = std::size_t{1} << 30;

/// The text of a file, uncompressed (zlib reads plain files as they are).
std::optional<std::string> read_trace_text(const std::string& path, Problems& problems) {
  const std::unique_ptr<gzFile_s, int (*)(gzFile)> file(gzopen(path.c_str(), "rb"), gzclose);
  if (!file) {
    problems.add({path, 0, 0}, "cannot open the file");
    return std::nullopt;
  }
  std::string text;
  char chunk[1 << 16];
  for (int read = 0; (read = gzread(file.get(), chunk, sizeof chunk)) != 0;) {
    if (read < 0 || text.size() > kMostBytes) {
      problems.add({path, 0, 0}, read < 0 ? "cannot read the file" : "larger than 1 GiB");
      return std::nullopt;
    }
    text.append(chunk, static_cast<std::size_t>(read));
  }
  return text;
}

/// Events of {"traceEvents": [{"name", "ph", "ts", "dur", "args": {"op"}}]}, one at a time.
class TraceHandler : public rapidjson::BaseReaderHandler<rapidjson::UTF8<>, TraceHandler> {
 public:
  TraceHandler(const Program& program, Timeline& timeline)
      : program_(program), timeline_(timeline) {}

  bool StartObject() {
    if (++depth_ == kEvent) event_ = {};
    return true;
  }
  bool EndObject(rapidjson::SizeType) {
    if (depth_-- == kEvent) finish();
    return wrong_.empty();
  }
  bool StartArray() {
    ++depth_;
    return true;
  }
  bool EndArray(rapidjson::SizeType) {
    --depth_;
    return true;
  }
  bool Key(const char* text, rapidjson::SizeType size, bool) {
    key_.assign(text, size);
    return true;
  }
  bool String(const char* text, rapidjson::SizeType size, bool) {
    if (depth_ == kEvent && key_ == "ph") event_.complete = std::string_view(text, size) == "X";
    if (depth_ == kEvent && key_ == "name") event_.name.assign(text, size);
    return true;
  }
  bool Double(double value) {
    if (depth_ == kEvent && key_ == "ts") event_.start_us = value;
    if (depth_ == kEvent && key_ == "dur") event_.duration_us = value;
    if (depth_ == kEvent + 1 && key_ == "op") event_.op = value;
    return true;
  }
  bool Int(int value) { return Double(value); }
  bool Uint(unsigned value) { return Double(value); }
  bool Int64(std::int64_t value) { return Double(static_cast<double>(value)); }
  bool Uint64(std::uint64_t value) { return Double(static_cast<double>(value)); }

  std::size_t found() const { return found_; }
  const std::string& wrong() const { return wrong_; }

 private:
  static constexpr int kEvent = 3;
  struct Event {
    bool complete = false;
    std::string name;
    double start_us = -1;
    double duration_us = 0;
    double op = -1;
  };

  void finish() {
    if (!event_.complete || event_.op < 0 || !(event_.start_us >= 0)) return;
    if (event_.op >= static_cast<double>(program_.size())) {
      wrong_ = fmt::format("op {:.0f} ({}), but this step has {} ops", event_.op, event_.name,
                           program_.size());
      return;
    }
    const OpId op(static_cast<std::size_t>(event_.op));
    const std::string& label = program_.shapes()[program_.shape(op)].label;
    if (label != event_.name) {
      wrong_ = fmt::format("op {:.0f} is {} in the trace, and {} in this step", event_.op,
                           event_.name, label);
      return;
    }
    ++found_;
    timeline_.start_ps[op] = std::llround(event_.start_us * 1e6);
    timeline_.end_ps[op] = std::llround((event_.start_us + event_.duration_us) * 1e6);
  }

  const Program& program_;
  Timeline& timeline_;
  int depth_ = 0;
  std::string key_;
  Event event_;
  std::size_t found_ = 0;
  std::string wrong_;
};

}  // namespace

Timeline read_measured_timeline(const std::string& path, const Program& program,
                                Problems& problems) {
  Timeline timeline;
  timeline.start_ps.assign(program.size(), 0);
  timeline.end_ps.assign(program.size(), 0);
  const auto text = read_trace_text(path, problems);
  if (!text) return timeline;
  TraceHandler handler(program, timeline);
  rapidjson::Reader reader;
  rapidjson::MemoryStream stream(text->data(), text->size());
  reader.Parse(stream, handler);
  const std::string hint =
      "a trace of this scenario's step, as orrery run --execute cpu --trace FILE writes it";
  if (!handler.wrong().empty()) {
    problems.add({path, 0, 0}, "the trace is of another step: " + handler.wrong(), hint);
  } else if (reader.HasParseError()) {
    problems.add({path, 0, 0},
                 fmt::format("no JSON: {} (byte {})",
                             rapidjson::GetParseError_En(reader.GetParseErrorCode()),
                             reader.GetErrorOffset()),
                 hint);
  } else if (handler.found() == 0) {
    problems.add({path, 0, 0}, "no ops in this trace", hint);
  }
  return timeline;
}

}  // namespace orrery
