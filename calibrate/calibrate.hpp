#pragma once
// `orrery calibrate SCENARIO...`: measures on a device what the steps of scenarios ask for, and
// writes it as a profile.

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "calibrate/measure.hpp"
#include "calibrate/measured_profile.hpp"
#include "kernels/device.hpp"
#include "models/scenario.hpp"

namespace orrery {

struct CalibrationOptions {
  std::string name;           ///< of the profile
  std::string journal;        ///< file of results so far
  bool resume = false;        ///< go on with what the journal has
  double time_limit_s = 480;  ///< for measuring; what is not done by then is left out
  double memory_bytes = 0;    ///< of the device, as the profile states it
  double scratch_bytes = 0;   ///< operands may take at most this
  /// What is used in turns is as large as what a micro-batch touches, within these: beyond, no
  /// cache reaches.
  std::int64_t least_rotation_bytes = std::int64_t{32} << 20;
  std::int64_t most_rotation_bytes = std::int64_t{256} << 20;
  bool flush = false;      ///< as DeviceTimer's
  std::string provenance;  ///< program, version, command, date: into the file
  MeasureOptions measure;
  std::uint64_t seed = 1;  ///< of operands
};

/// After each shape.
struct CalibrationProgress {
  std::size_t done = 0;  ///< of `of`, with those from the journal and those left out
  std::size_t of = 0;
  const std::string& what;                   ///< measured_key
  const Measurement* measurement = nullptr;  ///< null: left out
  double elapsed_s = 0;
};

struct Calibration {
  MeasuredProfile measured;
  std::string yaml;        ///< the profile's file
  std::size_t shapes = 0;  ///< in the profile
  std::size_t from_journal = 0;
  /// Of one product of matrices, the same all the time: how fast the device was. 0: all from
  /// journal.
  double reference_s = 0;
  double share = 0;                ///< of the steps' time in compute ops, by their own profiles
  std::size_t out_of_time = 0;     ///< not measured; --resume goes on with these
  std::vector<std::string> notes;  ///< what was left out, and why; what was unsteady
};

/// Seconds of that product at this moment: a processor's speed moves with its clock and with what
/// its neighbours do.
double reference_seconds(kernels::Device& device);

/// Where nothing at all could be measured, a std::runtime_error says why. The journal stays.
Calibration calibrate(std::span<const Scenario> scenarios, kernels::Device& device,
                      const CalibrationOptions& options,
                      const std::function<void(const CalibrationProgress&)>& progress = {});

}  // namespace orrery
