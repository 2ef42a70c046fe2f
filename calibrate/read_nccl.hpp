#pragma once
// Output of nccl-tests (NVIDIA/nccl-tests@a0b82b2, versions since 2.0): what it prints, and what
// its option -J writes (JSON, version 3).

#include <string>
#include <string_view>
#include <vector>

#include "sim/nccl_table.hpp"

namespace orrery {

/// All tables of a file, text or JSON. Around and between the rows anything may stand: other
/// output, warnings of NCCL, prefixes that a launcher puts before every line. Rows that are cut
/// off, whose numbers are none, or whose bandwidth is not size over time are problems with their
/// place, and so is a file without a table.
///
/// The operation is the program's name where a line before the table has it, else a name in the
/// file's own name, else what the columns leave possible (all_reduce and reduce_scatter only).
/// Ranks are counted in the list of devices and compared with bus over algorithm bandwidth, which
/// wins where they differ; `notes` then say so. What is not told stays 0, empty or `other`.
std::vector<NcclTable> read_nccl(const std::string& path, Problems& problems);
std::vector<NcclTable> read_nccl_text(std::string_view text, const std::string& name,
                                      Problems& problems);

}  // namespace orrery
