#pragma once
// A Report: the numbers that a simulated (or executed) step comes to. Writers only format it.

#include <array>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "models/scenario.hpp"
#include "reports/uncertainty.hpp"
#include "sim/price.hpp"
#include "sim/program.hpp"
#include "sim/timeline.hpp"
#include "sim/traffic.hpp"

namespace orrery {

/// How transfers are timed: each by a formula, alone on an idle network, or as flows that share the
/// links of the cluster's fabric, beside computation that shares the GPU with them.
enum class Network : std::uint8_t { formula, flows };

/// A partition of a rank's step, in seconds: the parts add up to the step (exactly so in integer
/// picoseconds; the rules are in reports/attribution.hpp). Time of a cell in which no compute op
/// runs while a communication op does is exposed communication; the rest of the cell belongs to its
/// kind; time outside of cells, and waiting within the optimizer's cell, is bubble.
struct PhaseTimes {
  double forward = 0;
  double backward = 0;  ///< full and input-only backwards
  double weight = 0;
  double overlapped = 0;
  double bubble = 0;
  double optimizer = 0;
  double exposed_communication = 0;
  double sum() const {
    return forward + backward + weight + overlapped + bubble + optimizer + exposed_communication;
  }
};

/// Exposed communication in seconds, by what is exposed (rule 3 of reports/attribution.hpp).
struct ExposedTimes {
  double expert = 0;    ///< dispatch and combine
  double tensor = 0;    ///< tensor- and context-parallel collectives
  double data = 0;      ///< gradients and parameters
  double pipeline = 0;  ///< sends between stages
};

/// The same step cut as ISCA'25 (arXiv 2505.09343) Table 4 does: whole cells, exposed communication
/// included. 1F, 1B (full and input-only), 1W, 1F1B, bubble, opt. These add up to the step, too.
struct CellTimes {
  double forward = 0;
  double backward = 0;
  double weight = 0;
  double overlapped = 0;
  double bubble = 0;
  double optimizer = 0;
  double sum() const { return forward + backward + weight + overlapped + bubble + optimizer; }
};

/// Mean duration of one cell of a kind on a rank as it ran, waiting for peers included.
struct CellDuration {
  CellKind kind{};
  std::int64_t count = 0;
  double mean_s = 0;
};

struct RankReport {
  std::uint32_t rank = 0;  ///< simulated rank
  std::int64_t multiplicity = 1;
  int position = 0;             ///< pipeline position
  std::vector<int> stages;      ///< model stages it holds
  std::int64_t parameters = 0;  ///< resident on this rank
  PhaseTimes phases_s;
  ExposedTimes exposed_s;
  CellTimes cells_s;
  std::vector<CellDuration> cell_durations;
  std::int64_t memory_peak_bytes = 0;
  double memory_peak_at_s = 0;
  std::array<std::int64_t, kMemoryKinds> memory_at_peak{};
  std::string memory_peak_in;  ///< name of the op whose allocation reached the peak
};

struct PriceRow {
  std::string label;       ///< "routed_up"
  std::string shape;       ///< describe(shape)
  std::int64_t count = 0;  ///< executions per step on all GPUs; a transfer counts for its sender
  double time_s = 0;       ///< of one execution
  double lasted_s = 0;     ///< mean of all executions as they ran: longer where links were shared
  double per_gpu_s = 0;    ///< count * time_s / GPUs: mean op time of a GPU, overlapped or not
  double share = 0;        ///< of all priced op time
  PriceSource source{};
  double spread = 0;
  bool extrapolated = false;
  std::string note;
};

/// Spans of one phase within an isolated overlapped pair, per layer (compare DeepSeek's trace).
struct PhaseSpan {
  Phase phase{};
  std::int64_t layers = 0;
  double mean_span_s = 0;  ///< first start to last end, per layer
  double mean_busy_s = 0;  ///< sum of op times, per layer
};

/// One cell of one position, simulated alone.
struct IsolatedCell {
  int position = 0;
  CellKind kind{};
  std::string what;  ///< "F of stage 3 with B of stage 12"
  double time_s = 0;
  std::vector<PhaseSpan> phases;
};

/// The links of one tier of the fabric over the step.
struct TierReport {
  std::string tier;
  std::int64_t links = 0;  ///< that any op uses, each direction by itself
  double mean_use = 0;     ///< bytes carried over what the link could have carried in the step
  double busiest_use = 0;
  std::string busiest;     ///< "node1/nic0 -> plane0/leaf0"
  double held_back_s = 0;  ///< by its most limiting link: time that ops lost to it
  std::string limiting;    ///< that link; empty: none of the tier ever limited
};

struct NetworkReport {
  bool flows = false;  ///< false: each transfer priced by formula, alone on an idle network
  std::string fabric;
  std::vector<TierReport> tiers;
  double stretched_s = 0;  ///< mean per GPU: op time beyond the prices, overlapped or not
};

struct EngineStatistics {
  std::uint64_t operations = 0;
  std::uint64_t events = 0;
  std::uint64_t ranks_simulated = 0;
  std::uint64_t program_bytes = 0;
  double wall_s = 0;  ///< the only number that differs between runs; written only where asked for
};

struct Report {
  std::string scenario;
  std::string plan;  ///< "TP1 CP1 PP16 DP128 EP64 ZeRO-1, dual_pipe, fp8_deepseek"
  std::int64_t gpus = 0;
  std::string device;
  std::string executed_on;            ///< what the step ran on for real; empty: it was simulated
  std::vector<TrainedStep> training;  ///< the steps that ran, of an executed one
  double peak_flops_per_s = 0;        ///< what MFU refers to: the device's dense BF16 peak
  double step_time_s = 0;
  double tokens_per_step = 0;
  double tokens_per_s_per_gpu = 0;
  double tokens_per_day = 0;
  double gpu_hours_per_trillion_tokens = 0;
  double tflops_per_gpu_causal = 0;
  double tflops_per_gpu_noncausal = 0;
  double mfu_causal = 0;  ///< against the device's BF16 peak, the published convention
  double mfu_noncausal = 0;
  PhaseTimes phases_s;     ///< mean over ranks
  ExposedTimes exposed_s;  ///< likewise
  CellTimes cells_s;       ///< mean over ranks
  std::vector<RankReport> ranks;
  std::vector<IsolatedCell> cells;
  std::vector<PriceRow> prices;  ///< by share, largest first
  NetworkReport network;
  std::vector<std::pair<std::string, double>>
      critical_path_s;  ///< phase name -> seconds, largest first
  double memory_capacity_bytes = 0;
  std::optional<StepUncertainty> uncertainty;  ///< where it was asked for
  std::vector<std::string> warnings;
  std::uint64_t fingerprint = 0;
  EngineStatistics engine;
};

/// `timeline` is a run of `program`, which was built from `scenario`, with `traffic` where that is
/// not null. Does not fill `cells`.
Report summarise(const Scenario& scenario, const Program& program, const PriceList& prices,
                 const Timeline& timeline, const Traffic* traffic = nullptr);

/// Each kind of cell that each of these pipeline positions runs (distinct in kind and stages, the
/// first one of the schedule), built, priced and simulated alone.
std::vector<IsolatedCell> isolated_cells(const Scenario& scenario, std::span<const int> positions,
                                         Network network);

/// The position whose isolated cells stand for the step: in the middle of the pipeline, away from
/// embedding and head (V3: 7 of 0..15).
int middle_position(const Scenario& scenario);

}  // namespace orrery
