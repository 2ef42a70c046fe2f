#pragma once
// How lower() works, for the files that implement it.
//
// A tensor is named by what it is in its layer. Names that end in "f" are full: of all tokens where
// sequence parallelism gives a rank only its own; without it they are the same as without the f.
// Suffixes: ":q" in FP8 with scales along the rows, as a GEMM reads it; ":t" that, transposed, for
// a weight gradient; ":k" in the format it is kept in; ":p" in E5M6. Tensors are *kept* from a
// micro-batch's forward pass to its last use, or *scratch*, one for each half of an overlapped
// pair, which every layer and micro-batch uses again.
//
//   forward    x0 the residual stream that enters, n0 its norm; latent [q | kv | rotary key], qn,
//   kvn,
//              q, kvu (keys and values of all heads), kr (rotary key), k, v; or qkv, qkn; o, ao
//              (attention's output), x1 = x0 + ao, n1;
//              up, act, y; or logits, rows_x (tokens by expert), up_r, act_r, down_r, red (summed
//              by token), y_routed; sh_up, sh_act, y_shared
//   backward   d_NAME is the gradient of NAME; dy of the layer's output, dx1, dx0 of x1 and x0
//   edges      emb; xf, nf, logits_v (head); e, nh, ne, cat, mtp_x (MTP front)

#include <functional>
#include <map>
#include <set>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "calibrate/execute/lowering.hpp"
#include "models/schedule.hpp"

namespace orrery {

/// What a stage consists of, in forward order: as models/cell.cpp has it.
struct StageUnit {
  enum class Kind : std::uint8_t { embedding, layer, head, mtp_front };
  Kind kind{};
  std::int64_t layer = -1;  ///< of layers and MTP fronts
  int module = -1;          ///< of MTP; -1: the main head
  bool moe = false;
};

class RankLowering {
 public:
  /// `rank` of the Program stands for `world_rank`.
  RankLowering(const Scenario& scenario, const Program& program, RankId rank, RankId world_rank,
               bool alone, Tensors& tensors);
  Lowered lower();

 private:
  enum class Half : std::uint8_t { forward, backward };

  /// Where an op stands: a unit of a stage, in one half, for one micro-batch.
  struct Place {
    int stage = 0;
    int micro_batch = 0;
    Half half{};
    std::size_t unit = 0;
  };

  struct Spec {
    std::int64_t rows = 0;
    std::int64_t columns = 0;
    kernels::Format format{};
  };

  /// A linear layer's tensors.
  struct Linear {
    const char* in;
    const char* out;
    const char* d_out;
    const char* d_in;
    bool routed = false;
  };

  // lowering.cpp
  void make_specs();
  void make_stages();
  void make_inputs();
  void initialise(const StageState& stage);
  void lower_op(OpId op);
  Place place_of(OpId op, const Shape& shape);
  std::size_t unit_of(OpId op, const Shape& shape, int stage, Half half);
  int slot(int stage, int micro_batch);
  void finish_cells(OpId before);
  void release(int stage, int micro_batch);

  const StageUnit& unit() const { return unit_at(place_.stage, place_.unit); }
  const StageUnit& unit_at(int stage, std::size_t index) const {
    return units_[static_cast<std::size_t>(stage)][index];
  }
  bool kept(std::string_view name, const StageUnit& unit) const;
  Spec spec(std::string_view name) const;
  kernels::Matrix t(const std::string& name) { return t(name, place_.unit); }
  kernels::Matrix t(const std::string& name, std::size_t unit);
  std::string key(const std::string& name, std::size_t unit);
  /// Arrays that routing makes, kept with their layer and micro-batch.
  template <class T>
  T* kept_array(const std::string& name, std::int64_t count) {
    return tensors_.array<T>(kept_key(name, place_.stage, place_.unit, place_.micro_batch), count);
  }
  template <class T>
  T* scratch_array(const std::string& name, std::int64_t count) {
    return tensors_.array<T>(scratch_key(name, place_.half), count);
  }
  std::string kept_key(std::string_view name, int stage, std::size_t unit, int micro_batch);
  static std::string scratch_key(std::string_view name, Half half);

  std::vector<kernels::Matrix> input_terms(std::size_t unit);
  std::vector<kernels::Matrix> output_terms(std::size_t unit);
  kernels::Matrix incoming_gradient(std::size_t unit);
  kernels::Matrix outgoing_gradient(int stage, int micro_batch);
  kernels::Matrix stage_buffer(const char* name, int stage, int micro_batch);

  // lowering_parameters.cpp
  struct Found {
    const StageState* stage = nullptr;
    const ParameterShard* shard = nullptr;
  };
  Found find(const std::string& name) const;
  std::string parameter_name(std::string_view name) const;
  kernels::Matrix weight(std::string_view name) const;
  kernels::Matrix gradient(std::string_view name) const;
  kernels::Matrix quantised_weight(std::string_view name);
  kernels::Matrix transposed_weight(std::string_view name);
  void requantise(const StageState& stage, bool expert, std::vector<kernels::Call>& calls);
  void lower_optimizer(const Shape& shape);
  void lower_gradient_norm();
  void lower_adamw();
  ArrayPart part_of(const StageState& stage, bool expert) const;
  ArrayPart share_of(const StageState& stage, bool expert) const {
    return owned_part(scenario_, stage, expert, world_rank_);
  }
  bool gathers_parameters(const StageState& stage, bool expert) const;

  // lowering_kernels.cpp
  Linear linear(std::string_view label) const;
  void lower_gemm(const std::string& label, const Gemm& gemm);
  void lower_attention(const AttentionCore& core);
  void lower_streaming(const std::string& label, const Streaming& streaming);
  void lower_format(const std::string& label, StreamingKind kind);
  void lower_recast(const std::string& tensor);
  void lower_norm(const std::string& label, bool backward);
  void lower_rope(bool gradient);
  void lower_copy(const std::string& label);
  void lower_elementwise(const std::string& label);
  void lower_activation(const std::string& name, bool backward);
  void lower_router(const std::string& label);
  void lower_embedding(bool backward);
  void lower_cross_entropy(const std::string& label);
  bool quantised_at_hand(std::string_view name) const;
  kernels::Matrix expert_input(const char* received, const char* own);
  kernels::AttentionShape attention_shape() const;
  void call(kernels::Call c) { lowered_op_.calls.push_back(std::move(c)); }

  // lowering_communication.cpp
  void lower_collective(OpId op, const std::string& label, const Collective& collective);
  void lower_exchange(OpId op, const ExpertExchange& exchange);
  void lower_transfer(OpId op);
  void lower_hand_over(OpId op);
  void members_of(OpId op, Communication& communication) const;
  void gather(OpId op, const std::string& from);
  void reduce(OpId op, const std::string& to, CollectiveKind kind);
  void sum_up(const std::vector<kernels::Matrix>& terms, const kernels::Matrix& out);

  // lowering_alone.cpp
  void copy_instead(OpId op);
  void find_mean_received();
  void make_received();
  const void* made_up(const kernels::Matrix& like, bool gradient);

  std::int64_t received_capacity() const;
  std::int64_t row_capacity() const;
  float epsilon() const { return static_cast<float>(training_.norm_epsilon); }
  bool block_scaled() const { return linear_format_ == kernels::Format::e4m3; }

  const Scenario& scenario_;
  const Model& model_;
  const Plan& plan_;
  const Program& program_;
  RankId rank_;
  RankId world_rank_;
  bool alone_ = false;  ///< its peers are not there
  const Training& training_;
  Tensors& tensors_;
  Layout layout_;
  Schedule schedule_;
  Coordinates at_;
  std::vector<std::vector<StageUnit>> units_;  ///< by stage
  std::map<std::string, Spec, std::less<>> specs_;
  std::int64_t tokens_ = 0;
  std::int64_t local_tokens_ = 0;
  std::int64_t mean_received_ = 0;  ///< tokens that a rank's experts are sent, if it is alone
  bool sequence_split_ = false;     ///< full and local tokens differ
  /// By (stage, micro-batch): whose weight gradients run in cells of their own, later.
  std::set<std::pair<int, int>> weights_apart_;
  kernels::Format activations_{};
  kernels::Format linear_format_{};
  const std::int32_t* positions_ = nullptr;  ///< of all tokens of a micro-batch

  Lowered lowered_;
  LoweredOp lowered_op_;
  Place place_;
  // Cells and MTP modules as the ops go by.
  std::size_t next_cell_ = 0;
  std::size_t module_cell_ = static_cast<std::size_t>(-1);  ///< the cell that module_ is about
  int module_[2] = {-1, -1};                                ///< by half: whose head comes next
  struct InUse {
    int slot = 0;
    bool weights_done = false;
    bool gradient_sent = false;
  };
  std::map<std::pair<int, int>, InUse> in_use_;  ///< by (stage, micro-batch)
  std::vector<std::pair<int, int>> sent_;        ///< whose gradient has just been sent on
  std::map<int, std::vector<int>> free_slots_;   ///< by stage
  std::map<int, int> slots_;                     ///< by stage: made so far
  std::map<std::string, ExchangeRoute*> routes_;
};

}  // namespace orrery
