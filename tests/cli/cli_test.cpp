// The program as its users see it: exit status, what goes to which stream, what files are left.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <vector>

#include "tests/cli/cli.hpp"

namespace {

using namespace orrery;
using nlohmann::json;

const std::string kV3 = ORRERY_SOURCE_DIR "/scenarios/deepseek_v3_2048_h800.yaml";
const std::string kNode = ORRERY_SOURCE_DIR "/scenarios/clusters/h100_node.yaml";
const std::string kTable =
    ORRERY_SOURCE_DIR "/tests/calibrate/nccl/h100_node_all_reduce_published.txt";
const std::string kGeneration = ORRERY_SOURCE_DIR "/scenarios/generation/deepseek_v3_decode.yaml";
const std::string kRuns = ORRERY_SOURCE_DIR "/scenarios/runs/deepseek_v3.yaml";

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

TEST_F(Cli, BudgetOfARecipe) {
  const auto recipe = [&](const std::string& set, const std::string& published) {
    std::ofstream(path("r.yaml"))
        << "name: small\nprice: {gpu_hour: 2 USD, source: x}\nstages:\n  - {name: 'a, b', kind: "
           "pre_training, steps: 10, scenario: " ORRERY_SOURCE_DIR
           "/scenarios/llama3_70b_64_h100.yaml"
        << set << "}\n"
        << published;
    return path("r.yaml");
  };
  const std::string published =
      "published:\n  - {quantity: gpu_hours, value: 1, aim: 1 %, source: nobody}\n";
  const Result r = orrery({"budget", recipe("", published)});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "Against what is published")) << r.out;
  EXPECT_EQ(orrery({"budget", path("r.yaml"), "--fail-above"}).status, 3);
  const json j = json::parse(orrery({"budget", path("r.yaml"), "--json", "-"}).out);
  const double hours = j.at("total").at("gpu_hours").get<double>();
  EXPECT_DOUBLE_EQ(j.at("total").at("cost_usd").get<double>(), 2 * hours);
  const Result csv = orrery({"budget", path("r.yaml"), "--csv", "-", "--quiet"});
  EXPECT_TRUE(contains(csv.out, ",USD,Usage,\"a, b\",")) << csv.out;
  EXPECT_EQ(orrery({"budget", path("r.yaml"), "--csv", "-", "--json", "-"}).status, 2);
  EXPECT_EQ(orrery({"budget", recipe(", sett: []", "")}).status, 2);
  const Result large = orrery({"budget", recipe(", set: [plan.sequence_length=131072]", "")});
  EXPECT_EQ(large.status, 4) << large.out;
  EXPECT_TRUE(contains(large.out, "Does not fit into memory")) << large.out;
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

TEST_F(Cli, SettingWhatIsThereChangesNothing) {
  const std::string base = orrery({"run", kV3, "--json", "-"}).out;
  const Result same = orrery({"run", kV3, "--json", "-", "--set", "plan.layout.pp=16", "--set",
                              "cluster.nvlink.bandwidth=*1", "--set", "profile.device.sms=132",
                              "--set", "cluster.fabric.nic.capacity=50 GB/s", "--set",
                              "plan.precision={recipe: fp8_deepseek}"});
  EXPECT_EQ(same.status, 0) << same.err;
  EXPECT_EQ(same.out, base);
  EXPECT_NE(orrery({"run", kV3, "--json", "-", "--set", "plan.layout.ep=32"}).out, base);
}

TEST_F(Cli, OverridesThatAreWrongAreWrongInput) {
  const std::vector<std::vector<std::string>> all = {
      {"run", kV3},
      {"explain", kV3},
      {"compare", kV3, kV3},
      {"network", kV3},
      {"validate", ORRERY_SOURCE_DIR "/scenarios/runs/deepseek_v3.yaml"}};
  for (std::vector<std::string> args : all) {
    args.insert(args.end(), {"--set", "seed=1", "--set", "plan.layuot.pp=8"});
    const Result r = orrery(args);
    EXPECT_EQ(r.status, 2) << args[0];
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err,
              "--set:2:6: error: unknown key 'layuot' in plan\n"
              "  plan.layuot.pp=8\n"
              "       ^\n"
              "  hint: did you mean 'layout'?\n");
  }
  const Result network = orrery({"network", kNode, "--set", "nvlink.bandwith=*2"});
  EXPECT_EQ(network.status, 2);
  EXPECT_TRUE(contains(network.err, "there is no 'bandwith' in 'nvlink' to multiply"))
      << network.err;
}

TEST_F(Cli, NetworkOfAChangedCluster) {
  const Result r = orrery(
      {"network", kNode, "--set", "nvlink.bandwidth=*0.5", "--set", "profile.device.name=Slow"});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_NE(r.out, orrery({"network", kNode}).out);
}

TEST_F(Cli, CompareAnswersWhatIfs) {
  const std::vector<std::string> args = {"compare",   kV3,
                                         "--what-if", "EP32: plan.layout.ep=32",
                                         "--what-if", "odd: plan.layout={pp: 16, dp: 128, ep: 3}",
                                         "--what-if", "seed=1, plan.communication_sms=8"};
  const Result r = orrery(args);
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "\nEP32 ")) << r.out;
  EXPECT_TRUE(contains(r.out, "\nseed=1, plan.communicati.. ")) << r.out;
  EXPECT_TRUE(contains(r.out, "Cannot run\nodd  ep x expert_tp = 3 x 1 = 3 does not divide"))
      << r.out;
  EXPECT_TRUE(contains(r.err, "odd cannot run:\n--what-if:2:40: error: ep x expert_tp")) << r.err;
  std::vector<std::string> as_json = args;
  as_json.insert(as_json.end(), {"--json", "-", "--quiet"});
  const json j = json::parse(orrery(as_json).out);
  EXPECT_GT(j.at("base").at("step_time_s").get<double>(), 0);
  ASSERT_EQ(j.at("variants").size(), 3u);
  EXPECT_EQ(j.at("variants")[0].at("set")[0], "plan.layout.ep=32");
  EXPECT_EQ(j.at("variants")[1].at("feasible"), false);
  EXPECT_TRUE(j.at("variants")[1].at("report").is_null());

  for (const std::vector<std::string>& wrong : std::vector<std::vector<std::string>>{
           {"compare", kV3, "--what-if", "EP32"},
           {"compare", kV3, kV3, "--what-if", "a: seed=1"},
           {"compare", "--what-if", "a: seed=1"},
           {"compare", "--what-ifs", path("none.yaml")},
           {"compare", kV3, "--set", "plan.layout.ep=3", "--what-if", "a: seed=1"}}) {
    const Result w = orrery(wrong);
    EXPECT_EQ(w.status, 2) << wrong.back();
    EXPECT_EQ(w.out, "");
    EXPECT_NE(w.err, "");
  }
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
  std::string text = slurp(kTiny);
  text.replace(text.find("{dp: 1, zero: 1}"), 16, "{dp: 2, zero: 1}");
  for (const char* folder : {": models/", ": clusters/", ": texts/"}) {
    text.replace(text.find(folder), 2, ": " ORRERY_SOURCE_DIR "/scenarios/");
  }
  std::ofstream(path("two.yaml")) << text;
  const Result two = orrery({"run", path("two.yaml"), "--execute", "cuda"});
  EXPECT_EQ(two.status, 1);
  EXPECT_TRUE(contains(two.err,
                       "2 ranks with a GPU each talk over NCCL: cannot load NCCL: "
                       "/nowhere/libnccl.so.2: "))
      << two.err;
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

TEST_F(Cli, ReportIsOneFileInThreeFormats) {
  const Result html = orrery({"report", kTiny, "-o", path("report.html"), "--target", "mfu >= 90 %"});
  ASSERT_EQ(html.status, 0) << html.err;
  EXPECT_EQ(html.out.substr(0, 4), "No: ") << html.out;
  const std::string page = slurp(path("report.html"));
  EXPECT_EQ(page.substr(0, 15), "<!doctype html>");
  EXPECT_EQ(files(), 1u);
  const Result run = orrery({"run", kTiny, "--report", path("run.html"), "--quiet"});
  ASSERT_EQ(run.status, 0) << run.err;
  EXPECT_EQ(run.out, "");
  EXPECT_EQ(slurp(path("run.html")).substr(0, 15), "<!doctype html>");
  const Result markdown = orrery({"report", kTiny, "-o", "-", "--format", "markdown"});
  EXPECT_EQ(markdown.out.substr(0, 2), "# ");
  const Result csv = orrery({"report", kTiny, kV3, "-o", "-", "--format", "csv", "--tokens", "1T",
                             "--usd-per-gpu-hour", "2", "--network", "formula"});
  ASSERT_EQ(csv.status, 0) << csv.err;
  EXPECT_EQ(csv.out.substr(0, 11), "BilledCost,");
  EXPECT_EQ(std::count(csv.out.begin(), csv.out.end(), '\n'), 3);
}

TEST_F(Cli, ReportSaysWhatIsWrongAndLeavesNoFile) {
  const Result r = orrery({"report", kTiny, "-o", path("report.html"), "--target", "days <= 60"});
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err, "--target:1:10: error: of how many tokens?")) << r.err;
  const Result word = orrery({"report", kTiny, "-o", path("report.html"), "--tokens", "many"});
  EXPECT_EQ(word.status, 2);
  EXPECT_TRUE(contains(word.err, "'many' is no number such as 14.8T")) << word.err;
  EXPECT_EQ(files(), 0u);
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

TEST_F(Cli, RunSaysHowSureItIs) {
  const std::string mixtral = ORRERY_SOURCE_DIR "/scenarios/mixtral_8x7b_64_h100.yaml";
  const Result r = orrery({"run", mixtral, "--uncertainty=20", "--json", path("r.json")});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "How sure that is: 20 draws")) << r.out;
  const json u = json::parse(slurp(path("r.json"))).at("uncertainty");
  EXPECT_EQ(u.at("draws"), 20);
  EXPECT_LT(u.at("step_time_s").at("p10"), u.at("step_time_s").at("p90"));
  EXPECT_EQ(orrery({"run", mixtral, "--uncertainty=1"}).status, 2);
}

TEST_F(Cli, ReliabilityOfARun) {
  const std::string failures = ORRERY_SOURCE_DIR "/scenarios/reliability/h800_2048.yaml";
  const std::vector<std::string> ask = {"reliability", kV3, "--with", failures, "--time",
                                        "50 days"};
  Result r = orrery(ask);
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "2048 GPUs, 256 hosts; 50.0 days of training")) << r.out;
  std::vector<std::string> as_json = ask;
  as_json.insert(as_json.end(), {"--json", "-", "--trials", "50"});
  r = orrery(as_json);
  const json answer = json::parse(r.out);
  EXPECT_EQ(answer.at("trials"), 50);
  EXPECT_GT(answer.at("goodput").at("p10"), 0.5);
  EXPECT_EQ(orrery(as_json).out, r.out);
  // 14.8e12 tokens at the simulated rate: 2048 GPUs take 50 to 60 days (V3 report: less than two months).
  r = orrery({"reliability", kV3, "--with", failures, "--tokens", "14.8e12", "--json", "-"});
  EXPECT_NEAR(json::parse(r.out).at("useful_s").get<double>() / 86400, 50, 10);
  // What is missing is said, all at once.
  r = orrery({"reliability", kV3});
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err, "does not say what fails")) << r.err;
  EXPECT_TRUE(contains(r.err, "how long the run is, is not said")) << r.err;
  EXPECT_EQ(orrery({"reliability"}).status, 2);
  EXPECT_EQ(orrery({"reliability", kV3, "--with", failures, "--time", "50 GB"}).status, 2);
}

TEST_F(Cli, ReliabilityOfPublishedRuns) {
  const std::string runs = ORRERY_SOURCE_DIR "/scenarios/reliability/published.yaml";
  const Result r = orrery({"reliability", "--published=" + runs});
  EXPECT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "Llama 3 405B, 16384 H100, 54 days")) << r.out;
  EXPECT_EQ(orrery({"reliability", "--published=" + kV3}).status, 2);
}

}  // namespace
