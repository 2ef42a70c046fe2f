#pragma once
// Public tables of measured kernels: comma-separated text, gzip-compressed or not.

#include <functional>
#include <string>
#include <string_view>
#include <vector>

namespace orrery {

/// One file in memory. Quoted cells may contain commas; every row has a cell per column.
class TableFile {
 public:
  /// Throws InputError when the file cannot be read or a row has another number of cells than the
  /// header.
  explicit TableFile(const std::string& path);

  std::size_t size() const { return rows_.size(); }
  /// Position of a column; throws InputError when there is none of that name.
  std::size_t column(std::string_view name) const;
  const std::string& text(std::size_t row, std::size_t column) const { return rows_[row][column]; }
  double number(std::size_t row, std::size_t column) const;  ///< throws InputError when it is none

 private:
  [[noreturn]] void fail(std::size_t line, const std::string& message) const;

  std::string path_;
  std::vector<std::string> header_;
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace orrery
