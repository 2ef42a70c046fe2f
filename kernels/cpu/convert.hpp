#pragma once
// Conversions of many elements, vectorised, and the exponential of softmax. On x86-64 the loops are
// compiled for AVX2 and AVX-512 too, and the processor's best is taken: conversions are exact or
// round once, so they do not depend on it; exponentials can differ in their last bit, since some of
// these have a fused multiply-add.

#include <cstdint>

#include "kernels/call.hpp"

namespace orrery::kernels::cpu {

void floats_of_bf16(const std::uint16_t* from, float* to, std::int64_t count);
/// code * scale.
void floats_of_e4m3(const std::uint8_t* from, float scale, float* to, std::int64_t count);
void bf16_of_floats(const float* from, std::uint16_t* to, std::int64_t count);

/// x[i] = exp(x[i] - shift); returns their sum. Within 2 units in the last place of FP32; 0 below
/// e^-87.3, just above the smallest normal number. x[i] - shift must be at most 88.
float exp_minus(float* x, std::int64_t count, float shift);
float largest_of(const float* x, std::int64_t count);

/// A part of a matrix as FP32.
struct Panel {
  const float* data = nullptr;
  std::int64_t pitch = 0;
};

/// Rows and columns from (row, column) on: in place where the matrix is FP32, else converted to
/// `buffer` (rows * columns). With scales, `column` is a multiple of 128. Not for e5m6.
Panel panel_of(const Matrix& m, std::int64_t row, std::int64_t column, std::int64_t rows,
               std::int64_t columns, float* buffer);

/// Rounds `from` (pitch of its own) to the rows and columns of an FP32 or BF16 matrix.
void store_panel(const Matrix& m, std::int64_t row, std::int64_t column, std::int64_t rows,
                 std::int64_t columns, const Panel& from);

}  // namespace orrery::kernels::cpu
