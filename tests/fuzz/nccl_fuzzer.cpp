// Any bytes at all: the reader of nccl-tests' output must end in tables or in located problems, and
// what it took for a table must be writable.

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "calibrate/read_nccl.hpp"
#include "sim/check.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace orrery;
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  Problems problems;
  const auto tables = read_nccl_text(text, "fuzz.txt", problems);
  ORRERY_CHECK(!tables.empty() || !problems.empty(), "neither a table nor a problem");
  for (const Problem& p : problems.list()) {
    ORRERY_CHECK(p.at.line >= 0 && p.at.column >= 0, "a place before the file");
  }
  format_problems(problems.list());
  for (const NcclTable& table : tables) {
    ORRERY_CHECK(!table.rows.empty(), "a table without rows");
    for (const NcclRow& row : table.rows) {
      ORRERY_CHECK(row.size_bytes > 0 && (row.out_of_place || row.in_place), "an empty row");
      for (const auto& t : {row.out_of_place, row.in_place}) {
        ORRERY_CHECK(!t || (t->time_us > 0 && std::isfinite(t->time_us)), "no time");
      }
    }
    // Times that no clock gives lose their digits when written: rows may then be refused.
    Problems refused;
    read_nccl_text(format_nccl_table(table), "again.txt", refused);
  }
  return 0;
}
