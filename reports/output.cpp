#include "reports/output.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <stdexcept>

namespace orrery {

namespace fs = std::filesystem;

OutputFile::OutputFile(std::string path) : path_(std::move(path)) {
  if (path_ == "-") {
    file_ = stdout;
    return;
  }
  std::error_code error;
  const fs::file_status status = fs::status(path_, error);
  if (fs::is_directory(status)) fail(EISDIR);
  if (fs::exists(status) && !fs::is_regular_file(status)) {
    file_ = std::fopen(path_.c_str(), "wb");
  } else {
    // A link stays a link: what it points to is replaced.
    const fs::path target = fs::is_symlink(fs::symlink_status(path_, error))
                                ? fs::weakly_canonical(path_, error)
                                : fs::path(path_);
    temporary_ = fmt::format("{}.{}.tmp", target.string(), ::getpid());
    file_ = std::fopen(temporary_.c_str(), "wbx");
  }
  if (file_ == nullptr) {
    const int opening = errno;
    temporary_.clear();
    fail(opening);
  }
}

OutputFile::~OutputFile() {
  if (file_ != nullptr && file_ != stdout) std::fclose(file_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

void OutputFile::write(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), file_) != text.size()) fail(errno);
}

void OutputFile::commit() {
  if (std::fflush(file_) != 0) fail(errno);
  if (file_ == stdout) {
    file_ = nullptr;
    return;
  }
  const int closed = std::fclose(file_);
  file_ = nullptr;
  if (closed != 0) fail(errno);
  if (temporary_.empty()) return;
  const std::string suffix = fmt::format(".{}.tmp", ::getpid());
  const std::string target = temporary_.substr(0, temporary_.size() - suffix.size());
  if (std::rename(temporary_.c_str(), target.c_str()) != 0) fail(errno);
  temporary_.clear();
}

void OutputFile::fail(int error) const {
  throw std::runtime_error(fmt::format("cannot write {}: {}",
                                       path_ == "-" ? "standard output" : "'" + path_ + "'",
                                       std::strerror(error)));
}

void write_file(const std::string& path, std::string_view text) {
  OutputFile file(path);
  file.write(text);
  file.commit();
}

}  // namespace orrery
