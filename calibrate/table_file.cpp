#include "calibrate/table_file.hpp"

#include <fmt/core.h>
#include <zlib.h>

#include <algorithm>
#include <array>
#include <cstdlib>

#include "sim/config.hpp"

namespace orrery {
namespace {

[[noreturn]] void refuse(const std::string& path, int line, const std::string& message) {
  Problem problem;
  problem.at.file = path;
  problem.at.line = line;
  problem.message = message;
  throw InputError({problem});
}

std::string read_all(const std::string& path) {
  gzFile file = gzopen(path.c_str(), "rb");  // also reads files that are not compressed
  if (file == nullptr) refuse(path, 0, "cannot open the file");
  std::string content;
  std::array<char, 65536> buffer{};
  int got = 0;
  while ((got = gzread(file, buffer.data(), static_cast<unsigned>(buffer.size()))) > 0) {
    content.append(buffer.data(), static_cast<std::size_t>(got));
  }
  gzclose(file);
  if (got < 0) refuse(path, 0, "cannot decompress the file");
  return content;
}

std::vector<std::string> split(std::string_view line) {
  std::vector<std::string> cells(1);
  bool quoted = false;
  for (const char c : line) {
    if (c == '"') {
      quoted = !quoted;
    } else if (c == ',' && !quoted) {
      cells.emplace_back();
    } else if (c != '\r') {
      cells.back() += c;
    }
  }
  return cells;
}

}  // namespace

TableFile::TableFile(const std::string& path) : path_(path) {
  const std::string content = read_all(path);
  std::size_t start = 0;
  for (std::size_t line = 1; start < content.size(); ++line) {
    const std::size_t end = std::min(content.find('\n', start), content.size());
    const std::string_view text(content.data() + start, end - start);
    start = end + 1;
    if (text.empty()) continue;
    std::vector<std::string> cells = split(text);
    if (header_.empty()) {
      header_ = std::move(cells);
    } else if (cells.size() != header_.size()) {
      fail(line, fmt::format("{} cells under {} columns", cells.size(), header_.size()));
    } else {
      rows_.push_back(std::move(cells));
    }
  }
}

std::size_t TableFile::column(std::string_view name) const {
  const auto found = std::find(header_.begin(), header_.end(), name);
  if (found == header_.end()) fail(1, fmt::format("no column '{}'", name));
  return static_cast<std::size_t>(found - header_.begin());
}

double TableFile::number(std::size_t row, std::size_t column) const {
  const std::string& cell = rows_[row][column];
  char* end = nullptr;
  const double value = std::strtod(cell.c_str(), &end);
  if (cell.empty() || *end != '\0') fail(row + 2, fmt::format("'{}' is not a number", cell));
  return value;
}

void TableFile::fail(std::size_t line, const std::string& message) const {
  refuse(path_, static_cast<int>(line), message);
}

}  // namespace orrery
