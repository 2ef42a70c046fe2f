#pragma once
// Products of FP32 on the calling thread, by OpenBLAS.

#include <cstddef>
#include <cstdint>
#include <memory>

#include "kernels/cpu/convert.hpp"

namespace orrery::kernels::cpu {

/// C[m, n] = alpha * op(A)[m, k] op(B)[k, n] + beta * C, row-major; op(A) is A^T where
/// `a_transposed`. C is not read if beta is 0. Any number of threads can be in it at once.
void sgemm(bool a_transposed, bool b_transposed, std::int64_t m, std::int64_t n, std::int64_t k,
           float alpha, const Panel& a, const Panel& b, float beta, float* c, std::int64_t c_pitch);

/// Memory of the calling thread that lasts until its next scratch() that needs more: what a task
/// works with while it does not wait for other tasks.
float* scratch(std::int64_t floats);

}  // namespace orrery::kernels::cpu
