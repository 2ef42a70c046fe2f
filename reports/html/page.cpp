#include "reports/html/page.hpp"

#include <fmt/format.h>
#include <rapidjson/reader.h>
#include <rapidjson/stringbuffer.h>
#include <rapidjson/writer.h>

#include <utility>
#include <vector>

#include "reports/html/assets.hpp"
#include "sim/check.hpp"

namespace orrery {

namespace {

/// Replaces every {{name}} of the template. What is put in is not looked at again.
std::string fill(std::string_view page,
                 const std::vector<std::pair<std::string_view, std::string_view>>& values) {
  std::string text;
  while (true) {
    const std::size_t open = page.find("{{");
    text += page.substr(0, open);
    if (open == std::string_view::npos) return text;
    const std::size_t close = page.find("}}", open);
    ORRERY_CHECK(close != std::string_view::npos, "page.html: a placeholder without an end");
    const std::string_view name = page.substr(open + 2, close - open - 2);
    bool known = false;
    for (const auto& [key, value] : values) {
      if (key != name) continue;
      text += value;
      known = true;
    }
    ORRERY_CHECK(known, "page.html: unknown placeholder {}", name);
    page.remove_prefix(close + 2);
  }
}

/// What a reader without scripts sees.
std::string plain_answer(const CapacityReport& report) {
  std::string text;
  for (const CapacityScenario& s : report.scenarios) {
    const Report& r = s.study.report;
    text += fmt::format("<h2>{}</h2><p>{} x {}, {}</p>", in_html(r.scenario), r.gpus,
                        in_html(r.device), in_html(r.plan));
    for (const Judgement& j : s.judgements) text += "<p>" + in_html(answer_of(j)) + "</p>";
    text += fmt::format("<p>A step takes {:.3g} s: {:.3g} tokens a day, {:.1f} tokens/s/GPU.</p>",
                        r.step_time_s, r.tokens_per_day, r.tokens_per_s_per_gpu);
  }
  return text;
}

/// Numbers come as text, and go as it.
class NumberKeepingWriter : public rapidjson::Writer<rapidjson::StringBuffer> {
 public:
  using Writer::Writer;
  bool RawNumber(const char* text, rapidjson::SizeType size, bool) {
    return RawValue(text, size, rapidjson::kNumberType);
  }
};

}  // namespace

std::string json_for_page(const std::string& json) {
  rapidjson::StringBuffer buffer;
  NumberKeepingWriter writer(buffer);
  rapidjson::Reader reader;
  rapidjson::MemoryStream stream(json.data(), json.size());
  reader.Parse<rapidjson::kParseNumbersAsStringsFlag | rapidjson::kParseIterativeFlag>(stream,
                                                                                       writer);
  ORRERY_CHECK(!reader.HasParseError(), "the page's own JSON is none, at byte {}",
               reader.GetErrorOffset());
  const std::string_view compact(buffer.GetString(), buffer.GetSize());
  std::string text;
  text.reserve(compact.size());
  for (const char c : compact) {
    if (c == '<') {
      text += "\\u003c";
    } else {
      text += c;
    }
  }
  return text;
}

std::string in_html(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '"':
        out += "&quot;";
        break;
      case '\'':
        out += "&#39;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

std::string html_page(const CapacityReport& report) {
  const PageAssets& assets = page_assets();
  std::string title = "Capacity report";
  if (!report.scenarios.empty()) {
    title = in_html(report.scenarios.front().study.report.scenario) + ": capacity report";
  }
  const std::string policy = fmt::format(
      "default-src 'none'; script-src '{}' '{}'; style-src '{}'; base-uri 'none'; form-action "
      "'none'",
      assets.library.hash, assets.script.hash, assets.style.hash);
  const std::string data = json_for_page(to_json(report));
  const std::string licence = in_html(assets.licence.text);
  const std::string plain = plain_answer(report);
  return fill(assets.page.text, {{"title", title},
                                 {"policy", policy},
                                 {"style", assets.style.text},
                                 {"plain", plain},
                                 {"data", data},
                                 {"library", assets.library.text},
                                 {"licence", licence},
                                 {"script", assets.script.text}});
}

}  // namespace orrery
