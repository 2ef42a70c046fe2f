#include "kernels/probe_plan.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <numeric>
#include <sstream>

namespace orrery {
namespace {

/// As printf's %.*g.
std::string number(double value, int digits) {
  char text[40];
  std::snprintf(text, sizeof text, "%.*g", digits, value);
  return text;
}

/// In double quotes, as YAML reads it back; names of devices hold nothing stranger than these.
std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  return result + '"';
}

std::string provenance(const ProbeResult& r) {
  return "orrery_probe on " + r.device + ", " + std::to_string(r.sms) + " SMs, driver " + r.driver +
         " (CUDA " + cuda_version(r.driver_cuda) + "), runtime " + cuda_version(r.runtime_cuda) +
         ", SM clock " + number(r.sm_mhz_before, 4) + " MHz before and " +
         number(r.sm_mhz_after, 4) + " MHz after";
}

std::string in_gb_per_s(const Summary& bandwidth) {
  return number(bandwidth.median * 1e-9, 5) + " +- " + number(bandwidth.mad * 1e-9, 2);
}

void write_chain(std::ostream& out, const char* name, const ChainResult& chain) {
  out << "#   " << name << ": gap median " << number(chain.gap_ns.median, 5) << " ns, MAD "
      << number(chain.gap_ns.mad, 3) << " ns, " << chain.gap_ns.samples << " gaps; kernel "
      << number(chain.duration_centre_ns, 5) << " ns, begin to begin "
      << number(chain.period_centre_ns, 5) << " ns (by events " << number(chain.event_period_ns, 5)
      << " ns)\n";
}

double launch_s(const ProbeResult& r) {
  return (r.stream.period_centre_ns - r.stream.gap_centre_ns) * 1e-9;
}

}  // namespace

std::vector<int> sms_to_measure(int device_sms) {
  std::vector<int> result;
  // Dense where a plan that gives 20 to 32 of 132 SMs to communication leaves the rest.
  for (const int sms : {8, 16, 20, 32, 48, 64, 80, 96, 104, 108, 112, 116, 120, 124, 128, 132}) {
    if (sms < device_sms) result.push_back(sms);
  }
  result.push_back(device_sms);
  return result;
}

std::uint64_t buffer_words(std::uint64_t free_bytes, std::uint64_t wanted_bytes,
                           std::uint64_t word_bytes, std::uint64_t chunk_words) {
  const std::uint64_t words = std::min(wanted_bytes, free_bytes / 4) / word_bytes;
  return words / chunk_words * chunk_words;
}

ChainTimes chain_times(const std::vector<Stamp>& stamps, std::size_t blocks) {
  ChainTimes times;
  double last_begin_ns = 0;
  double last_end_ns = 0;
  for (std::size_t first = 0; first + blocks <= stamps.size(); first += blocks) {
    std::uint64_t begin_ns = stamps[first].begin_ns;
    std::uint64_t end_ns = stamps[first].end_ns;
    for (std::size_t i = first + 1; i < first + blocks; ++i) {
      begin_ns = std::min(begin_ns, stamps[i].begin_ns);
      end_ns = std::max(end_ns, stamps[i].end_ns);
    }
    // The timer counts from 1970: as doubles only differences are exact.
    const auto begin =
        static_cast<double>(static_cast<std::int64_t>(begin_ns - stamps.front().begin_ns));
    const double end = begin + static_cast<double>(end_ns - begin_ns);
    times.duration_ns.push_back(end - begin);
    if (first > 0) {
      times.gap_ns.push_back(begin - last_end_ns);
      times.period_ns.push_back(begin - last_begin_ns);
    }
    last_begin_ns = begin;
    last_end_ns = end;
  }
  return times;
}

double centre_ns(const std::vector<double>& times_ns, double step_ns) {
  const double middle = median(times_ns);
  if (10 * step_ns <= middle) return middle;
  return std::accumulate(times_ns.begin(), times_ns.end(), 0.0) /
         static_cast<double>(times_ns.size());
}

std::string driver_release(const std::string& proc_text) {
  // "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue ..."; open modules name
  // themselves otherwise. The release is the first word of digits with dots.
  std::istringstream words(proc_text);
  for (std::string word; words >> word;) {
    const bool digits = word.find_first_not_of("0123456789.") == std::string::npos;
    if (digits && word.find('.') != std::string::npos) return word;
  }
  return "unknown";
}

std::string cuda_version(int version) {
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

double predicted_copy_s(const ProbeResult& r, std::uint64_t bytes) {
  return launch_s(r) + r.stream.gap_centre_ns * 1e-9 +
         2 * static_cast<double>(bytes) / r.bandwidth.back().copy.median;
}

std::string to_yaml(const ProbeResult& r) {
  const BandwidthPoint& all = r.bandwidth.back();
  std::ostringstream out;
  out << "# Written by orrery_probe: keys for a file of scenarios/profiles. Add the date.\n"
      << "# " << r.device << ", " << r.sms << " SMs; rated clocks: SM " << number(r.rated_sm_mhz, 4)
      << " MHz, memory " << number(r.rated_memory_mhz, 4) << " MHz; SM clock measured "
      << number(r.sm_mhz_before, 4) << " MHz before, " << number(r.sm_mhz_after, 4)
      << " MHz after.\n"
      << "# Driver " << r.driver << " (CUDA " << cuda_version(r.driver_cuda) << "), runtime "
      << cuda_version(r.runtime_cuda) << "; the device's nanosecond timer steps by "
      << number(r.timer_step_ns, 4) << " ns.\n"
      << "# Chains of dependent kernels, one block of 128 threads an SM, each thread 16 bytes:\n";
  write_chain(out, "stream", r.stream);
  write_chain(out, "graph ", r.graph);
  out << "launch_gap: " << number(r.stream.gap_centre_ns * 1e-3, 4) << " us\n"
      << "launch_gap_source: "
      << quoted(provenance(r) +
                ": last block's end to next kernel's first block's begin, in-kernel timer, chain "
                "enqueued ahead; in a graph " +
                number(r.graph.gap_centre_ns * 1e-3, 4) +
                " us. Contains what profilers count as the begin and end of a kernel")
      << "\n";

  out << "# GB/s read plus written, median +- MAD (" << r.buffer_bytes << " bytes a buffer):\n"
      << "#   SMs   copy | read | write\n";
  for (const BandwidthPoint& p : r.bandwidth) {
    out << "#   " << p.sms << "   " << in_gb_per_s(p.copy) << " | " << in_gb_per_s(p.read) << " | "
        << in_gb_per_s(p.write);
    if (p.sms_seen != p.sms) out << "   LEFT OUT: ran on " << p.sms_seen << " SMs";
    out << "\n";
  }
  out << "bandwidth_by_sms:\n"
      << "  source: "
      << quoted(
             provenance(r) +
             ": copy by one block of 1024 threads an SM, 8 loads of 16 bytes in flight a thread, "
             "as a share of what all SMs reach, at most 1")
      << "\n  points:\n";
  for (const BandwidthPoint& p : r.bandwidth) {
    if (p.sms_seen != p.sms) continue;
    out << "    - [" << p.sms << ", " << number(std::min(1.0, p.copy.median / all.copy.median), 4)
        << "]\n";
  }

  double spread = 0;
  out << "# Copies in a row, us each, measured | by launch + launch_gap + bytes / bandwidth:\n";
  for (const CopyPeriod& copy : r.copies) {
    const double predicted = predicted_copy_s(r, copy.bytes);
    spread = std::max(spread, std::abs(predicted / copy.seconds - 1));
    out << "#   " << (copy.bytes >> 20) << " MiB   " << number(copy.seconds * 1e6, 5) << " | "
        << number(predicted * 1e6, 5) << "\n";
  }
  out << "streaming:\n"
      << "  copy:\n"
      << "    bandwidth: " << number(all.copy.median * 1e-9, 5) << " GB/s\n"
      << "    launch: " << number(launch_s(r) * 1e6, 4) << " us\n"
      << "    derived: false\n"
      << "    spread: " << number(spread, 3) << "\n"
      << "    id: orrery-probe\n"
      << "    source: "
      << quoted(provenance(r) +
                ": copy on all SMs; launch is begin to begin of the chain of tiny kernels less "
                "launch_gap; spread is the worst error of the formula on smaller copies")
      << "\n";
  return out.str();
}

}  // namespace orrery
