#include "kernels/reference/elements.hpp"
#include "kernels/reference/reference.hpp"

namespace orrery::kernels::reference {
void run(const AdamW& a) {
  const AdamScalars& s = *a.scalars;
  double clip = 1;
  if (a.square_sum != nullptr && s.max_norm > 0) {
    const double norm = std::sqrt(*a.square_sum);
    if (norm > s.max_norm) clip = s.max_norm / norm;
  }
  const Matrix first = row_of(a.first_moment, a.elements, a.moments);
  const Matrix second = row_of(a.second_moment, a.elements, a.moments);
  const Matrix parameter = row_of(a.parameter, a.elements, a.parameters);
  const double beta1 = s.beta1, beta2 = s.beta2;
  for (std::int64_t i = 0; i < a.elements; ++i) {
    const double g = a.gradient[i] * clip;
    const double m = beta1 * element(first, 0, i) + (1 - beta1) * g;
    const double v = beta2 * element(second, 0, i) + (1 - beta2) * g * g;
    set_element(first, 0, i, m);
    set_element(second, 0, i, v);
    const double m_hat = m / (1 - double{s.beta1_power}), v_hat = v / (1 - double{s.beta2_power});
    double step = m_hat / (std::sqrt(v_hat) + s.epsilon);
    if (a.decay) step += double{s.weight_decay} * a.master[i];
    a.master[i] = static_cast<float>(a.master[i] - s.learning_rate * step);
    if (a.parameter != nullptr) set_code(parameter, 0, i, a.master[i]);
  }
}

void run(const SquareSum& s) {
  double sum = s.accumulate ? *s.out : 0.0;
  for (std::int64_t i = 0; i < s.elements; ++i) sum += double{s.values[i]} * s.values[i];
  *s.out = sum;
}

}  // namespace orrery::kernels::reference
