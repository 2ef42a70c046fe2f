#pragma once
// What a lowered op sends and receives, over a Transport, from and into host memory.

#include <cstdint>
#include <vector>

#include "calibrate/execute/lowering.hpp"
#include "kernels/communicator.hpp"
#include "sim/program.hpp"

namespace orrery {

class Transport;

/// Returns when this rank's part is done. `step` and the op tell its messages from others'. Throws
/// what the transport throws; its messages name the op.
void communicate(const Communication& communication, Transport& transport, std::int64_t step,
                 OpId op, const Program& program);

/// Which of this rank's tokens each member gets: those that chose one of its experts. `experts` and
/// `weights` are read on the host, here and below.
void make_route(const Communication& communication);
/// Of each token that goes to a member, its choices: experts by their index there, and weights; -1
/// and 0 for experts elsewhere. Added to what is there.
void pack_choices(const Communication& communication, std::size_t member,
                  std::vector<std::int32_t>& experts, std::vector<float>& weights);
/// By member.
std::vector<std::uint64_t> rows_sent(const ExchangeRoute& route);
kernels::ElementType element_type(kernels::Format format);

}  // namespace orrery
