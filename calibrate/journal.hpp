#pragma once
// What a calibration has measured so far, on disk after every result: a run that was stopped or
// killed goes on where it was.

#include <cstdio>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "calibrate/measure.hpp"
#include "sim/shape.hpp"

namespace orrery {

/// One line of printable text that tells compute shapes apart by what is measured: GEMMs and
/// attention cores by their dimensions, streaming ops also by their label.
std::string measured_key(const Shape& shape);

/// A text file: a line that says what was measured on, then one line a result, each with a checksum
/// of its own. Lines that are cut short or damaged count as not written.
class Journal {
 public:
  /// Opens or creates the file. With `resume` results in it are kept, which must have been taken
  /// on `subject` (a device and how it was used): otherwise InputError with the place. Without,
  /// they are given up. Failures of the file system are std::runtime_error with the path.
  Journal(std::string path, std::string subject, bool resume);
  ~Journal();
  Journal(const Journal&) = delete;
  Journal& operator=(const Journal&) = delete;

  std::optional<Measurement> find(const std::string& key) const;
  std::size_t size() const { return results_.size(); }
  std::size_t damaged() const { return damaged_; }  ///< lines that were not understood
  /// Written to the file before it returns.
  void add(const std::string& key, const Measurement& measurement);
  /// The file is no longer needed.
  void remove();

 private:
  void write(std::string_view line);

  std::string path_;
  std::map<std::string, Measurement> results_;
  std::size_t damaged_ = 0;
  std::FILE* file_ = nullptr;
};

}  // namespace orrery
