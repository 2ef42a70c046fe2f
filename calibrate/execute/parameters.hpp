#pragma once
// The parameters of a model as one rank holds them, and where each piece lies in the whole.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "calibrate/initial_parameters.hpp"
#include "models/layout.hpp"
#include "models/scenario.hpp"

namespace orrery {

/// Consecutive rows of a whole parameter.
struct RowRange {
  std::int64_t first = 0;
  std::int64_t count = 0;
};

/// Of a parameter this rank has the given rows, one range after the other, and `columns` of its
/// columns from `first_column` on. Rows count over all of the parameter's matrices.
struct ParameterShard {
  Parameter parameter;
  std::vector<RowRange> row_ranges;
  std::int64_t first_column = 0;
  std::int64_t columns = 0;
  bool expert = false;         ///< copies are the expert-data group's, else the data group's
  bool norm = false;           ///< gain or bias: no weight decay
  bool whole = false;          ///< every tensor-parallel rank holds all of it
  bool tensor_summed = false;  ///< and their gradients are to be summed (LayerShard::tensor_summed)
  std::int64_t offset = 0;     ///< of the first element in its stage's dense or expert array

  std::int64_t rows() const;
  std::int64_t elements() const { return rows() * columns; }
  /// Index in the whole parameter of the shard's element.
  std::int64_t whole_index(std::int64_t row, std::int64_t column) const;
};

/// What a rank keeps of one stage: dense parameters in one array and expert parameters in another,
/// as the gradient and parameter collectives move them. In each, split matrices come first, then
/// matrices that every tensor-parallel rank holds, then norms: what tensor-parallel ranks sum is
/// one piece.
struct StageParameterShards {
  int stage = 0;
  std::vector<ParameterShard> dense;
  std::vector<ParameterShard> expert;
  std::int64_t dense_elements = 0;  ///< of the array: padded so that all copies get equal parts
  std::int64_t expert_elements = 0;
  std::int64_t tensor_summed_begin = 0;  ///< [begin, end) of the dense array
  std::int64_t tensor_summed_end = 0;
};

/// `copies`: in how many pipeline positions the stage lies (two with DualPipe).
StageParameterShards stage_parameter_shards(const Scenario& scenario, int stage,
                                            const Coordinates& at, std::int64_t copies);

/// The pipeline positions that hold a stage, ascending: two with DualPipe, else one.
std::vector<int> positions_of(const Plan& plan, int stage);

/// Every parameter starts at a multiple of this many elements.
inline constexpr std::int64_t kParameterAlignment = 64;

}  // namespace orrery
