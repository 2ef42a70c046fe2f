#include "kernels/cpu/sgemm.hpp"

#include <cblas.h>

#include <cstdlib>
#include <new>

namespace orrery::kernels::cpu {
namespace {

constexpr std::size_t kCacheLine = 64;

struct Free {
  void operator()(float* memory) const { std::free(memory); }
};

}  // namespace

void sgemm(bool a_transposed, bool b_transposed, std::int64_t m, std::int64_t n, std::int64_t k,
           float alpha, const Panel& a, const Panel& b, float beta, float* c,
           std::int64_t c_pitch) {
  // Tasks are what is spread over threads, so that calls of several streams and ranks share them.
  static const bool one_thread = (openblas_set_num_threads(1), true);
  static_cast<void>(one_thread);
  cblas_sgemm(CblasRowMajor, a_transposed ? CblasTrans : CblasNoTrans,
              b_transposed ? CblasTrans : CblasNoTrans, static_cast<blasint>(m),
              static_cast<blasint>(n), static_cast<blasint>(k), alpha, a.data,
              static_cast<blasint>(a.pitch), b.data, static_cast<blasint>(b.pitch), beta, c,
              static_cast<blasint>(c_pitch));
}

float* scratch(std::int64_t floats) {
  thread_local std::unique_ptr<float, Free> memory;
  thread_local std::int64_t size = 0;
  if (floats > size) {
    memory.reset();
    size = 0;
    const std::size_t bytes = static_cast<std::size_t>(floats) * sizeof(float);
    const std::size_t rounded = (bytes + kCacheLine - 1) / kCacheLine * kCacheLine;
    memory.reset(static_cast<float*>(std::aligned_alloc(kCacheLine, rounded)));
    if (!memory) throw std::bad_alloc();
    size = floats;
  }
  return memory.get();
}

}  // namespace orrery::kernels::cpu
