#pragma once
// JSON objects for the writers of this folder; needs RapidJSON's headers, so only .cpp files
// include it.

#include <rapidjson/prettywriter.h>
#include <rapidjson/stringbuffer.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <string_view>

#include "reports/goodput.hpp"
#include "reports/interval.hpp"
#include "reports/report.hpp"

namespace orrery {

using JsonWriter = rapidjson::PrettyWriter<rapidjson::StringBuffer>;

/// Key and value in one call. Numbers that JSON cannot write are null.
class JsonObject {
 public:
  explicit JsonObject(JsonWriter& writer) : writer_(writer) { writer_.StartObject(); }
  ~JsonObject() { writer_.EndObject(); }
  JsonObject(const JsonObject&) = delete;
  JsonObject& operator=(const JsonObject&) = delete;

  void operator()(std::string_view key, double value) {
    name(key);
    if (std::isfinite(value)) {
      writer_.Double(value);
    } else {
      writer_.Null();
    }
  }
  void operator()(std::string_view key, std::int64_t value) {
    name(key);
    writer_.Int64(value);
  }
  void operator()(std::string_view key, int value) { (*this)(key, std::int64_t{value}); }
  void operator()(std::string_view key, std::uint64_t value) {
    name(key);
    writer_.Uint64(value);
  }
  void operator()(std::string_view key, bool value) {
    name(key);
    writer_.Bool(value);
  }
  void operator()(std::string_view key, std::string_view value) {
    name(key);
    writer_.String(value.data(), static_cast<rapidjson::SizeType>(value.size()));
  }
  void operator()(std::string_view key, const std::string& value) {
    (*this)(key, std::string_view(value));
  }
  void null(std::string_view key) { name(key).Null(); }
  void operator()(std::string_view key, const char* value) {
    (*this)(key, std::string_view(value));
  }

  /// A nested value follows.
  JsonWriter& name(std::string_view key) {
    writer_.Key(key.data(), static_cast<rapidjson::SizeType>(key.size()));
    return writer_;
  }

  JsonWriter& writer() { return writer_; }

  /// write_row(row) writes each as a value.
  template <class Rows, class WriteRow>
  void array(std::string_view key, const Rows& rows, WriteRow write_row) {
    name(key);
    writer_.StartArray();
    for (const auto& row : rows) write_row(row);
    writer_.EndArray();
  }

 private:
  JsonWriter& writer_;
};

/// One document of two spaces' indentation and a final newline; `body(object)` fills it.
template <class Body>
std::string json_document(Body body) {
  rapidjson::StringBuffer buffer;
  JsonWriter writer(buffer);
  writer.SetIndent(' ', 2);
  {
    JsonObject object(writer);
    body(object);
  }
  return std::string(buffer.GetString(), buffer.GetSize()) + "\n";
}

void write_phases(JsonWriter& writer, const PhaseTimes& times);
void write_interval(JsonObject& object, std::string_view key, const Interval& interval);
void write_uncertainty(JsonWriter& writer, const StepUncertainty& uncertainty);
/// As keys of `object`.
void write_goodput(JsonObject& object, const Goodput& goodput);

}  // namespace orrery
