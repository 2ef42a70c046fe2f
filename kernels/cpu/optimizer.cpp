#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/rows.hpp"

namespace orrery::kernels::cpu {
namespace {

constexpr std::int64_t kBlock = 16 * 1024;

Matrix piece(void* data, std::int64_t first, std::int64_t count, Format format) {
  Matrix m;
  m.data = static_cast<std::byte*>(data) + element_bytes(1, first, format);
  m.rows = 1;
  m.columns = m.pitch = count;
  m.format = format;
  return m;
}

}  // namespace

void run(const AdamW& a) {
  const AdamScalars s = *a.scalars;
  float clip = 1;
  if (a.square_sum != nullptr && s.max_norm > 0) {
    const double norm = std::sqrt(*a.square_sum);
    if (norm > s.max_norm) clip = static_cast<float>(s.max_norm / norm);
  }
  const float correct1 = 1 / (1 - s.beta1_power), correct2 = 1 / (1 - s.beta2_power);
  const float decay = a.decay ? s.weight_decay : 0.0F;
  for_blocks(a.elements, kBlock, [&](std::int64_t, std::int64_t first, std::int64_t last) {
    const std::int64_t count = last - first;
    const Matrix first_moment = piece(a.first_moment, first, count, a.moments);
    const Matrix second_moment = piece(a.second_moment, first, count, a.moments);
    float* m = row_buffer(0, count);
    float* v = row_buffer(1, count);
    load_row(first_moment, 0, m);
    load_row(second_moment, 0, v);
    const float* gradient = a.gradient + first;
    float* master = a.master + first;
    for (std::int64_t i = 0; i < count; ++i) {
      const float g = gradient[i] * clip;
      m[i] = s.beta1 * m[i] + (1 - s.beta1) * g;
      v[i] = s.beta2 * v[i] + (1 - s.beta2) * g * g;
      const float step = m[i] * correct1 / (std::sqrt(v[i] * correct2) + s.epsilon);
      master[i] -= s.learning_rate * (step + decay * master[i]);
    }
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
    std::array<double, 8> part{};
    std::int64_t i = first;
    for (; i + 8 <= last; i += 8) {
      for (std::int64_t k = 0; k < 8; ++k) {
        const double x = s.values[i + k];
        part[static_cast<std::size_t>(k)] += x * x;
      }
    }
    double sum = 0;
    for (; i < last; ++i) sum += double{s.values[i]} * s.values[i];
    for (const double p : part) sum += p;
    parts[static_cast<std::size_t>(b)] = sum;
  });
  double sum = s.accumulate ? *s.out : 0.0;
  for (const double p : parts) sum += p;
  *s.out = sum;
}

}  // namespace orrery::kernels::cpu
