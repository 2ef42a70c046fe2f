#pragma once
// The NCCL of these tests (fake_nccl.cpp), loaded as the program loads NCCL.

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>

#include "kernels/communicator.hpp"

namespace orrery {

inline std::shared_ptr<const kernels::Nccl> fake_nccl() {
  setenv("ORRERY_NCCL_LIBRARY", ORRERY_FAKE_NCCL, 1);
  auto loaded = kernels::Nccl::load();
  if (const auto* why = std::get_if<std::string>(&loaded)) throw std::runtime_error(*why);
  return std::get<std::shared_ptr<const kernels::Nccl>>(loaded);
}

}  // namespace orrery
