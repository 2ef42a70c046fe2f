// The program as its users see it: exit status, what goes to which stream, what files are left.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

const std::string kV3 = ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_2048_h800.yaml";
const std::string kNode = ORRERY_SOURCE_DIR "/scenarios/clusters/h100_node.yaml";
const std::string kTable =
    ORRERY_SOURCE_DIR "/tests/calibrate/nccl/h100_node_all_reduce_published.txt";
const std::string kGeneration = ORRERY_SOURCE_DIR "/scenarios/generation/deepseek_v3_decode.yaml";
const std::string kRuns = ORRERY_SOURCE_DIR "/scenarios/runs/deepseek_v3.yaml";

struct Result {
  int status = 0;  ///< exit status, or -signal
  std::string out;
  std::string err;
};

class Cli : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "orrery_cli_" + std::to_string(getpid());
    fs::create_directories(folder_ + "/here");
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::string path(const std::string& name) const { return folder_ + "/here/" + name; }
  std::size_t files() const {
    return static_cast<std::size_t>(std::distance(fs::directory_iterator(folder_ + "/here"), {}));
  }

  /// `out`: an open descriptor to use as standard output instead.
  Result orrery(std::vector<std::string> args, int out = -1) const {
    args.insert(args.begin(), ORRERY_BINARY);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    std::string path_set = "PATH=/usr/bin";
    char* environment[] = {path_set.data(), nullptr};
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const auto to_file = [&](int descriptor, const std::string& name) {
      posix_spawn_file_actions_addopen(&actions, descriptor, (folder_ + "/" + name).c_str(),
                                       O_WRONLY | O_CREAT | O_TRUNC, 0644);
    };
    if (out < 0) {
      to_file(STDOUT_FILENO, "out");
    } else {
      posix_spawn_file_actions_adddup2(&actions, out, STDOUT_FILENO);
    }
    to_file(STDERR_FILENO, "err");
    pid_t child = 0;
    EXPECT_EQ(posix_spawn(&child, ORRERY_BINARY, &actions, nullptr, argv.data(), environment), 0);
    posix_spawn_file_actions_destroy(&actions);
    int status = 0;
    waitpid(child, &status, 0);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status), slurp(folder_ + "/out"),
            slurp(folder_ + "/err")};
  }

  static std::string slurp(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path).rdbuf();
    return text.str();
  }

  std::string folder_;
};

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_F(Cli, RunWritesASummaryToStandardOutput) {
  const Result r = orrery({"run", kV3});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "DeepSeek-V3 on 2048 H800")) << r.out;
  EXPECT_FALSE(contains(r.out, "\x1b")) << "colour outside of a terminal";
}

TEST_F(Cli, JsonOnStandardOutputIsAllThereIsOnIt) {
  const Result r = orrery({"run", kV3, "--json", "-"});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_GT(json::parse(r.out).at("step_time_s").get<double>(), 0);
  EXPECT_FALSE(contains(r.out, "wall_s"));
  EXPECT_EQ(orrery({"run", kV3, "--json", "-"}).out, r.out);
  EXPECT_TRUE(json::parse(orrery({"run", kV3, "--json", "-", "--timing"}).out)
                  .at("engine")
                  .at("wall_s")
                  .is_number());
}

TEST_F(Cli, QuietSaysNothingWhereAFileIsWritten) {
  const Result r = orrery({"run", kV3, "--json", path("r.json"), "--quiet"});
  EXPECT_EQ(r.status, 0);
  EXPECT_EQ(r.out + r.err, "");
  EXPECT_TRUE(json::parse(slurp(path("r.json"))).is_object());
  EXPECT_EQ(files(), 1u);
}

TEST_F(Cli, BothEnginesGiveTheSameFingerprint) {
  const auto run = [&](const std::string& engine) {
    return json::parse(
        orrery({"run", kV3, "--json", "-", "--network", "formula", "--engine", engine}).out);
  };
  const json sweep = run("sweep");
  EXPECT_EQ(sweep.at("fingerprint"), run("events").at("fingerprint"));
  EXPECT_EQ(sweep.at("network").at("fidelity"), "formula");
}

TEST_F(Cli, SaysWhichNetworkItSimulated) {
  const Result flows = orrery({"run", kV3});
  EXPECT_TRUE(contains(flows.out, "Network, as flows")) << flows.out;
  EXPECT_TRUE(contains(flows.out, "eight planes of a two-layer fat tree")) << flows.out;
  EXPECT_TRUE(contains(orrery({"run", kV3, "--network", "formula"}).out, "Network, by formula"));
  const json j = json::parse(orrery({"run", kV3, "--json", "-"}).out).at("network");
  EXPECT_EQ(j.at("fidelity"), "flows");
  EXPECT_EQ(j.at("tiers").size(), 4u);  // NVLink, PCIe, NIC, leaf-spine
  EXPECT_EQ(orrery({"run", kV3, "--engine", "sweep"}).status, 2);
  EXPECT_EQ(orrery({"run", kV3, "--network", "pigeons"}).status, 2);
}

TEST_F(Cli, TraceOfChosenRanks) {
  const Result r = orrery({"run", kV3, "--trace", path("t.json"), "--trace-ranks", "15,3"});
  EXPECT_EQ(r.status, 0) << r.err;
  std::set<int> ranks;
  const json trace = json::parse(slurp(path("t.json")));
  for (const json& event : trace.at("traceEvents")) ranks.insert(event.at("pid").get<int>());
  EXPECT_EQ(ranks, (std::set<int>{3, 15}));
}

TEST_F(Cli, RanksThatAreNotThereAreWrongInput) {
  const Result r = orrery({"run", kV3, "--trace", path("t.json"), "--trace-ranks", "16"});
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err, "no rank 16; simulated are 0..15")) << r.err;
  EXPECT_EQ(files(), 0u);
}

TEST_F(Cli, MissingFileIsWrongInput) {
  const Result r = orrery({"run", path("no.yaml")});
  EXPECT_EQ(r.status, 2);
  EXPECT_EQ(r.out, "");
  EXPECT_TRUE(contains(r.err, "no.yaml")) << r.err;
}

TEST_F(Cli, BrokenScenarioNamesThePlace) {
  std::ofstream(path("broken.yaml")) << "name: x\nmodle: y\n";
  const Result r = orrery({"run", path("broken.yaml")});
  EXPECT_EQ(r.status, 2);
  EXPECT_EQ(r.out, "");
  EXPECT_TRUE(contains(r.err, "broken.yaml:2:1: error: unknown key 'modle'")) << r.err;
}

TEST_F(Cli, MistypedVerbIsSuggested) {
  const Result r = orrery({"vaildate"});
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err, "did you mean 'validate'?")) << r.err;
  EXPECT_EQ(r.out, "");
}

TEST_F(Cli, UsageErrorsExitWithTwo) {
  const std::vector<std::vector<std::string>> wrong = {
      {},
      {"run"},
      {"run", kV3, "--no-such-option"},
      {"run", kV3, "--engine", "steam"},
      {"run", kV3, "--trace-ranks", "1"},
      {"run", kV3, "--trace", path("t.json"), "--trace-ranks", "-1"},
      {"run", kV3, "--json", "-", "--trace", "-"},
      {"run", kV3, kV3},
      {"compare", kV3},
      {"generate"},
      {"generate", kV3},  // it says nothing of generation
      {"generate", kGeneration, "--trace", path("t.json")},
      {"network"},
      {"network", kNode, "--collective", "gossip"},
      {"network", kNode, "--ranks", "8"},
      {"network", kNode, "--collective", "all_reduce", "--min", "8 bytes"},
      {"network", kNode, "--collective", "all_reduce", "--ranks", "9"},
      {"calibrate", "--nccl", kTable},
      {"calibrate", "--cluster", kNode},
      {"calibrate"},
      {"calibrate", kV3},
      {"calibrate", kV3, "--out", "-"},
      {"calibrate", kV3, "--out", "/nonexistent/profile.yaml"},
      {"calibrate", kV3, "--out", path("p.yaml"), "--nccl", kTable, "--cluster", kNode},
      {"calibrate", kV3, "--out", path("p.yaml"), "--cluster", kNode},
      {"calibrate", kV3, "--out", path("p.yaml"), "--time-limit", "8 bananas"},
      {"calibrate", kV3, "--out", path("p.yaml"), "--time-limit", "0 s"},
      {"calibrate", kV3, "--out", path("p.yaml"), "--device", "tpu"},
      {"calibrate", kNode, "--out", path("p.yaml")},
      {"calibrate", "--nccl", kTable, "--cluster", kNode, "--resume"},
      {"calibrate", "--nccl", kTable, "--cluster", kNode, "--keep", "everything"},
      {"calibrate", "--ranks", "2", "--out", path("c.yaml")},
      {"calibrate", "--ranks", "1", "--out", path("c.yaml"), "--profile", kNode},
      {"calibrate", "--ranks", "2", "--out", path("c.yaml"), "--profile", path("none.yaml")},
      {"calibrate", "--ranks", "2", "--out", path("c.yaml"), "--profile", kNode, kV3}};
  for (const auto& args : wrong) {
    const Result r = orrery(args);
    EXPECT_EQ(r.status, 2) << (args.empty() ? "" : args.back());
    EXPECT_EQ(r.out, "");
    EXPECT_NE(r.err, "");
  }
}

TEST_F(Cli, HelpAndVersionAreResults) {
  EXPECT_EQ(orrery({"--version"}).out, "orrery 0.1.0\n");
  const Result help = orrery({"--help"});
  EXPECT_EQ(help.status, 0);
  for (const char* verb :
       {"run", "explain", "compare", "generate", "validate", "network", "calibrate"}) {
    EXPECT_TRUE(contains(help.out, verb));
    EXPECT_EQ(orrery({verb, "--help"}).status, 0);
  }
}

TEST_F(Cli, FolderAsOutputFails) {
  for (const char* option : {"--json", "--trace"}) {
    const Result r = orrery({"run", kV3, option, folder_ + "/here"});
    EXPECT_EQ(r.status, 1);
    EXPECT_TRUE(contains(r.err, "Is a directory")) << r.err;
    EXPECT_EQ(files(), 0u);
  }
}

TEST_F(Cli, FullDiskFails) {
  const int full = open("/dev/full", O_WRONLY);
  ASSERT_GE(full, 0);
  const Result r = orrery({"run", kV3}, full);
  close(full);
  EXPECT_EQ(r.status, 1);
  EXPECT_TRUE(contains(r.err, "cannot write standard output: No space left")) << r.err;
}

TEST_F(Cli, BrokenPipeEndsSilently) {
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  close(ends[0]);
  const Result r = orrery({"explain", kV3}, ends[1]);
  close(ends[1]);
  EXPECT_EQ(r.status, -SIGPIPE);  // as cat or grep
  EXPECT_EQ(r.err, "");
}

TEST_F(Cli, CompareShowsBoth) {
  const Result r = orrery({"compare", kV3, kV3});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "No operation differs")) << r.out;
  EXPECT_EQ(json::parse(orrery({"compare", kV3, kV3, "--json", "-"}).out).at("reports").size(), 2u);
}

TEST_F(Cli, ExplainPrintsAScenarioThatRuns) {
  const Result r = orrery({"explain", kV3, "--resolved"});
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "pp: 16")) << r.out;
}

TEST_F(Cli, ValidateFailsOnlyWhereAskedTo) {
  std::ofstream(path("run.yaml"))
      << "name: far off\nscenario: " << kV3
      << "\nrows: [{quantity: step_time_s, published: 1000 s, aim: 1 %, source: none}]\n";
  const Result r = orrery({"validate", path("run.yaml")});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "MISSED")) << r.out;
  EXPECT_EQ(orrery({"validate", path("run.yaml"), "--fail-above"}).status, 3);
  const json rows = json::parse(orrery({"validate", kRuns, "--json", "-"}).out);
  EXPECT_EQ(rows.at("runs").size(), 5u);
}

TEST_F(Cli, GeneratePrintsAServingPlan) {
  const Result r = orrery({"generate", kGeneration});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "Decode: 88 sequences a replica with 4989 tokens")) << r.out;
  const Result written = orrery({"generate", kGeneration, "--json", "-"});
  EXPECT_EQ(written.out, orrery({"generate", kGeneration, "--json", "-"}).out);
  EXPECT_EQ(json::parse(written.out).at("decode").at("sequences"), 88);
  std::ofstream(path("run.yaml"))
      << "name: plans\ngeneration: " << kGeneration
      << "\nrows: [{quantity: decode.sequences, published: 88, aim: 1 %, source: itself}]\n";
  EXPECT_EQ(orrery({"validate", path("run.yaml"), "--fail-above"}).status, 0);
  // A training scenario and a serving plan may share a file.
  std::ofstream(path("plan.yaml"))
      << "name: x\ngeneration: {prompt: 10, output: 10, colour: red}\n";
  const Result broken = orrery({"generate", path("plan.yaml")});
  EXPECT_EQ(broken.status, 2);
  EXPECT_TRUE(contains(broken.err, "plan.yaml:2:38: error: unknown key 'colour' in generation"))
      << broken.err;
}

TEST_F(Cli, NetworkPrintsLinksAndTables) {
  EXPECT_TRUE(contains(orrery({"network", kNode}).out, "nvlink    367 GB/s"));
  // On a non-blocking fabric a collective alone takes as flows what the formula says.
  const std::vector<std::string> exchange = {"network", kV3,  "--collective", "dispatch",
                                             "--ranks", "64", "--max",        "512"};
  std::vector<std::string> as_flows = exchange;
  as_flows.insert(as_flows.end(), {"--network", "flows"});
  EXPECT_EQ(orrery(as_flows).status, 0);
  EXPECT_EQ(orrery(as_flows).out, orrery(exchange).out);
  const Result table = orrery({"network", kNode, "--collective", "all_gather", "--ranks", "4",
                               "--min", "1K", "--max", "1G", "--factor", "4"});
  EXPECT_EQ(table.status, 0) << table.err;
  EXPECT_TRUE(contains(table.out, "#       size         count      type   redop    root"));
  EXPECT_TRUE(contains(table.out, "\n  1073741824      67108864     float    none      -1"));
  const json document = json::parse(
      orrery({"network", kV3, "--collective", "dispatch", "--ranks", "64", "--json", "-"}).out);
  EXPECT_EQ(document.at("operation"), "dispatch");
  EXPECT_EQ(document.at("sms"), 20);
}

const std::string kTiny = ORRERY_SOURCE_DIR "/scenarios/tiny_deepseek_cpu.yaml";

TEST_F(Cli, RunTrainsForRealWhereAskedTo) {
  const Result r = orrery({"run", kTiny, "--execute", "cpu", "--threads", "1", "--steps", "6",
                           "--json", "-", "--trace", path("t.json")});
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  EXPECT_TRUE(contains(j.at("executed_on").get<std::string>(), "1 thread"));
  const json& steps = j.at("training");
  ASSERT_EQ(steps.size(), 6u);
  // It starts at the logarithm of the vocabulary, 5.55, and text is easy to do better on.
  EXPECT_NEAR(steps[0].at("loss").get<double>(), 5.6, 0.3);
  EXPECT_LT(steps[5].at("loss").get<double>(), 4.5);
  EXPECT_GT(steps[5].at("seconds").get<double>(), 0);
  EXPECT_FALSE(json::parse(slurp(path("t.json"))).at("traceEvents").empty());
  const Result again =
      orrery({"run", kTiny, "--execute", "cpu", "--threads", "2", "--steps", "6", "--json", "-"});
  for (std::size_t s = 0; s < 6; ++s) {
    EXPECT_EQ(json::parse(again.out).at("training")[s].at("loss"), steps[s].at("loss")) << s;
  }
}

TEST_F(Cli, RunSaysWhatCannotBeExecuted) {
  const Result r =
      orrery({"run", ORRERY_SOURCE_DIR "/scenarios/gpt3_175b_64_a100.yaml", "--execute", "cpu"});
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err, "cannot be executed: its positions are learned")) << r.err;
  EXPECT_TRUE(contains(r.err, "its linear layers have biases")) << r.err;
  const Result large = orrery({"run", kV3, "--execute", "cpu"});
  EXPECT_EQ(large.status, 2);
  EXPECT_TRUE(contains(large.err, "this has 2048 ranks, and one process executes 64 at most"));
  const Result gpu = orrery({"run", kTiny, "--execute", "cuda"});
  EXPECT_EQ(gpu.status, 1);
  EXPECT_TRUE(contains(gpu.err, "no GPU: ")) << gpu.err;
  EXPECT_EQ(orrery({"run", kTiny, "--steps", "3"}).status, 2);
  EXPECT_EQ(orrery({"run", kTiny, "--execute", "cpu", "--alone", "1"}).status, 1);
}

TEST_F(Cli, ValidateExecutesAndCompares) {
  const Result r = orrery(
      {"validate", kTiny, "--execute", "cpu", "--threads", "1", "--steps", "2", "--json", "-"});
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  EXPECT_GT(j.at("measured_step_s").get<double>(), 0);
  EXPECT_GT(j.at("all").at("ops").get<int>(), 1000);
  // A CPU is no H800, which the scenario names: what it would take is far less.
  EXPECT_LT(j.at("predicted_step_s").get<double>(), j.at("measured_step_s").get<double>());
}

TEST_F(Cli, CalibrateReadsWhatNetworkPrints) {
  // Text and JSON of the same made-up measurement lead to the same cluster, which is the one asked.
  std::vector<std::string> ask = {"network", kNode, "--collective", "all_reduce"};
  std::ofstream(path("all_reduce.txt")) << orrery(ask).out;
  ask.insert(ask.end(), {"--json", path("all_reduce.json"), "--min", "8"});
  EXPECT_EQ(orrery(ask).status, 0);
  for (const char* name : {"all_reduce.txt", "all_reduce.json"}) {
    const Result r = orrery(
        {"calibrate", "--nccl", path(name), "--cluster", kNode, "--out", path("fitted.yaml")});
    EXPECT_EQ(r.status, 0) << r.err;
    EXPECT_TRUE(contains(r.out, "inside a node, held out                0.0 %")) << r.out;
    const std::string written = slurp(path("fitted.yaml"));
    EXPECT_EQ(written.find("# One HGX H100 node.\nname: \"one node of 8 H100\"\n"), 0u) << written;
    EXPECT_TRUE(contains(written, name)) << written;
    // The profile is found from where the file is now.
    EXPECT_EQ(orrery({"network", path("fitted.yaml"), "--collective", "dispatch"}).status, 0);
  }
}

TEST_F(Cli, CalibrateMeasuresHowRanksTalk) {
  const Result r =
      orrery({"calibrate", "--ranks", "2", "--time-limit", "0.5", "--profile",
              ORRERY_SOURCE_DIR "/scenarios/profiles/h100.yaml", "--out", path("local.yaml")});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "inside a node, held out")) << r.out;
  // What it wrote is a cluster that prices.
  const Result asked = orrery({"network", path("local.yaml"), "--collective", "all_reduce"});
  EXPECT_EQ(asked.status, 0) << asked.err;
  EXPECT_TRUE(contains(slurp(path("local.yaml")), "measured on this machine"));
}

TEST_F(Cli, CalibrateLeavesNothingBehindWhereInputIsWrong) {
  std::ofstream(path("log.txt")) << "8 2 float sum -1 5.00 0.00\n";
  const Result r = orrery({"calibrate", "--nccl", path("log.txt"), kTable, "--cluster", kNode,
                           "--out", path("fitted.yaml")});
  EXPECT_EQ(r.status, 2);
  EXPECT_EQ(r.out, "");
  EXPECT_TRUE(contains(r.err, "log.txt:1:23: error: a row has 9 columns")) << r.err;
  EXPECT_EQ(files(), 1u);
  const Result full =
      orrery({"calibrate", "--nccl", kTable, "--cluster", kNode, "--out", path(".")});
  EXPECT_EQ(full.status, 1);
  EXPECT_TRUE(contains(full.err, "Is a directory")) << full.err;
  EXPECT_EQ(full.out, "");
}

const char* kToyScenario = R"(name: toy
model:
  name: toy
  source: made up
  hidden: 64
  vocabulary: 256
  layers: 2
  max_positions: 64
  attention: {heads: 2, kv_heads: 1, head_dim: 32}
  feed_forward: {activation: swiglu, intermediate: 128}
cluster: )" ORRERY_SOURCE_DIR R"(/scenarios/clusters/h100_node.yaml
plan:
  layout: {tp: 2}
  schedule: 1f1b
  sequence_length: 64
  global_batch: 4
  precision: fp32
)";

/// What a step asks for is measured, and priced as measured afterwards; a run that is killed goes
/// on.
TEST_F(Cli, CalibrateMeasuresWhatAStepNeeds) {
  std::ofstream(path("toy.yaml")) << kToyScenario;
  // The time is up after some shapes (on any machine: the whole takes many seconds of samples), so
  // there is something left to resume.
  const Result first = orrery({"calibrate", path("toy.yaml"), "--device", "cpu", "--threads", "1",
                               "-o", path("mine.yaml"), "--time-limit", "1 s"});
  ASSERT_EQ(first.status, 0) << first.err;
  EXPECT_TRUE(contains(first.out, "error of points held out"));
  EXPECT_TRUE(contains(first.err, "--resume goes on with them"));
  EXPECT_TRUE(fs::exists(path("mine.yaml.journal")));
  const Result again = orrery({"calibrate", path("toy.yaml"), "--device", "cpu", "--threads", "1",
                               "-o", path("mine.yaml"), "--time-limit", "6 s", "--resume"});
  ASSERT_EQ(again.status, 0) << again.err;
  EXPECT_TRUE(contains(again.out, "100.0 % of the time"));

  std::ofstream(path("measured.yaml")) << kToyScenario << "profile: mine.yaml\n";
  const Result run = orrery({"run", path("measured.yaml"), "--json", "-"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json report = json::parse(run.out);
  int measured = 0;
  for (const json& row : report["prices"]) {
    const std::string shape = row["shape"];
    if (contains(shape, "all_") || contains(shape, "reduce_scatter")) continue;
    EXPECT_EQ(row["source"], "measured") << shape;
    ++measured;
  }
  EXPECT_GT(measured, 20);
}

TEST_F(Cli, CalibrateResumesNothingOfAnotherMachine) {
  std::ofstream(path("toy.yaml")) << kToyScenario;
  std::ofstream(path("mine.yaml.journal")) << "orrery calibration journal 1: a GPU\n";
  const Result r = orrery({"calibrate", path("toy.yaml"), "--device", "cpu", "--threads", "1", "-o",
                           path("mine.yaml"), "--resume"});
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err, "mine.yaml.journal:1:1: error: these results are not of"));
  EXPECT_FALSE(fs::exists(path("mine.yaml")));
}

TEST_F(Cli, CalibrateSaysWhyThereIsNoGpu) {
  if (fs::exists("/dev/nvidia0")) GTEST_SKIP() << "there is one";
  std::ofstream(path("toy.yaml")) << kToyScenario;
  const Result r =
      orrery({"calibrate", path("toy.yaml"), "--device", "cuda", "-o", path("mine.yaml")});
  EXPECT_EQ(r.status, 1);
  EXPECT_TRUE(contains(r.err, "there is no GPU to calibrate: "));
  EXPECT_EQ(files(), 1u);
}

}  // namespace
