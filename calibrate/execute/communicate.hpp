#pragma once
// What a lowered op sends and receives, over a Transport, from and into host memory.

#include <cstdint>

#include "calibrate/execute/lowering.hpp"
#include "sim/program.hpp"

namespace orrery {

class Transport;

/// Returns when this rank's part is done. `step` and the op tell its messages from others'. Throws
/// what the transport throws; its messages name the op.
void communicate(const Communication& communication, Transport& transport, std::int64_t step,
                 OpId op, const Program& program);

}  // namespace orrery
