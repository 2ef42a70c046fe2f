#include <cmath>

#include "kernels/cpu/clones.hpp"
#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

constexpr std::int64_t kBlock = 8 * 1024;  // whose moments fit a cache of 64 KiB with room

Matrix piece(void* data, std::int64_t first, std::int64_t count, Format format) {
  return row_of(static_cast<std::byte*>(data) + element_bytes(1, first, format), count, format);
}

struct Step {
  AdamScalars scalars;
  float clip, correct1, correct2, decay;
};

ORRERY_CLONES
void update(const Step& step, const float* __restrict gradient, float* __restrict m,
            float* __restrict v, float* __restrict master, std::int64_t count) {
  const AdamScalars s = step.scalars;
  const float clip = step.clip, correct1 = step.correct1, correct2 = step.correct2;
  const float decay = step.decay;
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = gradient[i] * clip;
    m[i] = s.beta1 * m[i] + (1 - s.beta1) * g;
    v[i] = s.beta2 * v[i] + (1 - s.beta2) * g * g;
    const float change = m[i] * correct1 / (std::sqrt(v[i] * correct2) + s.epsilon);
    master[i] -= s.learning_rate * (change + decay * master[i]);
  }
}

ORRERY_CLONES
double squares_of(const float* values, std::int64_t count) {
  double sums[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const double x = values[i + lane];
      sums[lane] += x * x;
    }
  }
  double sum = 0;
  for (; i < count; ++i) sum += double{values[i]} * values[i];
  for (const double lane : sums) sum += lane;
  return sum;
}

}  // namespace

void run(const AdamW& a) {
  const AdamScalars s = *a.scalars;
  float clip = 1;
  if (a.square_sum != nullptr && s.max_norm > 0) {
    const double norm = std::sqrt(*a.square_sum);
    if (norm > s.max_norm) clip = static_cast<float>(s.max_norm / norm);
  }
  const Step step{.scalars = s,
                  .clip = clip,
                  .correct1 = 1 / (1 - s.beta1_power),
                  .correct2 = 1 / (1 - s.beta2_power),
                  .decay = a.decay ? s.weight_decay : 0.0F};
  for_blocks(a.elements, kBlock, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    const std::int64_t count = last - first;
    const Matrix first_moment = piece(a.first_moment, first, count, a.moments);
    const Matrix second_moment = piece(a.second_moment, first, count, a.moments);
    float* m = row_buffer(0, count);
    float* v = row_buffer(1, count);
    load_row(first_moment, 0, m);
    load_row(second_moment, 0, v);
    float* master = a.master + first;
    update(step, a.gradient + first, m, v, master, count);
    store_row(first_moment, 0, m);
    store_row(second_moment, 0, v);
    if (a.parameter != nullptr)
      store_row(piece(a.parameter, first, count, a.parameters), 0, master);
  });
}

void run(const SquareSum& s) {
  const std::int64_t blocks = (s.elements + kBlock - 1) / kBlock;
  std::vector<double> parts(static_cast<std::size_t>(blocks));
  for_blocks(s.elements, kBlock, [&](std::int64_t b, std::int64_t first, std::int64_t last) {
    parts[static_cast<std::size_t>(b)] = squares_of(s.values + first, last - first);
  });
  double sum = s.accumulate ? *s.out : 0.0;
  for (const double p : parts) sum += p;
  *s.out = sum;
}

}  // namespace orrery::kernels::cpu
