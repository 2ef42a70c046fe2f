#pragma once
// Nelder and Mead, A simplex method for function minimization, Computer Journal 7 (1965):
// reflection 1, expansion 2, contraction 1/2, shrinkage 1/2.

#include <algorithm>
#include <cstddef>
#include <vector>

namespace orrery {

/// `x` starts and ends at the best point known; the first simplex has edges of `step`.
template <class Loss>
void minimise(std::vector<double>& x, double step, int iterations, const Loss& loss) {
  struct Vertex {
    std::vector<double> x;
    double loss = 0;
  };
  const std::size_t n = x.size();
  std::vector<Vertex> simplex{{x, loss(x)}};
  for (std::size_t i = 0; i < n; ++i) {
    std::vector<double> corner = x;
    corner[i] += step;
    simplex.push_back({corner, loss(corner)});
  }
  const auto better = [](const Vertex& a, const Vertex& b) { return a.loss < b.loss; };
  for (int iteration = 0; iteration < iterations; ++iteration) {
    std::sort(simplex.begin(), simplex.end(), better);
    std::vector<double> centre(n, 0);
    for (std::size_t v = 0; v < n; ++v) {
      for (std::size_t i = 0; i < n; ++i) centre[i] += simplex[v].x[i] / static_cast<double>(n);
    }
    Vertex& worst = simplex[n];
    const auto along = [&](double factor) {
      Vertex v{centre, 0};
      for (std::size_t i = 0; i < n; ++i) v.x[i] += factor * (centre[i] - worst.x[i]);
      v.loss = loss(v.x);
      return v;
    };
    const Vertex reflected = along(1);
    if (reflected.loss < simplex[0].loss) {
      const Vertex expanded = along(2);
      worst = expanded.loss < reflected.loss ? expanded : reflected;
    } else if (reflected.loss < simplex[n - 1].loss) {
      worst = reflected;
    } else {
      const Vertex contracted = along(reflected.loss < worst.loss ? 0.5 : -0.5);
      if (contracted.loss < std::min(worst.loss, reflected.loss)) {
        worst = contracted;
      } else {
        for (std::size_t v = 1; v <= n; ++v) {
          for (std::size_t i = 0; i < n; ++i) {
            simplex[v].x[i] = simplex[0].x[i] + 0.5 * (simplex[v].x[i] - simplex[0].x[i]);
          }
          simplex[v].loss = loss(simplex[v].x);
        }
      }
    }
  }
  x = std::min_element(simplex.begin(), simplex.end(), better)->x;
}

}  // namespace orrery
