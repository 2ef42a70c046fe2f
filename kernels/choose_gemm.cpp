#include "kernels/choose_gemm.hpp"

#include <algorithm>
#include <limits>
#include <utility>

namespace orrery::kernels {

namespace {

/// Tensor cores of an H100 SXM: 1978.9 TFLOP/s dense FP8 and half of it in BF16 on 132 SMs at 1.83
/// GHz (NVIDIA H100 data sheet, without sparsity): so many products a cycle and SM.
constexpr double kFp8ProductsPerCycle = 4096;
constexpr double kBf16ProductsPerCycle = 2048;
/// What SMs get from the L2, bytes a cycle: 64 each, together at most so many (the figures that
/// DeepGEMM compares its own plans by, deepseek-ai/DeepGEMM@54e2261,
/// csrc/jit_kernels/heuristics/sm90.hpp).
constexpr double kL2BytesPerCycleAndSm = 64;
constexpr double kL2BytesPerCycle = 8e6 / 1.3e3;

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}

bool aligned(const void* pointer, std::uintptr_t bytes) {
  return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0;
}

std::int64_t pitch_bytes(const Matrix& x) {
  return x.pitch * bits_of(x.format) / 8;
}

/// Tile sizes that the kernel is compiled for (kernels/cuda/gemm_fp8.cu, gemm_bf16.cu).
std::vector<TileLayout> layouts_for(const Gemm& call) {
  if (call.a.format == Format::bf16) return {{128, 128, Scaling::none}, {256, 128, Scaling::none}};
  if (call.b.scaling == Scaling::rows) return {{128, 64, Scaling::rows}, {128, 128, Scaling::rows}};
  return {{128, 64, Scaling::blocks},
          {128, 128, Scaling::blocks},
          {128, 192, Scaling::blocks},
          {256, 128, Scaling::blocks}};
}

/// A tile's columns have to lie in one block of 128 rows of B, or, 192 wide, in two that meet at a
/// multiple of 64.
bool fits_blocks(const TileLayout& layout, const Gemm& call) {
  if (layout.scaling_b != Scaling::blocks || call.grouping != Grouping::rows) return true;
  const std::int64_t n = sizes_of(call).n;
  return n % (layout.tile_n == 128 ? 128 : 64) == 0;
}

/// How the tiles of equal groups come out.
struct Work {
  std::int64_t row_tiles = 0;  ///< of all groups
  std::int64_t k = 0;          ///< of a tile
};

Work work_of(const Gemm& call, int tile_m) {
  const GemmSizes s = sizes_of(call);
  const std::int64_t groups = std::max<std::int64_t>(call.groups, 1);
  switch (call.grouping) {
    case Grouping::rows:
      return {groups * ceil_div(ceil_div(s.m, groups), tile_m), s.k};
    case Grouping::contraction:
      return {groups * ceil_div(s.m, tile_m), ceil_div(s.k, groups)};
    case Grouping::none:
      break;
  }
  return {ceil_div(s.m, tile_m), s.k};
}

/// Tiles below each other that are computed before the next column of tiles: so that the tiles
/// under way at a time touch as few rows of A and B as possible.
int panel_for(const TileLayout& layout, int cluster, int blocks) {
  int best = 1;
  double fewest = std::numeric_limits<double>::infinity();
  for (int panel = 1; panel <= 32; panel *= 2) {
    const double columns = static_cast<double>(blocks) / panel;
    if (columns < cluster) break;
    const double rows = panel * layout.tile_m + columns * layout.tile_n;
    if (rows < fewest) {
      fewest = rows;
      best = panel;
    }
  }
  return best;
}

GemmPlan plan_with(const Gemm& call, const GemmDevice& device, const TileLayout& layout,
                   int cluster) {
  const GemmSizes s = sizes_of(call);
  GemmPlan plan;
  plan.path = GemmPath::hopper;
  plan.layout = layout;
  plan.cluster = cluster;
  plan.shared_bytes = layout.shared_bytes();

  const Work work = work_of(call, layout.tile_m);
  const std::int64_t units =
      work.row_tiles * ceil_div(s.n, static_cast<std::int64_t>(layout.tile_n) * cluster);
  const std::int64_t clusters = std::min<std::int64_t>(device.sms / cluster, units);
  plan.waves = ceil_div(units, clusters);
  // As few blocks as finish in as many waves; not where only the device knows how many tiles there
  // are.
  const std::int64_t needed =
      call.grouping == Grouping::none ? ceil_div(units, plan.waves) : clusters;
  plan.blocks = static_cast<int>(needed) * cluster;
  plan.panel = panel_for(layout, cluster, plan.blocks);

  const bool fp8 = call.a.format == Format::e4m3;
  const double l2 = std::min(kL2BytesPerCycleAndSm, kL2BytesPerCycle / plan.blocks);
  const double stages = static_cast<double>(ceil_div(work.k * (fp8 ? 1 : 2), kStageRowBytes));
  const double products =
      static_cast<double>(layout.tile_m) * layout.tile_n * kStageRowBytes / (fp8 ? 1 : 2);
  const double tensor = products / (fp8 ? kFp8ProductsPerCycle : kBf16ProductsPerCycle);
  const double stage_bytes =
      (static_cast<double>(layout.tile_m) / cluster + layout.tile_n) * kStageRowBytes;
  const double loads = stage_bytes / l2;
  plan.loaded_bytes = static_cast<double>(units * cluster) * stages * stage_bytes;
  const double result = static_cast<double>(layout.tile_m) * layout.tile_n *
                        bits_of(call.d.format) / 8 * (call.accumulate ? 2 : 1) / l2;
  plan.cycles = static_cast<double>(plan.waves) * (stages * std::max(tensor, loads) + result);
  return plan;
}

std::string why_not_aligned(const Matrix& x, const char* name) {
  if (!aligned(x.data, 16)) return std::string(name) + " does not begin at a multiple of 16 bytes";
  if (pitch_bytes(x) % 16 != 0) {
    return std::string("rows of ") + name + " are " + std::to_string(pitch_bytes(x)) +
           " bytes apart, not a multiple of 16";
  }
  return {};
}

std::string why_not_scaled(const Matrix& x, const char* name) {
  if (!aligned(x.scales, 16)) {
    return std::string("scales of ") + name + " do not begin at a multiple of 16 bytes";
  }
  if (x.scaling == Scaling::rows && x.scale_pitch % 4 != 0) {
    return std::string("scale_pitch of ") + name + " is " + std::to_string(x.scale_pitch) +
           ", not a multiple of 4";
  }
  return {};
}

bool too_large(const GemmSizes& s, const Gemm& call) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() / 2;
  return std::max({s.m, s.n, s.k}) > kMost || call.groups * std::max(s.n, s.k) > kMost ||
         call.groups * ceil_div(s.m, 64) * ceil_div(s.n, 64) > kMost;
}

}  // namespace

GemmSizes sizes_of(const Gemm& call) {
  GemmSizes s;
  s.m = call.a_transposed ? call.a.columns : call.a.rows;
  s.k = call.a_transposed ? call.a.rows : call.a.columns;
  s.n = call.d.columns;
  return s;
}

std::string why_not_library(const Gemm& call, const GemmDevice& device) {
  if (call.grouping != Grouping::none) return "groups";
  const GemmSizes s = sizes_of(call);
  if (s.m == 0 || s.n == 0 || s.k == 0) return "nothing to compute";
  const Format a = call.a.format, b = call.b.format, d = call.d.format;
  if (a != b) return "operands of two formats";
  if (a == Format::fp32) return d == Format::fp32 ? "" : "FP32 operands, but D is not";
  if (d != Format::fp32 && d != Format::bf16) return "D is neither FP32 nor BF16";
  if (a == Format::bf16) return {};
  if (a != Format::e4m3) return "a format that cuBLASLt does not have";

  // cuBLAS 13.1: 1x128 and 128x128 scales on compute capability 9.0 only, A transposed and B not
  // (as cuBLASLt calls them), dimensions and pointers aligned to 16 bytes, scales to 16 bytes,
  // densely packed.
  if (device.compute_capability != 90) return "scales of tiles need compute capability 9.0";
  if (call.a.scaling != Scaling::rows) return "A has to have scales of 1x128 tiles";
  if (s.k % 16 != 0 || s.n % 16 != 0) return "k and n have to be multiples of 16";
  if (s.m % 4 != 0) return "m has to be a multiple of 4";
  for (const auto& [x, name] : {std::pair{&call.a, "A"}, std::pair{&call.b, "B"}}) {
    if (std::string why = why_not_aligned(*x, name); !why.empty()) return why;
    if (std::string why = why_not_scaled(*x, name); !why.empty()) return why;
    const std::int64_t packed =
        x->scaling == Scaling::rows ? x->rows : ceil_div(ceil_div(x->columns, kTile), 4) * 4;
    if (x->scale_pitch != packed) {
      return std::string("scale_pitch of ") + name + " is " + std::to_string(x->scale_pitch) +
             ", not " + std::to_string(packed);
    }
  }
  return why_not_aligned(call.d, "D");
}

std::string why_not_hopper(const Gemm& call, const GemmDevice& device) {
  if (device.compute_capability != 90) return "wgmma needs compute capability 9.0";
  if (device.shared_bytes_per_block < kHopperSharedBytes) return "too little shared memory";
  const GemmSizes s = sizes_of(call);
  if (s.m == 0 || s.n == 0 || s.k == 0) return "nothing to compute";
  if (too_large(s, call)) return "more than 32 bits can count";
  const Format a = call.a.format, d = call.d.format;
  if (a != call.b.format) return "operands of two formats";
  if (d != Format::fp32 && d != Format::bf16) return "D is neither FP32 nor BF16";
  for (const auto& [x, name] : {std::pair{&call.a, "A"}, std::pair{&call.b, "B"}}) {
    if (std::string why = why_not_aligned(*x, name); !why.empty()) return why;
    if (x->format != Format::e4m3) continue;
    if (std::string why = why_not_scaled(*x, name); !why.empty()) return why;
  }
  if (a == Format::e4m3) {
    if (call.a_transposed || call.b_transposed) return "a transposed operand";
    if (call.a.scaling != Scaling::rows) return "A has to have scales of 1x128 tiles";
    if (call.b.scaling == Scaling::none) return "B has to have scales";
    const std::vector<TileLayout> layouts = layouts_for(call);
    if (std::none_of(layouts.begin(), layouts.end(),
                     [&](const TileLayout& t) { return fits_blocks(t, call); })) {
      return "groups of B begin inside of a block of scales";
    }
    return {};
  }
  if (a != Format::bf16) return "no tensor cores for this format";
  if (call.grouping == Grouping::contraction) {
    return call.a_transposed && call.b_transposed ? "" : "operands are not split by rows";
  }
  if (call.a_transposed) return "A is transposed";
  if (call.grouping == Grouping::rows && call.b_transposed && s.k % 64 != 0) {
    return "the last stage of a group of B would reach into the next";
  }
  return {};
}

std::vector<GemmPlan> hopper_plans(const Gemm& call, const GemmDevice& device) {
  std::vector<GemmPlan> plans;
  if (!why_not_hopper(call, device).empty()) return plans;
  for (const TileLayout& layout : layouts_for(call)) {
    if (!fits_blocks(layout, call)) continue;
    for (int cluster = 1; cluster <= std::min(2, device.sms); ++cluster) {
      plans.push_back(plan_with(call, device, layout, cluster));
    }
  }
  std::stable_sort(plans.begin(), plans.end(), [](const GemmPlan& x, const GemmPlan& y) {
    return std::pair(x.cycles, x.loaded_bytes) < std::pair(y.cycles, y.loaded_bytes);
  });
  return plans;
}

GemmPlan choose_own_gemm(const Gemm& call, const GemmDevice& device) {
  if (std::vector<GemmPlan> plans = hopper_plans(call, device); !plans.empty())
    return plans.front();
  GemmPlan plan;
  plan.layout = {64, 64, Scaling::none};
  const Work work = work_of(call, plan.layout.tile_m);
  const std::int64_t tiles =
      std::max<std::int64_t>(work.row_tiles * ceil_div(sizes_of(call).n, plan.layout.tile_n), 1);
  plan.waves = ceil_div(tiles, device.sms);
  plan.blocks = static_cast<int>(std::min<std::int64_t>(tiles, device.sms));
  plan.panel = panel_for(plan.layout, 1, plan.blocks);
  return plan;
}

GemmPlan choose_gemm(const Gemm& call, const GemmDevice& device) {
  if (!why_not_library(call, device).empty()) return choose_own_gemm(call, device);
  GemmPlan plan;
  plan.path = GemmPath::library;
  return plan;
}

TileGrid tile_grid_of(const Gemm& call, const GemmPlan& plan) {
  const GemmSizes s = sizes_of(call);
  TileGrid grid;
  grid.grouping = call.grouping;
  grid.accumulate = call.accumulate;
  grid.groups = call.grouping == Grouping::none ? 1 : static_cast<int>(call.groups);
  grid.m = static_cast<int>(s.m);
  grid.n = static_cast<int>(s.n);
  grid.k = static_cast<int>(s.k);
  grid.tile_m = plan.layout.tile_m;
  grid.tile_n = plan.layout.tile_n;
  grid.cluster = plan.cluster;
  grid.panel = plan.panel;
  grid.group_begin = call.group_begin;
  grid.group_rows = call.group_rows;
  return grid;
}

std::string describe(const GemmPlan& plan) {
  if (plan.path == GemmPath::library) return "cuBLASLt";
  const bool hopper = plan.path == GemmPath::hopper;
  std::string text = hopper ? "wgmma " : "plain ";
  text += std::to_string(plan.layout.tile_m) + "x" + std::to_string(plan.layout.tile_n) + ", ";
  if (hopper) text += std::to_string(plan.layout.stages()) + " stages, ";
  if (plan.cluster > 1) text += "clusters of " + std::to_string(plan.cluster) + ", ";
  return text + "panels of " + std::to_string(plan.panel) + ", " + std::to_string(plan.blocks) +
         " blocks, " + std::to_string(plan.waves) + " waves";
}

}  // namespace orrery::kernels
