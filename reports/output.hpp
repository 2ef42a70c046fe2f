#pragma once
// Files that are written whole or not at all.

#include <cstdio>
#include <string>
#include <string_view>

namespace orrery {

/// Writes to a temporary name beside `path` and renames it on commit(); without commit() nothing is
/// left.
/// "-" is standard output. What exists and is no regular file (a pipe, /dev/null) is written in
/// place. Every failure is a std::runtime_error that names the path.
class OutputFile {
 public:
  explicit OutputFile(std::string path);
  ~OutputFile();
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  void write(std::string_view text);
  void commit();

 private:
  [[noreturn]] void fail(int error) const;
  std::string path_;
  std::string temporary_;  // empty: written in place
  std::FILE* file_ = nullptr;
};

/// The whole text at once.
void write_file(const std::string& path, std::string_view text);

}  // namespace orrery
