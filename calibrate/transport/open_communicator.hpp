#pragma once
// Communicators of devices (kernels/communicator.hpp) between ranks of a Transport, and which
// device a rank takes.

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "calibrate/transport/transport.hpp"
#include "kernels/communicator.hpp"

namespace orrery {

/// All of `members` call it, with the same of them and the same tag; ranks that are members of
/// several, in one order of all communicators. `look` is called while NCCL makes this rank wait,
/// now and later, and may throw. Throws std::runtime_error with NCCL's words and the name.
std::unique_ptr<kernels::Communicator> open_communicator(
    Transport& transport, std::shared_ptr<const kernels::Nccl> nccl, kernels::Device& device,
    kernels::StreamHandle stream, std::span<const int> members, std::uint64_t tag, int max_ctas,
    OpName name, std::function<void()> look);

/// This rank among those on its machine, in rank order, and how many they are. All ranks call it.
struct LocalPlace {
  int index = 0;
  int ranks = 1;
};
LocalPlace local_place(Transport& transport);

/// The GPU that a rank takes, of `gpus` that its process sees: one for each rank of the machine, in
/// order; or the only one, where the launcher gave each process one of its own. Throws
/// std::runtime_error where they are too few.
int gpu_of(const LocalPlace& place, int gpus);

}  // namespace orrery
