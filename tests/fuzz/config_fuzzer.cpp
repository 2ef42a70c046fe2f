// Any bytes at all: the reader must end in a tree or in located problems, never in a crash, and
// what it says about the text must lie inside the text.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string>

#include "sim/check.hpp"
#include "sim/config.hpp"

namespace {

using orrery::Dimension;
using orrery::MapReader;
using orrery::Node;
using orrery::Problems;

void walk(const Node& node, Problems& problems) {
  ORRERY_CHECK(node.at().line >= 0 && node.at().column >= 0, "a place before the file");
  if (node.kind() == Node::Kind::map) {
    MapReader reader(node, problems, "map");
    reader.integer("layers", 1, 10'000);
    reader.number_or("eps", 1.0, 0.0, std::numeric_limits<double>::max());
    reader.quantity_or("bandwidth", 1.0, Dimension::bytes_per_s);
    reader.quantity_or("latency", 1.0, Dimension::seconds);
    reader.flag_or("overlap", false);
    reader.integers("dims", 1, 1 << 20);
    reader.choice<int>("schedule", {{"1f1b", 1}, {"dualpipe", 2}});
    reader.finish();
  }
  for (std::size_t i = 0; i < node.size(); ++i) walk(node[i], problems);
  if (node.kind() != Node::Kind::scalar) return;
  for (const Dimension d :
       {Dimension::scalar, Dimension::bytes, Dimension::bytes_per_s, Dimension::flops_per_s,
        Dimension::seconds, Dimension::hertz, Dimension::watts, Dimension::dollars}) {
    const auto value = orrery::parse_quantity(node.text(), d);
    ORRERY_CHECK(!value || *value - *value == 0, "a quantity that is not finite");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  Problems problems;
  const Node root = orrery::read_document_text(text, "fuzz.yaml", problems);
  ORRERY_CHECK(!root.at().file.empty() || !problems.empty(), "no tree and no problem");
  walk(root, problems);
  if (!problems.empty()) {
    ORRERY_CHECK(!orrery::format_problems(problems.list()).empty(), "problems without text");
  }
  return 0;
}
