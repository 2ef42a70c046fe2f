// orrery VERB ...: one function per verb. Results go to standard output, notes and warnings to
// standard error. Exit status: 0 fine; 2 the input is wrong; 3 an aim was missed that --fail-above
// asked for; 4 nothing fits, of what a search may choose from or for a stage of a budget; 1 anything
// else.

#include <fmt/core.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <ctime>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "calibrate/calibrate.hpp"
#include "calibrate/execute/train.hpp"
#include "calibrate/fit_nccl.hpp"
#include "calibrate/local_cluster.hpp"
#include "calibrate/measure_network.hpp"
#include "calibrate/read_nccl.hpp"
#include "calibrate/transport/launched.hpp"
#include "kernels/device.hpp"
#include "reports/budget/budget.hpp"
#include "reports/capacity.hpp"
#include "reports/compare.hpp"
#include "reports/compare_profiles.hpp"
#include "reports/explain.hpp"
#include "reports/generation.hpp"
#include "reports/goodput.hpp"
#include "reports/goodput_runs.hpp"
#include "reports/html/page.hpp"
#include "reports/joined.hpp"
#include "reports/json.hpp"
#include "reports/network.hpp"
#include "reports/output.hpp"
#include "reports/search/search_report.hpp"
#include "reports/search/search_session.hpp"
#include "reports/study.hpp"
#include "reports/terminal.hpp"
#include "reports/trace.hpp"
#include "reports/uncertainty.hpp"
#include "reports/validate.hpp"
#include "reports/what_if.hpp"

namespace {

using namespace orrery;

constexpr int kWrongInput = 2;
constexpr int kMissedAim = 3;
constexpr int kNothingFits = 4;

/// Options of all verbs.
struct Options {
  std::vector<std::string> files;
  std::vector<std::string> set;  ///< of what is read, before it is
  std::vector<std::string> what_if;
  std::string what_ifs;  ///< a file of them
  std::string json;      // empty: none; "-": standard output
  std::string csv;       // likewise
  BudgetOptions budget;
  bool quiet = false;
  std::string trace;
  std::vector<std::uint32_t> trace_ranks;
  bool all_ranks = false;
  std::optional<Engine> engine;
  std::optional<Network> fidelity;  ///< of the network; none: what there is
  bool timing = false;
  bool resolved = false;
  bool fail_above = false;
  NetworkQuestion network;
  ExchangeQuestion exchange;
  std::string collective;
  std::vector<std::string> nccl;
  std::string cluster;
  std::string out;
  NcclFitOptions fit;
  int ranks = 0;  ///< whose messages are measured
  std::string profile;
  std::string device;  ///< to calibrate; empty: the GPU, else the CPU
  int threads = 0;
  double time_limit_s = 480;
  bool resume = false;
  std::string command;  ///< as it was given
  std::optional<DeviceKind> execute;
  std::vector<std::string> calibration;  ///< scenarios whose kernels are measured
  TrainOptions training;
  SearchOptions search;
  AskedQuestion question;
  std::string space;
  std::string store;
  bool fresh = false;
  std::string write_best;
  double silence_s = 30;  ///< of a rank that is taken to be lost
  std::int64_t draws = 0;  ///< of prices' errors; 0: none
  GoodputQuestion goodput;
  std::string published;  ///< file of published goodput
  CapacityQuestion capacity;
  std::string format = "html";
  std::string page;  ///< of run; empty: none
};

bool wants_colour() {
  const auto set = [](const char* name) {
    const char* value = std::getenv(name);
    return value != nullptr && value[0] != '\0';
  };
  const char* terminal = std::getenv("TERM");
  const bool dumb = terminal != nullptr && std::string_view(terminal) == "dumb";
  return isatty(STDOUT_FILENO) != 0 && !set("NO_COLOR") && !dumb;
}

[[noreturn]] void reject(std::string message, std::string hint = "") {
  throw InputError({Problem{{"command line", 0, 0}, std::move(message), std::move(hint), ""}});
}

Overrides overrides(const Options& options) {
  return overrides_of(options.set, "--set");
}

void print_notes(const Options& options, const Scenario& scenario) {
  if (options.quiet) return;
  for (const std::string& note : scenario.notes) fmt::print(stderr, "note: {}\n", note);
}

void print_warnings(const Options& options, const Report& report) {
  if (options.quiet) return;
  for (const std::string& text : report.warnings) fmt::print(stderr, "warning: {}\n", text);
}

void write_run(const Options& options, Study study);

/// The same step for real. Of MPI ranks only the first has results to write.
int execute(const Options& options) {
  const Scenario scenario = read_scenario(options.files[0], overrides(options));
  TrainOptions training = options.training;
  training.device = *options.execute;
  if (!options.quiet && isatty(STDERR_FILENO) != 0) {
    training.progress = [](const TrainedStep& step) {
      fmt::print(stderr, "step {}: loss {:.4f}, {:.3f} s\n", step.number, step.loss, step.seconds);
    };
  }
  TrainingRun run = train(scenario, training);
  if (!run.first_rank) return 0;
  Study study =
      study_executed(scenario, std::move(run.program), std::move(run.timeline), run.device);
  study.report.training = std::move(run.steps);
  write_run(options, std::move(study));
  return 0;
}

int run(const Options& options) {
  if ((options.json == "-") + (options.trace == "-") + (options.page == "-") > 1) {
    reject("only one of --json, --trace and --report can go to standard output");
  }
  if (options.execute) return execute(options);
  Scenario scenario = read_scenario(options.files[0], overrides(options));
  if (options.engine == Engine::sweep && network_of(scenario, options.fidelity) == Network::flows) {
    reject("--engine sweep knows no flows", "add --network formula, or leave --engine out");
  }
  Study study = study_step(std::move(scenario),
                           {.all_ranks = options.all_ranks,
                            .network = options.fidelity,
                            .engine = options.engine.value_or(Engine::sweep),
                            .isolated = !options.json.empty() || !options.page.empty()});
  if (options.draws > 0) study.report.uncertainty = uncertainty(study, {.draws = options.draws});
  write_run(options, std::move(study));
  return 0;
}

void write_run(const Options& options, Study study) {
  print_notes(options, study.scenario);
  if (!options.trace.empty()) {
    std::vector<std::uint32_t> ranks = options.trace_ranks;
    if (ranks.empty()) ranks = representative_ranks(study.report);
    std::sort(ranks.begin(), ranks.end());
    ranks.erase(std::unique(ranks.begin(), ranks.end()), ranks.end());
    if (ranks.back() >= study.program.ranks()) {
      reject(
          fmt::format("--trace-ranks: there is no rank {}; simulated are 0..{}", ranks.back(),
                      study.program.ranks() - 1),
          options.all_ranks ? "" : "one rank stands for each pipeline position; see --all-ranks");
    }
    write_trace(study, ranks, options.trace);
  }
  if (!options.json.empty()) {
    write_file(options.json, to_json(study.report, {.timing = options.timing}));
  }
  if (options.json == "-" || options.trace == "-" || options.page == "-") {
    print_warnings(options, study.report);
  } else if (!options.quiet ||
             (options.json.empty() && options.trace.empty() && options.page.empty())) {
    write_file("-",
               to_terminal(study.report, {.colour = wants_colour(), .timing = options.timing}));
  }
  if (!options.page.empty()) {
    write_file(options.page, html_page(capacity_report(std::move(study))));
  }
}

int report_capacity(Options& options) {
  options.capacity.scenarios = options.files;
  options.capacity.network = options.fidelity;
  options.capacity.overrides = overrides(options);
  const CapacityReport report = capacity_report(options.capacity);
  for (const CapacityScenario& s : report.scenarios) {
    print_notes(options, s.study.scenario);
    for (const Judgement& judgement : s.judgements) {
      if (options.out != "-") write_file("-", answer_of(judgement) + "\n");
    }
  }
  write_file(options.out, options.format == "html"       ? html_page(report)
                          : options.format == "markdown" ? to_markdown(report)
                                                         : to_csv(report));
  return 0;
}

int explain_scenario(const Options& options) {
  Scenario scenario = read_scenario(options.files[0], overrides(options));
  if (options.resolved) {
    write_file("-", to_yaml(scenario));
    return 0;
  }
  write_file("-", explain(study_step(std::move(scenario), {.all_ranks = options.all_ranks,
                                                           .network = options.fidelity,
                                                           .isolated = true})));
  return 0;
}

/// One scenario against changes of it.
int compare_what_ifs(const Options& options) {
  WhatIfs asked;
  if (!options.what_ifs.empty()) asked = read_what_ifs(options.what_ifs);
  for (std::size_t i = 0; i < options.what_if.size(); ++i) {
    asked.list.push_back(parse_what_if(options.what_if[i], static_cast<int>(i) + 1));
  }
  if (!options.files.empty()) asked.scenario = options.files[0];
  if (asked.scenario.empty() || options.files.size() > 1) {
    reject("what-ifs change one scenario",
           "orrery compare SCENARIO --what-if \"NAME: PATH=VALUE\"");
  }
  const WhatIfAnswer answer =
      ask_what_ifs(ScenarioFile(asked.scenario), overrides(options), asked.list, options.fidelity);
  if (!options.json.empty()) write_file(options.json, to_json(answer));
  if (options.json != "-") write_file("-", to_terminal(answer));
  if (options.quiet) return 0;
  for (const std::string& note : answer.base.notes) fmt::print(stderr, "note: {}\n", note);
  for (const WhatIfRow& row : answer.rows) {
    for (const std::string& note : row.notes) {
      const auto& known = answer.base.notes;
      if (std::find(known.begin(), known.end(), note) != known.end()) continue;
      fmt::print(stderr, "note: {}: {}\n", row.what_if.name, note);
    }
    if (row.problems.empty()) continue;
    fmt::print(stderr, "{} cannot run:\n{}", row.what_if.name, format_problems(row.problems));
  }
  return 0;
}

int compare_scenarios(const Options& options) {
  if (!options.what_if.empty() || !options.what_ifs.empty()) return compare_what_ifs(options);
  if (options.files.size() < 2) {
    reject("compare needs two scenarios or more, or one with --what-if or --what-ifs",
           "see orrery compare --help");
  }
  if (is_profile(options.files[0])) {
    write_file("-", compare_profiles(options.files));
    return 0;
  }
  std::vector<Report> reports;
  std::vector<std::string> names;
  for (const std::string& file : options.files) {
    const Study study =
        study_step(read_scenario(file, overrides(options)), {.network = options.fidelity});
    print_notes(options, study.scenario);
    reports.push_back(study.report);
    names.push_back(std::filesystem::path(file).stem().string());
  }
  if (!options.json.empty()) write_file(options.json, compare_json(reports));
  if (options.json != "-") write_file("-", compare(reports, names));
  return 0;
}

int validate_execution(Options& options);

int validate_runs(Options& options) {
  if (options.execute) return validate_execution(options);
  std::vector<std::string> files = options.files;
  if (files.empty()) {
    const std::filesystem::path folder = "scenarios/runs";
    if (!std::filesystem::is_directory(folder)) {
      reject("no file given and there is no folder scenarios/runs here");
    }
    for (const auto& entry : std::filesystem::directory_iterator(folder)) {
      if (entry.path().extension() == ".yaml") files.push_back(entry.path().string());
    }
    std::sort(files.begin(), files.end());
  }
  std::vector<Validation> validations;
  for (const std::string& file : files) {
    for (Validation& v : validate(file, overrides(options), options.draws)) {
      validations.push_back(std::move(v));
    }
  }
  if (!options.json.empty()) write_file(options.json, validation_json(validations));
  if (options.json != "-") write_file("-", validation_table(validations));
  const auto missed = [](const ValidationRow& row) { return !row.met(); };
  const bool any = std::any_of(validations.begin(), validations.end(), [&](const Validation& v) {
    return std::any_of(v.rows.begin(), v.rows.end(), missed);
  });
  return options.fail_above && any ? kMissedAim : 0;
}

int budget_recipe(const Options& options) {
  if (options.json == "-" && options.csv == "-") {
    reject("--json and --csv cannot both go to standard output");
  }
  const Budget budget = make_budget(read_recipe(options.files[0]), options.budget);
  for (const std::string& note : budget.recipe.notes) {
    if (!options.quiet) fmt::print(stderr, "note: {}\n", note);
  }
  if (!options.json.empty()) write_file(options.json, to_json(budget));
  if (!options.csv.empty()) write_file(options.csv, to_csv(budget));
  if (options.json != "-" && options.csv != "-") write_file("-", to_terminal(budget));
  if (!budget.fits()) return kNothingFits;
  return options.fail_above && !budget.aims_met() ? kMissedAim : 0;
}

/// How long a run takes with failures, or what is published of such runs.
int ask_about_goodput(Options& options) {
  if (!options.published.empty()) {
    if (!options.files.empty() || !options.set.empty()) {
      reject("--published is asked without a scenario, and without --set");
    }
    const std::vector<GoodputRun> runs = goodput_runs(options.published);
    if (!options.json.empty()) write_file(options.json, goodput_json(runs));
    if (options.json != "-") write_file("-", goodput_table(runs));
    return 0;
  }
  if (options.files.empty()) reject("reliability needs a scenario, or --published");
  options.goodput.file = options.files[0];
  options.goodput.overrides = overrides(options);
  const Goodput answer = ask_goodput(options.goodput);
  if (!options.json.empty()) write_file(options.json, to_json(answer));
  if (options.json != "-") write_file("-", to_terminal(answer));
  return 0;
}

int generate(const Options& options) {
  const GenerationReport report = study_generation(read_generation(options.files[0], overrides(options)));
  if (!options.quiet) {
    for (const std::string& note : report.scenario.notes) fmt::print(stderr, "note: {}\n", note);
    for (const std::string& text : report.warnings) fmt::print(stderr, "warning: {}\n", text);
  }
  if (!options.json.empty()) write_file(options.json, to_json(report));
  if (options.json != "-") write_file("-", to_terminal(report));
  return 0;
}

int ask_about_network(Options& options) {
  NetworkQuestion& question = options.network;
  question.file = options.files[0];
  question.overrides = overrides(options);
  if (options.collective == "dispatch" || options.collective == "combine") {
    options.exchange.combine = options.collective == "combine";
    question.operation = options.exchange;
  } else if (!options.collective.empty()) {
    for (const NcclOp op : {NcclOp::all_reduce, NcclOp::all_gather, NcclOp::reduce_scatter,
                            NcclOp::alltoall, NcclOp::broadcast, NcclOp::sendrecv}) {
      if (options.collective == name_of(op)) question.operation = op;
    }
  }
  question.flows = options.fidelity == Network::flows;
  const NetworkAnswer answer = ask_network(question);
  if (!options.json.empty()) write_file(options.json, to_json(answer));
  if (options.json != "-") write_file("-", to_terminal(answer));
  return 0;
}

volatile std::sig_atomic_t stop_signal = 0;
std::string stop_text;

/// Says so at once: a launcher that ends all its ranks gives them a second, and a commit on a busy
/// disk may take longer. A second signal ends the program where it is.
void stop(int signal) {
  stop_signal = signal;
  std::signal(signal, SIG_DFL);
  [[maybe_unused]] const ssize_t said = write(STDERR_FILENO, stop_text.data(), stop_text.size());
}

void stop_on_signals(const std::string& text) {
  stop_text = text;
  std::signal(SIGINT, stop);
  std::signal(SIGTERM, stop);
}

/// A line that is written over, on a terminal only.
void show_search(const SearchProgress& progress) {
  fmt::print(stderr, "\r\x1b[K{}", progress_text(progress));
  std::fflush(stderr);
}
void end_search_line(const Options& options) {
  if (!options.quiet && isatty(STDERR_FILENO) != 0) fmt::print(stderr, "\r\x1b[K");
}

/// What was asked goes to the files and streams that were asked for; its status.
int answer_search(const Options& options, SearchSession& session) {
  const SearchInput& input = session.input();
  const auto write_best = [&](const Candidate& candidate) {
    if (options.write_best.empty()) return;
    write_file(options.write_best, scenario_of(candidate, input.scenario, options.write_best));
  };
  const auto print = [&](const std::string& summary) {
    const bool written = !options.json.empty() || !options.csv.empty();
    if (options.json != "-" && options.csv != "-" && !(options.quiet && written)) {
      write_file("-", summary);
    }
  };
  if (options.question.days || options.question.gpu_hours) {
    const QuestionOptions how = question_options(session);
    const double tokens = options.question.tokens;
    const Answer answer =
        options.question.days
            ? smallest_cluster(input.scenario, input.space, tokens, *options.question.days, how)
            : best_for_budget(input.scenario, input.space, tokens, *options.question.gpu_hours,
                              how);
    end_search_line(options);
    if (!options.json.empty()) {
      write_file(options.json, to_json(answer, options.question, input.scenario));
    }
    print(to_terminal(answer, options.question, input.scenario, {.colour = wants_colour()}));
    if (answer.met) write_best(answer.choice->layout.candidate);
    return answer.met ? 0 : kNothingFits;
  }
  const Search search(input.scenario, input.space, input.options);
  const SearchAnswer answer = find_best(session, search);
  end_search_line(options);
  if (!options.json.empty()) write_file(options.json, to_json(answer, search));
  if (!options.csv.empty()) write_file(options.csv, to_csv(answer, search));
  print(to_terminal(answer, search, {.colour = wants_colour()}));
  if (answer.result.best.empty()) return kNothingFits;
  write_best(answer.result.best.front().candidate);
  return 0;
}

int search_layouts(const Options& options) {
  const bool question = options.question.days || options.question.gpu_hours;
  if (options.json == "-" && options.csv == "-") {
    reject("--json and --csv cannot both go to standard output");
  }
  if (question && !options.csv.empty()) {
    reject("--csv lists the candidates of a search, not of --days or --gpu-hours");
  }
  if (question != (options.question.tokens > 0)) {
    reject("--tokens goes with --days (the smallest cluster) or --gpu-hours (the fastest layout)");
  }
  const auto launched = launched_by();
  const auto silence = std::chrono::milliseconds(static_cast<int>(1000 * options.silence_s));
  const auto peers = launched ? open_mpi_peers(*launched, silence) : nullptr;
  SessionOptions how{.program = "orrery " ORRERY_VERSION,
                     .command = options.command,
                     .store = options.store,
                     .fresh = options.fresh,
                     .threads = options.threads,
                     .peers = peers.get()};
  const auto read = [&] {
    return read_search(options.files[0], options.space, options.search, overrides(options));
  };
  if (peers != nullptr && peers->rank() > 0) {
    serve_search(*peers, read, how);
    return 0;
  }
  const SearchInput input = read();
  const bool terminal = isatty(STDERR_FILENO) != 0;
  print_notes(options, input.scenario);
  if (!options.quiet) {
    how.note = [](const std::string& text) { fmt::print(stderr, "note: {}\n", text); };
    if (terminal) how.progress = show_search;
  }
  stop_on_signals(fmt::format(
      "{}orrery: stopped; {}\n", terminal ? "\r\x1b[K" : "",
      options.store.empty()
          ? "nothing is kept without --store"
          : fmt::format("{} keeps what was evaluated, and the same command goes on with it",
                        options.store)));
  how.stopped = [] { return stop_signal != 0; };
  SearchSession session(input, how);
  try {
    return answer_search(options, session);
  } catch (const SearchStopped&) {
    return 128 + stop_signal;
  }
}

int calibrate_cluster(const Options& options) {
  Problems problems;
  std::vector<NcclTable> tables;
  for (const std::string& file : options.nccl) {
    for (NcclTable& table : read_nccl(file, problems)) tables.push_back(std::move(table));
  }
  const std::string input = read_text(options.cluster, problems).value_or("");
  Cluster cluster;
  if (!input.empty()) {
    cluster = read_cluster(read_document_text(input, options.cluster, problems), problems);
  }
  problems.throw_if_any();
  const NcclFit fit = fit_nccl(cluster, tables, options.fit, problems);
  problems.throw_if_any();
  for (const std::string& note : fit.notes) fmt::print(stderr, "note: {}\n", note);
  if (!options.out.empty()) {
    const std::string folder = std::filesystem::path(options.out).parent_path().string();
    write_file(options.out, calibrated_yaml(fit, input, folder));
  }
  if (options.out != "-") write_file("-", fit_report(fit));
  return 0;
}

struct OpenedDevice {
  std::unique_ptr<kernels::Device> device;
  bool gpu = false;
};

/// The device to calibrate. Throws where the one that was asked for is not there.
OpenedDevice open_device(const Options& options) {
  if (options.device != "cpu") {
    auto opened = kernels::open_cuda_device();
    if (auto* device = std::get_if<std::unique_ptr<kernels::Device>>(&opened)) {
      return {std::move(*device), true};
    }
    const std::string& why = std::get<std::string>(opened);
    if (options.device == "cuda") {
      throw std::runtime_error(fmt::format("there is no GPU to calibrate: {}", why));
    }
    if (!options.quiet) fmt::print(stderr, "note: no GPU ({}): the CPU is calibrated\n", why);
  }
  return {kernels::open_cpu_device(options.threads), false};
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  char text[16];
  std::strftime(text, sizeof text, "%Y-%m-%d", &utc);
  return text;
}

/// A line that is written over, on a terminal only.
void show_progress(const CalibrationProgress& p, double time_limit_s) {
  if (isatty(STDERR_FILENO) == 0) return;
  const std::string time =
      p.measurement == nullptr
          ? "left out"
          : fmt::format("{} +- {:.1f} %", format_seconds(p.measurement->seconds),
                        100 * p.measurement->error);
  std::string line = fmt::format("{}/{} {:.0f} of {:.0f} s: {} {}", p.done, p.of, p.elapsed_s,
                                 time_limit_s, p.what, time);
  line.resize(std::min<std::size_t>(line.size(), 110));
  fmt::print(stderr, "\r{:<110}{}", line, p.done == p.of ? "\r\x1b[K" : "");
  std::fflush(stderr);
}

std::vector<Scenario> read_scenarios(const std::vector<std::string>& files,
                                     const Overrides& overrides) {
  std::vector<Scenario> scenarios;
  std::vector<Problem> problems;
  for (const std::string& file : files) {
    try {
      scenarios.push_back(read_scenario(file, overrides));
    } catch (const InputError& error) {
      problems.insert(problems.end(), error.problems().begin(), error.problems().end());
    }
  }
  if (!problems.empty()) throw InputError(std::move(problems));
  return scenarios;
}

std::string calibration_report(const Calibration& c) {
  std::string text = fmt::format("{}: {} shapes, {:.1f} % of the time of the steps' compute ops\n",
                                 c.measured.profile.device.name, c.shapes, 100 * c.share);
  text += fmt::format("{:<44} {:>6} {:>8} {:>8}  {}\n", "table", "points", "median", "90 %",
                      "error of points held out");
  for (const HeldOutError& e : c.measured.errors) {
    if (e.points == 0) {
      text += fmt::format("{:<44} {:>6}\n", e.family, "too few");
    } else {
      text += fmt::format("{:<44} {:>6} {:>6.1f} % {:>6.1f} %\n", e.family, e.points,
                          100 * e.median, 100 * e.percentile_90);
    }
  }
  return text;
}

/// Measures what the scenarios need and writes it to options.out.
Calibration calibrate_scenarios(const Options& options, const std::vector<Scenario>& scenarios) {
  const std::filesystem::path folder = std::filesystem::path(options.out).parent_path();
  if (!folder.empty() && !std::filesystem::is_directory(folder)) {
    reject(fmt::format("--out: there is no folder {}", folder.string()));
  }
  const auto [device, gpu] = open_device(options);
  const double host_bytes =
      static_cast<double>(sysconf(_SC_PHYS_PAGES)) * static_cast<double>(sysconf(_SC_PAGESIZE));
  CalibrationOptions how;
  how.name = std::filesystem::path(options.out).stem().string();
  how.journal = options.out + ".journal";
  how.resume = options.resume;
  how.time_limit_s = options.time_limit_s;
  how.memory_bytes = host_bytes;
  how.scratch_bytes = host_bytes / 2;
  if (gpu) {
    // All that the GPU gives; its cache has 50 MB.
    how.memory_bytes = 0;
    how.scratch_bytes = 1e12;
    how.least_rotation_bytes = std::int64_t{256} << 20;
    how.most_rotation_bytes = std::int64_t{1} << 30;
    how.flush = true;
  }
  how.provenance = fmt::format("{}, orrery {}, {}", options.command, ORRERY_VERSION, today());
  Calibration c = calibrate(scenarios, *device, how, [&](const CalibrationProgress& progress) {
    if (!options.quiet) show_progress(progress, options.time_limit_s);
  });
  write_file(options.out, c.yaml);
  if (!options.quiet) {
    for (const std::string& note : c.notes) fmt::print(stderr, "note: {}\n", note);
  }
  return c;
}

int calibrate_device(const Options& options) {
  const std::vector<Scenario> scenarios = read_scenarios(options.files, overrides(options));
  for (const Scenario& scenario : scenarios) print_notes(options, scenario);
  const Calibration c = calibrate_scenarios(options, scenarios);
  if (!options.quiet) write_file("-", calibration_report(c));
  return 0;
}

/// One of the ranks whose messages are measured; the first one writes the cluster.
void calibrate_rank(const Options& options, Transport& transport,
                    const std::shared_ptr<const kernels::Nccl>& nccl, const std::string& kind) {
  NetworkMeasureOptions how;
  how.limit_s = std::min(how.limit_s, options.time_limit_s);
  const bool show = !options.quiet && isatty(STDERR_FILENO) != 0;
  if (show) {
    how.progress = [](const NetworkPoint& point) {
      fmt::print(stderr, "{} on {}, {} bytes: {:.2f} us\n", name_of(point.op), point.members,
                 point.bytes, 1e6 * point.seconds.median);
    };
  }
  LocalClusterInputs inputs =
      nccl != nullptr ? measure_gpus(transport, nccl, how) : measure_ranks(transport, how);
  if (transport.rank() == 0) {
    inputs.name = fmt::format("{} ranks on {}", transport.ranks(), inputs.machine);
    inputs.profile = options.profile;
    inputs.provenance =
        fmt::format("{}, {} ranks as {}; {}, orrery {}, {}", inputs.machine, transport.ranks(), kind,
                    options.command, ORRERY_VERSION, today());
    Problems problems;
    const LocalCluster local = fit_local_cluster(inputs, problems);
    problems.throw_if_any();
    const std::string folder = std::filesystem::path(options.out).parent_path().string();
    write_file(options.out, to_yaml(local.fit.cluster, folder));
    if (options.out != "-" && !options.quiet) write_file("-", local_cluster_report(local));
  }
  transport.barrier("end of measuring");
}

/// How this machine's ranks talk: those that mpirun started, or threads of this process.
int calibrate_ranks(const Options& options) {
  if (options.out.empty() || options.profile.empty()) {
    reject("--ranks writes a cluster: it needs --out, and --profile for the cluster's device");
  }
  if (!std::filesystem::exists(options.profile)) {
    reject("--profile: there is no file " + options.profile);
  }
  std::shared_ptr<const kernels::Nccl> nccl;
  if (options.device == "cuda") {
    auto loaded = kernels::Nccl::load();
    if (const auto* why = std::get_if<std::string>(&loaded)) throw std::runtime_error(*why);
    nccl = std::get<0>(loaded);
  }
  constexpr auto kTimeout = std::chrono::minutes(2);
  if (const auto transport = open_mpi_transport(kTimeout)) {
    if (transport->ranks() != options.ranks) {
      reject(fmt::format("--ranks {}, but there are {}", options.ranks, transport->ranks()));
    }
    try {
      calibrate_rank(options, *transport, nccl, "MPI processes");
    } catch (const std::exception& error) {
      transport->abort(error.what());
      throw;
    }
  } else {
    run_in_process(options.ranks, kTimeout, [&](Transport& each) {
      calibrate_rank(options, each, nccl, "threads of a process");
    });
  }
  return 0;
}

/// The closed loop: measures the kernels of other scenarios, predicts this one's step from them,
/// executes it, and joins the two op by op.
int validate_execution(Options& options) {
  if (options.files.size() != 1) reject("--execute needs one scenario to validate");
  Scenario scenario = read_scenario(options.files[0], overrides(options));
  print_notes(options, scenario);
  options.device = *options.execute == DeviceKind::cuda ? "cuda" : "cpu";
  options.threads = options.training.threads;
  double calibrated_reference_s = 0;
  if (!options.calibration.empty()) {
    if (options.out.empty()) {
      options.out =
          (std::filesystem::temp_directory_path() / fmt::format("orrery-{}.yaml", getpid()))
              .string();
    }
    const Calibration c = calibrate_scenarios(options, read_scenarios(options.calibration, {}));
    if (!options.quiet && options.json != "-") write_file("-", calibration_report(c) + "\n");
    calibrated_reference_s = c.reference_s;
  }
  if (!options.out.empty()) {
    Problems problems;
    scenario.profile = read_profile(read_document(options.out, problems), problems);
    problems.throw_if_any();
    scenario.profile.file = options.out;
  }
  options.training.device = *options.execute;
  const auto reference_s = [&] {
    return calibrated_reference_s > 0 ? reference_seconds(*open_device(options).device) : 0;
  };
  const double before_s = reference_s();
  const TrainingRun run = train(scenario, options.training);
  if (!run.first_rank) return 0;
  const double executed_reference_s = (before_s + reference_s()) / 2;
  // Alone on a machine, ranks are threads or processes that share it: the formula knows them.
  ProgramRun predicted = run_program(scenario, run.program, Network::formula);
  Joined joined =
      join_timelines(scenario, run.program, predicted.prices, predicted.timeline, run.timeline);
  if (executed_reference_s > 0) {
    joined.relative_speed = calibrated_reference_s / executed_reference_s;
  }
  if (!options.json.empty()) write_file(options.json, to_json(joined));
  if (options.json != "-") {
    write_file("-", fmt::format("{}, executed on {}\n\n", scenario.name, run.device) +
                        to_terminal(joined));
  }
  return 0;
}

/// The verb has two uses: the links of a cluster from nccl-tests, or a device by measuring it.
int calibrate_something(const Options& options) {
  if (options.ranks > 0) {
    if (!options.nccl.empty() || !options.files.empty() || !options.cluster.empty()) {
      reject("--ranks measures how ranks talk: without scenarios, --nccl and --cluster");
    }
    return calibrate_ranks(options);
  }
  const bool nccl = !options.nccl.empty();
  const bool device = !options.files.empty();
  if (nccl == device) {
    reject(nccl ? "calibrate fits a cluster (--nccl) or measures what scenarios need, not both"
                : "calibrate needs scenarios to measure what their steps need, or --nccl",
           "see orrery calibrate --help");
  }
  if (nccl) {
    if (options.cluster.empty()) reject("--nccl needs --cluster, the cluster to start from");
    if (!options.device.empty() || options.threads > 0 || options.resume) {
      reject("--device, --threads and --resume are for measuring scenarios, not for --nccl");
    }
    return calibrate_cluster(options);
  }
  if (!options.cluster.empty()) reject("--cluster goes with --nccl");
  if (options.out.empty() || options.out == "-") {
    reject("--out needs the file to write the profile to",
           "beside it lies the journal that --resume goes on with");
  }
  return calibrate_device(options);
}

int main_of(int argc, char** argv) {
  CLI::App app("Orrery: a clockwork model of a training cluster", "orrery");
  app.set_version_flag("--version", "orrery " ORRERY_VERSION);
  app.require_subcommand(1);
  Options options;
  options.command = "orrery";
  for (int i = 1; i < argc; ++i) options.command += fmt::format(" {}", argv[i]);

  const auto scenario = [&](CLI::App* verb) {
    verb->add_option("scenario", options.files, "scenario file")->required()->expected(1);
  };
  const auto set = [&](CLI::App* verb, const char* text) {
    verb->add_option("--set", options.set, text)
        ->option_text("PATH=VALUE")
        ->allow_extra_args(false);
  };
  constexpr const char* kSet =
      "what if: plan.layout.pp=8, cluster.nic.bandwidth=*2, plan.routing= (may be given again; "
      "sim/overrides.hpp)";
  const auto json = [&](CLI::App* verb) {
    verb->add_option("--json", options.json, "write JSON to this file, - for standard output");
  };
  const auto quiet = [&](CLI::App* verb) {
    verb->add_flag("--quiet", options.quiet,
                   "no notes and warnings; no summary where a file is written");
  };
  const auto all_ranks = [&](CLI::App* verb) {
    verb->add_flag("--all-ranks", options.all_ranks,
                   "simulate every rank, not one for each pipeline position");
  };

  const auto network = [&](CLI::App* verb) {
    verb->add_option_function<std::string>(
            "--network",
            [&](const std::string& word) {
              options.fidelity = word == "flows" ? Network::flows : Network::formula;
            },
            "transfers as flows that share links, or each alone by formula (default: flows where "
            "the cluster has a fabric)")
        ->check(CLI::IsMember({"formula", "flows"}));
  };

  const auto execution = [&](CLI::App* verb, const char* text) {
    verb->add_option_function<std::string>(
            "--execute",
            [&](const std::string& word) {
              options.execute = word == "cuda" ? DeviceKind::cuda : DeviceKind::cpu;
            },
            text)
        ->check(CLI::IsMember({"cpu", "cuda"}));
    verb->add_option("--steps", options.training.steps, "steps to train (5)")
        ->needs("--execute")
        ->check(CLI::Range(1, 1'000'000));
    verb->add_option("--threads", options.training.threads,
                     "of each rank on a CPU (default: this machine's, shared out)")
        ->needs("--execute")
        ->check(CLI::Range(1, 4096));
    verb->add_option("--alone", options.training.alone,
                     "only this rank, what it would get from others made up on its own device")
        ->needs("--execute");
    verb->add_option("--timeout", options.training.timeout_s,
                     "seconds for which a rank waits for another (120)")
        ->needs("--execute")
        ->check(CLI::Range(0.1, 1e6));
  };

  CLI::App* run_verb = app.add_subcommand("run", "simulate one step of a scenario");
  scenario(run_verb);
  set(run_verb, kSet);
  json(run_verb);
  quiet(run_verb);
  all_ranks(run_verb);
  network(run_verb);
  run_verb->add_option("--trace", options.trace, "write a Chrome/Perfetto trace (.gz: compressed)");
  run_verb
      ->add_option("--trace-ranks", options.trace_ranks,
                   "simulated ranks to trace, as 0,5 (default: one for each pipeline position)")
      ->delimiter(',')
      ->needs("--trace");
  run_verb
      ->add_option_function<std::string>(
          "--engine",
          [&](const std::string& word) {
            options.engine = word == "events" ? Engine::events : Engine::sweep;
          },
          "how to simulate without flows (default: sweep)")
      ->check(CLI::IsMember({"sweep", "events"}));
  run_verb->add_flag("--timing", options.timing, "also say how long the simulation took");
  execution(run_verb, "train for real, on CPU or GPU, instead of simulating");
  const auto draws = [&](CLI::App* verb) {
    verb->add_flag("--uncertainty{200}", options.draws,
                   "how sure the step's time is: draws of the prices' errors (--uncertainty=500)")
        ->check(CLI::Range(10, 1'000'000))
        ->excludes("--execute");
  };
  draws(run_verb);

  run_verb->add_option("--report", options.page, "write the capacity report, one HTML file");

  CLI::App* explain_verb =
      app.add_subcommand("explain", "resolved scenario, counts, memory, layout, Program, prices");
  scenario(explain_verb);
  set(explain_verb, kSet);
  all_ranks(explain_verb);
  network(explain_verb);
  explain_verb->add_flag("--resolved", options.resolved, "only the resolved scenario");

  CLI::App* compare_verb =
      app.add_subcommand("compare", "scenarios side by side, or one against changes of it");
  compare_verb
      ->add_option("scenarios", options.files,
                   "two or more scenarios, or one with what-ifs; or a measured profile and others "
                   "that price what it measured")
      ->expected(0, 16);
  compare_verb
      ->add_option("--what-if", options.what_if,
                   "a variant of the scenario: \"BF16: plan.precision=bf16, plan.recompute=full\" "
                   "(may be given again)")
      ->option_text("NAME: PATH=VALUE, ...")
      ->allow_extra_args(false);
  compare_verb->add_option("--what-ifs", options.what_ifs,
                           "a file of variants, and the scenario if none is given");
  set(compare_verb, kSet);
  network(compare_verb);
  json(compare_verb);
  quiet(compare_verb);

  CLI::App* generate_verb = app.add_subcommand(
      "generate", "prefill, decode and rollouts of a serving plan (a scenario's generation section)");
  scenario(generate_verb);
  json(generate_verb);
  quiet(generate_verb);

  CLI::App* validate_verb = app.add_subcommand("validate", "predicted against published");
  validate_verb->add_option("runs", options.files, "files (default: scenarios/runs/*.yaml)");
  set(validate_verb, "what if, in every scenario that the runs name: plan.recompute=none");
  json(validate_verb);
  validate_verb->add_flag("--fail-above", options.fail_above, "exit 3 if an aim is missed");
  quiet(validate_verb);
  execution(validate_verb, "execute a scenario's step, on CPU or GPU, and compare the prediction");
  draws(validate_verb);
  validate_verb
      ->add_option("--calibrate", options.calibration,
                   "scenarios whose kernels are measured first, for the prediction")
      ->needs("--execute");
  validate_verb
      ->add_option("--profile", options.out,
                   "profile to predict with; with --calibrate, where it is written")
      ->needs("--execute");

  CLI::App* search_verb =
      app.add_subcommand("search", "the best layouts of a scenario's model on its cluster");
  scenario(search_verb);
  search_verb->add_option(
      "--space", options.space,
      "file with what may be chosen (default: the scenario's `search:` section)");
  search_verb->add_option(
      "--store", options.store,
      "SQLite file that keeps all evaluations; a search that was stopped goes on");
  search_verb->add_flag("--fresh", options.fresh, "give up what the store has")->needs("--store");
  search_verb->add_option("--top", options.search.best, "layouts to rank (10)")
      ->check(CLI::Range(1, 1000));
  search_verb->add_option("--full", options.search.full, "full simulations at most (1000)")
      ->check(CLI::Range(1, 1'000'000));
  search_verb
      ->add_option("--memory-share", options.search.memory_share,
                   "of the device's memory that a layout may need (1)")
      ->check(CLI::Range(0.01, 1.0));
  const auto count = [&](const char* name, auto assign, const char* text) {
    return search_verb
        ->add_option_function<std::string>(
            name, [assign](const std::string& word) { assign(*parse_count(word)); }, text)
        ->check([](const std::string& word) {
          const auto value = parse_count(word);
          return value && *value > 0
                     ? ""
                     : fmt::format("'{}' is no number such as 60, 2.8M or 14.8T", word);
        });
  };
  count(
      "--tokens", [&](double n) { options.question.tokens = n; }, "to train, as 14.8T");
  CLI::Option* days = count(
      "--days", [&](double n) { options.question.days = n; },
      "with --tokens: the smallest cluster that takes no longer");
  count(
      "--gpu-hours", [&](double n) { options.question.gpu_hours = n; },
      "with --tokens: the fastest layout that takes no more, as 2.8M")
      ->excludes(days);
  search_verb->add_option("--threads", options.threads, "of each process (default: this machine's)")
      ->check(CLI::Range(1, 4096));
  search_verb
      ->add_option("--timeout", options.silence_s,
                   "under mpirun: seconds of silence after which a rank is lost (30)")
      ->check(CLI::Range(0.1, 1e6));
  search_verb->add_option("--csv", options.csv,
                          "write all candidates as CSV to this file, - for standard output");
  search_verb->add_option("--write-best", options.write_best,
                          "write the best layout as a scenario to this file");
  search_verb
      ->add_option_function<std::string>(
          "--network",
          [&](const std::string& word) {
            options.search.network = word == "flows" ? Network::flows : Network::formula;
          },
          "of full simulations (default: flows where the cluster has a fabric)")
      ->check(CLI::IsMember({"formula", "flows"}));
  set(search_verb, kSet);
  json(search_verb);
  quiet(search_verb);

  CLI::App* budget_verb = app.add_subcommand(
      "budget", "GPU-hours, days, energy and money of a whole training programme");
  budget_verb->add_option("recipe", options.files, "recipe file")->required()->expected(1);
  json(budget_verb);
  budget_verb->add_option("--csv", options.csv,
                          "write stages as CSV to this file, - for standard output");
  budget_verb->add_flag("--uncertainty", options.budget.uncertainty,
                        "carry the prices' errors through a step of each stage");
  budget_verb->add_flag("--fail-above", options.fail_above, "exit 3 if an aim is missed");
  quiet(budget_verb);

  CLI::App* reliability_verb =
      app.add_subcommand("reliability", "goodput and calendar time of a run, with failures");
  reliability_verb->add_option("scenario", options.files, "scenario file")->expected(0, 1);
  reliability_verb->add_option("--with", options.goodput.reliability,
                               "file of what fails (default: the scenario's reliability)");
  const auto amount = [&](const char* name, double& value, Dimension dimension, const char* text) {
    return reliability_verb
        ->add_option_function<std::string>(
            name,
            [&value, dimension](const std::string& word) {
              value = *parse_quantity(word, dimension);
            },
            text)
        ->check([dimension](const std::string& word) {
          std::string why;
          const auto read = parse_quantity(word, dimension, &why);
          if (!read) return "'" + word + "' is no amount" + (why.empty() ? "" : ": " + why);
          return std::string(*read > 0 ? "" : "must be above zero");
        });
  };
  CLI::Option* tokens = amount("--tokens", options.goodput.tokens, Dimension::scalar,
                               "to train on, as 14.8e12: at the simulated step's rate");
  amount("--time", options.goodput.useful_s, Dimension::seconds,
         "of useful training instead, as \"54 days\"")
      ->excludes(tokens);
  reliability_verb->add_option("--trials", options.goodput.options.trials, "to simulate (1000)")
      ->check(CLI::Range(10, 1'000'000));
  reliability_verb->add_flag("--published{scenarios/reliability/published.yaml}", options.published,
                             "instead: what other clusters' failures predict for published runs");
  json(reliability_verb);
  set(reliability_verb, kSet);

  CLI::App* report_verb =
      app.add_subcommand("report", "what a capacity-planning review needs, in one file");
  report_verb->add_option("scenarios", options.files, "scenario files")->required()->expected(1, 16);
  report_verb->add_option("-o,--out", options.out, "write to this file, - for standard output")
      ->required();
  report_verb->add_option("--format", options.format, "html (default), markdown or csv")
      ->check(CLI::IsMember({"html", "markdown", "csv"}));
  CapacityQuestion& capacity = options.capacity;
  report_verb->add_option("--target", capacity.targets,
                          "what must be reached, as \"tokens/day >= 250G\"; may be repeated")
      ->expected(1)
      ->take_all();
  const auto decimal = [&](const char* name, double& value, const char* text) {
    report_verb
        ->add_option_function<std::string>(
            name, [&value](const std::string& word) { value = *parse_tokens(word); }, text)
        ->check([](const std::string& word) {
          return parse_tokens(word) ? "" : "'" + word + "' is no number such as 14.8T";
        });
  };
  decimal("--tokens", capacity.tokens, "of the whole run, as 14.8T");
  decimal("--usd-per-gpu-hour", capacity.usd_per_gpu_hour, "what a GPU-hour costs");
  report_verb->add_option("--measured", capacity.measured,
                          "trace of the first scenario's step as it ran (run --execute --trace)");
  report_verb->add_option("--search", capacity.search, "JSON of orrery search");
  report_verb->add_option("--budget", capacity.budget, "JSON of orrery budget");
  report_verb->add_option("--reliability", capacity.reliability, "JSON of orrery reliability");
  report_verb->add_option("--validation", capacity.validation, "JSON of orrery validate");
  report_verb
      ->add_flag("--uncertainty{200}", capacity.draws,
                 "how sure the steps' times are: draws of the prices' errors (--uncertainty=500)")
      ->check(CLI::Range(10, 1'000'000));
  network(report_verb);
  set(report_verb, kSet);
  quiet(report_verb);

  CLI::App* network_verb =
      app.add_subcommand("network", "a cluster's links, or a collective on it");
  network_verb->add_option("cluster", options.files, "cluster file, or scenario file")
      ->required()
      ->expected(1);
  set(network_verb, "what if, a path in the file: nic.bandwidth=*2");
  json(network_verb);
  network_verb
      ->add_option("--collective", options.collective, "print its times in nccl-tests' columns")
      ->check(CLI::IsMember({"all_reduce", "all_gather", "reduce_scatter", "alltoall", "broadcast",
                             "sendrecv", "dispatch", "combine"}));
  const auto about_table = [&](const char* name, auto& value, const char* text) {
    return network_verb->add_option(name, value, text)->needs("--collective");
  };
  const auto size = [&](const char* name, std::optional<std::int64_t>& value, const char* text) {
    network_verb
        ->add_option_function<std::string>(
            name, [&value](const std::string& word) { value = parse_nccl_size(word); }, text)
        ->needs("--collective")
        ->check([](const std::string& word) {
          return parse_nccl_size(word) ? "" : "'" + word + "' is no size such as 8, 64K or 16G";
        });
  };
  network(network_verb);
  about_table("--ranks", options.network.ranks, "GPUs that take part (default: a node)")
      ->check(CLI::Range(2, 1'000'000));
  about_table("--ranks-per-node", options.network.ranks_per_node, "default: as many as fit")
      ->check(CLI::Range(1, 1024));
  size("--min", options.network.min, "bytes (8), or tokens a GPU (128)");
  size("--max", options.network.max, "bytes (16G), or tokens a GPU (16384)");
  about_table("--factor", options.network.factor, "from one size to the next (2)")
      ->check(CLI::Range(2, 1 << 20));
  const auto about_exchange = [&](const char* name, auto& value, int most, const char* text) {
    about_table(name, value, text)->check(CLI::Range(1, most));
  };
  about_exchange("--hidden", options.exchange.hidden, 1 << 20,
                 "of dispatch and combine (the scenario's, else DeepSeek-V3's 7168)");
  about_exchange("--top-k", options.exchange.top_k, 1024, "experts a token goes to (8)");
  about_exchange("--experts", options.exchange.experts, 1 << 16, "routed experts (256)");
  about_table("--node-limit", options.exchange.node_limit, "nodes a token goes to, 0: any (4)")
      ->check(CLI::Range(0, 1024));
  about_exchange("--sms", options.exchange.sms, 1024, "SMs of the kernel (the plan's, else 20)");
  network_verb
      ->add_option_function<std::string>(
          "--format",
          [&](const std::string& word) {
            for (const NumberFormat f :
                 {NumberFormat::bf16, NumberFormat::fp8_tensor, NumberFormat::fp8_block}) {
              if (word == name_of(f)) options.exchange.format = f;
            }
          },
          "of a token (fp8_block out, bf16 back)")
      ->needs("--collective")
      ->check(CLI::IsMember({"bf16", "fp8_tensor", "fp8_block"}));

  CLI::App* calibrate_verb = app.add_subcommand("calibrate",
                                                "measure this machine's kernels, or how its ranks "
                                                "talk, or fit a cluster's link rates to output of "
                                                "nccl-tests");
  calibrate_verb
      ->add_option("scenarios", options.files, "scenario files: what their steps need is measured")
      ->expected(0, 64);
  set(calibrate_verb, "what if, in every scenario: plan.sequence_length=8192");
  calibrate_verb->add_option("-o,--out", options.out,
                             "write the profile, or cluster, to this file");
  calibrate_verb->add_option("--device", options.device, "default: the GPU if there is one")
      ->check(CLI::IsMember({"cpu", "cuda"}));
  calibrate_verb->add_option("--threads", options.threads, "of the CPU (default: all)")
      ->check(CLI::Range(1, 1024));
  calibrate_verb
      ->add_option_function<std::string>(
          "--time-limit",
          [&](const std::string& word) {
            options.time_limit_s = *parse_quantity(word, Dimension::seconds);
          },
          "stop measuring after this long (8 min); the costliest shapes come first")
      ->check([](const std::string& word) {
        std::string why;
        const auto seconds = parse_quantity(word, Dimension::seconds, &why);
        if (!seconds) return "'" + word + "': " + (why.empty() ? "no time such as 8min" : why);
        return std::string(*seconds > 0 ? "" : "must be above zero");
      });
  calibrate_verb->add_flag("--resume", options.resume,
                           "go on where a run that was stopped or killed was");
  quiet(calibrate_verb);
  calibrate_verb->add_option("--nccl", options.nccl, "what nccl-tests printed, or wrote as JSON")
      ->expected(1, 1024);
  calibrate_verb->add_option("--cluster", options.cluster, "cluster file to start from");
  calibrate_verb
      ->add_option("--ranks", options.ranks,
                   "measure how so many ranks on this machine talk (as `run --execute` runs them; "
                   "under mpirun, those; GPUs with --device cuda), and write a cluster to --out")
      ->check(CLI::Range(2, 64));
  calibrate_verb->add_option("--profile", options.profile, "the cluster's device, with --ranks")
      ->needs("--ranks");
  calibrate_verb
      ->add_option("--keep", options.fit.keep, "quantities to leave alone, as nvlink.bandwidth,...")
      ->delimiter(',');
  calibrate_verb
      ->add_option("--ranks-per-node", options.fit.ranks_per_node,
                   "of tables that do not list their devices (default: as many as fit)")
      ->check(CLI::Range(1, 1024));

  std::vector<std::string> verbs;
  for (const CLI::App* verb : app.get_subcommands({})) verbs.push_back(verb->get_name());
  if (argc > 1 && argv[1][0] != '-' &&
      std::find(verbs.begin(), verbs.end(), argv[1]) == verbs.end()) {
    const auto near = nearest(argv[1], verbs);
    reject(fmt::format("unknown verb '{}'", argv[1]),
           near ? fmt::format("did you mean '{}'?", *near) : "see orrery --help");
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : kWrongInput;
  }
  if (*run_verb) return run(options);
  if (*explain_verb) return explain_scenario(options);
  if (*compare_verb) return compare_scenarios(options);
  if (*search_verb) return search_layouts(options);
  if (*budget_verb) return budget_recipe(options);
  if (*generate_verb) return generate(options);
  if (*reliability_verb) return ask_about_goodput(options);
  if (*report_verb) return report_capacity(options);
  if (*network_verb) return ask_about_network(options);
  if (*calibrate_verb) return calibrate_something(options);
  return validate_runs(options);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return main_of(argc, argv);
  } catch (const InputError& error) {
    fmt::print(stderr, "{}", format_problems(error.problems()));
    return kWrongInput;
  } catch (const std::exception& error) {
    fmt::print(stderr, "orrery: error: {}\n", error.what());
    return 1;
  }
}
