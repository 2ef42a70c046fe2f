#pragma once
// What if: changes to a document before it is read, as `--set plan.layout.pp=8` states them.
//
//   PATH=VALUE     puts a value: any of YAML's on one line ("8", "bf16", "{pp: 8, ep: 64}", "[4,
//   4]") PATH=*FACTOR   multiplies the number that is there and keeps its unit ("160 GB/s" -> "320
//   GB/s") PATH=          removes the key, whether it is there or not
//
// A path is keys with dots between them and elements of lists by number, from 0 on: "a.b[3].c", or
// "a.b.3.c". Where it meets the name of a file that the reader opens (model, cluster, profile,
// fabric, expert_exchange), it goes on in that file, as if that stood there. Maps that are missing
// on the way are made. Of several overrides of the same place the last wins. Paths of files in
// values are relative to the folder of the document that is overridden.
//
// A document with overrides is a document: readers see no difference, and what they find wrong in
// an overridden value, or about a key that they do not know, is located in the override's text.

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "sim/config.hpp"

namespace orrery {

struct Override {
  std::string text;                  ///< "plan.layout.pp=8"
  Location at = {"override", 1, 1};  ///< of its first character
  std::string source_line = {};      ///< that line, where the text is not all of it
};
using Overrides = std::vector<Override>;

/// The n-th text is located at `name`:n.
Overrides overrides_of(std::span<const std::string> texts, const std::string& name);

/// The elements of a list of texts in a document; a problem where it is none.
Overrides read_overrides(const Node& list, Problems& problems);

/// `key` at the start of a path, with more behind it, is looked for below `under` where the root
/// has no such key.
struct PathAlias {
  std::string_view key;
  std::string_view under;
};

/// The document with its overrides, in order. Shares all else with `root`, which stays as it is. No
/// file is opened yet: overrides that go on in one wait at the scalar that names it.
Node with_overrides(const Node& root, const Overrides& overrides, Problems& problems,
                    std::span<const PathAlias> aliases = {});

/// The file that a scalar names, found at `path`, with the overrides that wait for it.
Node read_named_document(const Node& name, const std::string& path, Problems& problems);

/// The overrides that wait at a scalar for the file that it names, as texts with the rest of the
/// path: "device.sms=100".
std::vector<std::string> overrides_below(const Node& name);

/// Once all is read, and without problems: those that still wait at something that nobody read as a
/// file. `root` is what with_overrides() returned.
void report_without_effect(const Node& root, Problems& problems);

}  // namespace orrery
