#pragma once
// A Timeline as a Chrome trace (JSON), which Perfetto, chrome://tracing and TensorBoard open.
//
// A process per rank. Its lanes: cells (F12, F12&B3), phases per stream (attn(F), dispatch(F) ...
// named as in DeepSeek's published trace), and the stream's ops; a counter of its memory; arrows
// from a pipeline send to where it arrives. Times are microseconds, rounded to nanoseconds, from
// the start of the step.

#include <cstdint>
#include <string>
#include <vector>

#include "reports/study.hpp"

namespace orrery {

/// The first simulated rank of every pipeline position.
std::vector<std::uint32_t> representative_ranks(const Report& report);

/// Writes the trace of these simulated ranks; gzip if the path ends in ".gz". The text is streamed:
/// memory does not grow with it. Throws std::runtime_error if the file cannot be written.
void write_trace(const Study& study, const std::vector<std::uint32_t>& ranks,
                 const std::string& path);

}  // namespace orrery
