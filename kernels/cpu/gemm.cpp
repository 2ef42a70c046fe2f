#include <oneapi/tbb/parallel_for.h>

#include <algorithm>
#include <vector>

#include "kernels/cpu/cpu_kernels.hpp"
#include "kernels/cpu/sgemm.hpp"

namespace orrery::kernels::cpu {
namespace {

// A task computes one tile of D over all of k, kDepth at a time, from panels converted to FP32.
// Large tiles suit OpenBLAS, which packs its operands again: of products of 2048, it reaches 85 %
// with tiles of 512 of what it reaches with one of 2048.
constexpr std::int64_t kEdge = 2048;
constexpr std::int64_t kDepth = 384;  // a multiple of kTile
// Multiplications of a tile at least: fewer are not worth a task.
constexpr std::int64_t kLeastWork = std::int64_t{1} << 22;
// Tiles wanted, where the product is large enough. This does not follow the number of threads: the
// edges of a tile can show in the order of OpenBLAS's sums.
constexpr std::int64_t kWantedTiles = 8;

/// D[d_row + i, j] = sum over p of A[a_row + i, a_k + p] B[b_row + j, b_k + p] for i < m, p < k.
struct Product {
  std::int64_t m = 0, k = 0;
  std::int64_t a_row = 0, a_k = 0, b_row = 0, b_k = 0, d_row = 0;
};

/// Of D, in one product.
struct Tile {
  const Product* product;
  std::int64_t row, column, rows, columns;
};

std::vector<Product> products_of(const Gemm& c) {
  const std::int64_t k = c.a_transposed ? c.a.rows : c.a.columns;
  const std::int64_t n = c.d.columns;
  if (c.grouping == Grouping::none) return {{.m = c.d.rows, .k = k}};
  std::vector<Product> products;
  for (std::int64_t g = 0; g < c.groups; ++g) {
    const std::int64_t begin = c.group_begin[g];
    const std::int64_t rows = c.group_rows[g];
    if (c.grouping == Grouping::rows) {
      products.push_back({.m = rows,
                          .k = k,
                          .a_row = begin,
                          .b_row = c.b_transposed ? 0 : g * n,
                          .b_k = c.b_transposed ? g * k : 0,
                          .d_row = begin});
    } else {
      const std::int64_t m = c.d.rows / c.groups;
      products.push_back({.m = m, .k = rows, .a_k = begin, .b_k = begin, .d_row = g * m});
    }
  }
  return products;
}

std::int64_t parts_of(std::int64_t length, std::int64_t edge) {
  return (length + edge - 1) / edge;
}

/// Edges of tiles: halves of kEdge until there are enough of them or they are small.
struct Edges {
  std::int64_t rows = kEdge;
  std::int64_t columns = kEdge;
};
Edges edges_of(const std::vector<Product>& products, std::int64_t n) {
  Edges edges;
  const auto tiles = [&] {
    std::int64_t sum = 0;
    for (const Product& p : products) sum += parts_of(p.m, edges.rows) * parts_of(n, edges.columns);
    return sum;
  };
  const Product* largest = &products.front();
  for (const Product& p : products) {
    if (p.m * p.k > largest->m * largest->k) largest = &p;
  }
  while (tiles() < kWantedTiles) {
    const std::int64_t rows = std::min(edges.rows, largest->m);
    const std::int64_t columns = std::min(edges.columns, n);
    if (rows * columns * largest->k < 2 * kLeastWork) break;
    (rows >= columns ? edges.rows : edges.columns) = (std::max(rows, columns) + 1) / 2;
  }
  return edges;
}

/// An operand's part as it is stored.
Panel operand_of(const Matrix& m, bool transposed, std::int64_t row, std::int64_t k,
                 std::int64_t rows, std::int64_t depth, float* buffer) {
  return transposed ? panel_of(m, k, row, depth, rows, buffer)
                    : panel_of(m, row, k, rows, depth, buffer);
}

void compute(const Gemm& c, const Tile& tile) {
  const Product& p = *tile.product;
  const std::int64_t d_row = p.d_row + tile.row;
  const bool in_place = c.d.format == Format::fp32;
  const std::int64_t depth = std::min(kDepth, p.k);
  float* const a_buffer = scratch((tile.rows + tile.columns) * depth + tile.rows * tile.columns);
  float* const b_buffer = a_buffer + tile.rows * depth;
  float* const d_buffer = b_buffer + tile.columns * depth;
  float* const d =
      in_place ? static_cast<float*>(c.d.data) + d_row * c.d.pitch + tile.column : d_buffer;
  const std::int64_t d_pitch = in_place ? c.d.pitch : tile.columns;
  if (p.k == 0 && !c.accumulate) {
    for (std::int64_t r = 0; r < tile.rows; ++r) std::fill_n(d + r * d_pitch, tile.columns, 0.0F);
  }
  for (std::int64_t k = 0; k < p.k; k += kDepth) {
    const std::int64_t step = std::min(kDepth, p.k - k);
    const Panel a =
        operand_of(c.a, c.a_transposed, p.a_row + tile.row, p.a_k + k, tile.rows, step, a_buffer);
    const Panel b = operand_of(c.b, c.b_transposed, p.b_row + tile.column, p.b_k + k, tile.columns,
                               step, b_buffer);
    const float beta = k > 0 || c.accumulate ? 1 : 0;
    sgemm(c.a_transposed, !c.b_transposed, tile.rows, tile.columns, step, 1, a, b, beta, d,
          d_pitch);
  }
  if (!in_place) {
    store_panel(c.d, d_row, tile.column, tile.rows, tile.columns, {d_buffer, tile.columns});
  }
}

}  // namespace

void run(const Gemm& call) {
  const std::vector<Product> products = products_of(call);
  const std::int64_t n = call.d.columns;
  const Edges edges = edges_of(products, n);
  std::vector<Tile> tiles;
  for (const Product& p : products) {
    for (std::int64_t row = 0; row < p.m; row += edges.rows) {
      for (std::int64_t column = 0; column < n; column += edges.columns) {
        tiles.push_back({&p, row, column, std::min(edges.rows, p.m - row),
                         std::min(edges.columns, n - column)});
      }
    }
  }
  if (tiles.size() == 1) {
    compute(call, tiles.front());
  } else {
    tbb::parallel_for(std::size_t{0}, tiles.size(),
                      [&](std::size_t i) { compute(call, tiles[i]); });
  }
}

}  // namespace orrery::kernels::cpu
