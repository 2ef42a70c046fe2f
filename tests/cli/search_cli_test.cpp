// orrery search as its users see it: killed and gone on with, its store, its outputs.

#include <gtest/gtest.h>
#include <signal.h>
#include <sqlite3.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>
#include <random>
#include <thread>

#include "tests/cli/cli.hpp"

namespace orrery {
namespace {

using nlohmann::json;

const std::string kLlama = ORRERY_SOURCE_DIR "/scenarios/llama3_70b_64_h100.yaml";

/// Some hundred candidates, and simulations of some milliseconds.
const char* kSpace = R"(tp: [2, 4, 8]
pp: [2, 4, 8]
zero: [1]
micro_batch: [1, 2]
schedule: [1f1b, interleaved_1f1b, zb_h1]
virtual_stages: [2, 5]
lighter_last: [0, 1]
recompute: [none, selective, full]
)";

class SearchCli : public Cli {
 protected:
  void SetUp() override {
    Cli::SetUp();
    std::ofstream(path("space.yaml")) << kSpace;
  }

  std::vector<std::string> search(std::vector<std::string> more) const {
    std::vector<std::string> args = {"search", kLlama, "--space", path("space.yaml")};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }

  /// The first column of the first row.
  std::string ask(const std::string& store, const std::string& sql) const {
    sqlite3* db = nullptr;
    EXPECT_EQ(sqlite3_open_v2(store.c_str(), &db, SQLITE_OPEN_READONLY, nullptr), SQLITE_OK);
    std::string answer;
    EXPECT_EQ(sqlite3_exec(
                  db, sql.c_str(),
                  [](void* to, int, char** columns, char**) {
                    *static_cast<std::string*>(to) += columns[0];
                    return 0;
                  },
                  &answer, nullptr),
              SQLITE_OK)
        << sqlite3_errmsg(db);
    sqlite3_close(db);
    return answer;
  }
  std::string counts(const std::string& store) const {
    return ask(store, "SELECT count(*) || ' ' || count(DISTINCT candidate) FROM coarse") + ", " +
           ask(store, "SELECT count(*) || ' ' || count(DISTINCT candidate) FROM simulated");
  }
};

TEST_F(SearchCli, SaysWhichLayoutIsBestAndWhy) {
  const Result r = orrery(search({"--top", "5"}));
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_TRUE(contains(r.out, "Llama 3 70B on 64 H100: layouts\n")) << r.out;
  EXPECT_TRUE(contains(r.out, "The best 5, and the scenario's own plan")) << r.out;
  EXPECT_TRUE(contains(r.out, "Why the winner wins")) << r.out;
  EXPECT_FALSE(contains(r.out + r.err, "\x1b"));
  EXPECT_FALSE(contains(r.err, "a second on")) << "progress outside of a terminal";
  EXPECT_EQ(files(), 1u) << "no store was asked for";
}

TEST_F(SearchCli, TheAnswerDoesNotDependOnThreadsAndStores) {
  const Result one = orrery(search({"--threads", "1", "--json", "-"}));
  ASSERT_EQ(one.status, 0) << one.err;
  EXPECT_EQ(orrery(search({"--threads", "3", "--json", "-"})).out, one.out);
  const auto stored = search({"--threads", "2", "--json", "-", "--store", path("s.sqlite")});
  EXPECT_EQ(orrery(stored).out, one.out);
  const std::string before = counts(path("s.sqlite"));
  EXPECT_EQ(orrery(stored).out, one.out);
  EXPECT_EQ(counts(path("s.sqlite")), before);
  // A store that knows more than was asked for gives no other answer.
  EXPECT_EQ(orrery(search({"--full", "200", "--top", "40", "--store", path("s.sqlite")})).status,
            0);
  EXPECT_NE(counts(path("s.sqlite")), before);
  EXPECT_EQ(orrery(stored).out, one.out);
}

TEST_F(SearchCli, JsonAndCsvAgreeWithRun) {
  const Result r = orrery(search({"--top", "3", "--json", path("r.json"), "--csv", path("r.csv"),
                                  "--write-best", path("best.yaml")}));
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(slurp(path("r.json")));
  ASSERT_EQ(j.at("best").size(), 3u);
  const json& best = j.at("best")[0];
  EXPECT_EQ(best.at("place"), 1);
  EXPECT_LE(best.at("step_time_s").get<double>(), j.at("best")[1].at("step_time_s").get<double>());

  // The winner as a scenario takes the same step, to the last digit, and needs the same memory.
  const Result run = orrery({"run", path("best.yaml"), "--json", "-"});
  ASSERT_EQ(run.status, 0) << run.err;
  const json report = json::parse(run.out);
  EXPECT_EQ(report.at("step_time_s"), best.at("full").at("step_time_s"));
  EXPECT_EQ(report.at("phases_s"), best.at("full").at("phases_s"));
  EXPECT_EQ(report.at("memory_peak_bytes").at("overall"), best.at("memory_peak_bytes"));
  // As does the scenario's own plan.
  const json own = json::parse(orrery({"run", kLlama, "--json", "-"}).out);
  EXPECT_EQ(own.at("step_time_s"), j.at("own").at("full").at("step_time_s"));

  // One line a candidate, as many columns in each.
  std::istringstream csv(slurp(path("r.csv")));
  std::string line;
  std::size_t lines = 0;
  std::ptrdiff_t commas = 0;
  for (; std::getline(csv, line); ++lines) {
    bool quoted = false;
    const auto count = std::count_if(line.begin(), line.end(), [&](char c) {
      quoted ^= c == '"';
      return c == ',' && !quoted;
    });
    if (lines == 0) commas = count;
    ASSERT_EQ(count, commas) << line;
  }
  EXPECT_EQ(lines, 1 + j.at("counts").at("candidates").get<std::size_t>());
  EXPECT_TRUE(contains(slurp(path("r.csv")), best.at("candidate").get<std::string>()));
}

TEST_F(SearchCli, TheWinnerRunsFromAnyFolder) {
  fs::create_directories(path("far/away"));
  const fs::path before = fs::current_path();
  fs::current_path(ORRERY_SOURCE_DIR);
  const std::vector<std::string> args = {"search",       "scenarios/llama3_70b_64_h100.yaml",
                                         "--space",      path("space.yaml"),
                                         "--write-best", path("far/away/best.yaml")};
  const Result r = orrery(args);
  fs::current_path(before);
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(orrery({"run", path("far/away/best.yaml")}).status, 0);
}

TEST_F(SearchCli, KilledAgainAndAgainItComesToTheSameAnswer) {
  const auto begin = std::chrono::steady_clock::now();
  const Result whole =
      orrery(search({"--threads", "2", "--json", "-", "--store", path("whole.sqlite")}));
  ASSERT_EQ(whole.status, 0) << whole.err;
  const auto took = std::chrono::steady_clock::now() - begin;
  const auto took_us = std::chrono::duration_cast<std::chrono::microseconds>(took).count();

  const auto resumed = search({"--threads", "2", "--json", "-", "--store", path("s.sqlite")});
  std::mt19937 random(11);
  int killed = 0;
  for (int round = 0; round < 8; ++round) {
    const pid_t child = start(resumed);
    std::this_thread::sleep_for(std::chrono::microseconds(
        std::uniform_int_distribution<std::int64_t>(took_us / 20, took_us * 2 / 3)(random)));
    kill(child, SIGKILL);
    killed += wait_for(child).status == -SIGKILL;
  }
  EXPECT_GE(killed, 2);
  const Result r = orrery(resumed);
  ASSERT_EQ(r.status, 0) << r.err;
  EXPECT_EQ(r.out, whole.out);
  EXPECT_EQ(counts(path("s.sqlite")), counts(path("whole.sqlite")));
  EXPECT_EQ(ask(path("s.sqlite"), "SELECT count(*) FROM coarse WHERE session IS NULL"), "0");
  EXPECT_GE(std::stoi(ask(path("s.sqlite"), "SELECT count(*) FROM session")), 2);
}

TEST_F(SearchCli, StoppedItSaysWhatIsKept) {
  for (const int signal : {SIGINT, SIGTERM}) {
    // Many seconds of work: all that fit of the default space.
    const std::string store = path(std::to_string(signal).append(".sqlite"));
    const pid_t child = start({"search", kLlama, "--full", "100000", "--top", "1000", "--store",
                               store, "--threads", "1"});
    for (int i = 0; i < 1000 && !fs::exists(store); ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    kill(child, signal);
    const Result r = wait_for(child);
    EXPECT_EQ(r.status, 128 + signal) << r.err;
    EXPECT_TRUE(contains(r.err, "full evaluations are in " + store +
                                    ", and the same command goes on with them"))
        << r.err;
    EXPECT_EQ(r.out, "");
  }
}

TEST_F(SearchCli, StoresOfOthersAreRefused) {
  ASSERT_EQ(orrery(search({"--store", path("s.sqlite")})).status, 0);
  const Result scenario =
      orrery({"search", ORRERY_SOURCE_DIR "/scenarios/mixtral_8x7b_64_h100.yaml", "--space",
              path("space.yaml"), "--store", path("s.sqlite")});
  EXPECT_EQ(scenario.status, 2);
  EXPECT_TRUE(contains(scenario.err, "s.sqlite: error: this store is of another scenario: "))
      << scenario.err;
  EXPECT_TRUE(contains(scenario.err, "--fresh starts over in it, or name another --store"));
  EXPECT_EQ(scenario.out, "");
  const Result formula = orrery(search({"--store", path("s.sqlite"), "--memory-share", "0.9"}));
  EXPECT_EQ(formula.status, 2);
  EXPECT_TRUE(contains(formula.err, "of another share of memory: '1' there, '0.9' here"))
      << formula.err;
  EXPECT_EQ(
      orrery(search({"--store", path("s.sqlite"), "--memory-share", "0.9", "--fresh"})).status, 0);
  // No stores at all.
  const Result text = orrery(search({"--store", path("space.yaml"), "--fresh"}));
  EXPECT_EQ(text.status, 2);
  EXPECT_TRUE(contains(text.err, "space.yaml: error: this is no store of orrery search"))
      << text.err;
  EXPECT_EQ(slurp(path("space.yaml")), kSpace);
  const Result nowhere = orrery(search({"--store", path("none/s.sqlite")}));
  EXPECT_EQ(nowhere.status, 1);
  EXPECT_TRUE(contains(nowhere.err, "cannot open " + path("none/s.sqlite"))) << nowhere.err;
}

TEST_F(SearchCli, TakesOverridesOfTheScenarioAndOfItsSearch) {
  const std::vector<std::string> args = {"search",
                                         kLlama,
                                         "--set",
                                         "plan.sequence_length=4096",
                                         "--set",
                                         "search={tp: [8], pp: [2, 4], cp: [1], zero: 1, "
                                         "recompute: none, micro_batch: 1, schedule: 1f1b}",
                                         "--json",
                                         "-"};
  const Result r = orrery(args);
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  EXPECT_LT(j.at("counts").at("candidates"), 30);
  for (const json& best : j.at("best")) EXPECT_EQ(best.at("plan").at("tp"), 8);
  const json own =
      json::parse(orrery({"run", kLlama, "--set", "plan.sequence_length=4096", "--json", "-"}).out);
  EXPECT_EQ(j.at("own").at("step_time_s"), own.at("step_time_s"));
  const Result wrong = orrery({"search", kLlama, "--set", "search.tp=[many]"});
  EXPECT_EQ(wrong.status, 2);
  EXPECT_TRUE(contains(wrong.err, "--set:1:")) << wrong.err;
}

/// Evaluations are of candidates, not of a space.
TEST_F(SearchCli, AWiderSpaceGoesOnWithWhatIsThere) {
  ASSERT_EQ(orrery(search({"--store", path("s.sqlite")})).status, 0);
  const int before = std::stoi(ask(path("s.sqlite"), "SELECT count(*) FROM coarse"));
  std::ofstream(path("space.yaml")) << kSpace << "cp: [1, 2]\n";
  const Result wider = orrery(search({"--store", path("s.sqlite"), "--json", "-"}));
  ASSERT_EQ(wider.status, 0) << wider.err;
  EXPECT_EQ(wider.out, orrery(search({"--json", "-"})).out);
  const std::string by_session =
      ask(path("s.sqlite"), "SELECT count(*) || ' ' FROM coarse GROUP BY session ORDER BY session");
  EXPECT_EQ(by_session.substr(0, by_session.find(' ')), std::to_string(before));
  EXPECT_EQ(json::parse(wider.out).at("counts").at("candidates"),
            std::stoi(ask(path("s.sqlite"), "SELECT count(*) FROM coarse")));
}

TEST_F(SearchCli, FindsTheSmallestClusterAndWhatABudgetBuys) {
  const auto asked = [&](std::vector<std::string> more) {
    std::vector<std::string> args = {"--tokens", "1T", "--json", "-", "--store", path("q.sqlite")};
    args.insert(args.end(), more.begin(), more.end());
    return orrery(search(args));
  };
  const Result r = asked({"--days", "100", "--write-best", path("best.yaml")});
  ASSERT_EQ(r.status, 0) << r.err;
  const json j = json::parse(r.out);
  EXPECT_TRUE(j.at("met"));
  EXPECT_EQ(j.at("tokens"), 1e12);
  const double days = j.at("choice").at("days");
  const std::int64_t nodes = j.at("choice").at("nodes");
  EXPECT_LE(days, 100);
  // What it means, from the step of the layout that it wrote.
  const json report = json::parse(orrery({"run", path("best.yaml"), "--json", "-"}).out);
  EXPECT_NEAR(1e12 / report.at("tokens_per_day").get<double>(), days, 1e-9 * days);
  EXPECT_EQ(report.at("gpus"), 8 * nodes);
  EXPECT_NEAR(j.at("choice").at("gpu_hours").get<double>(),
              days * 24 * 8 * static_cast<double>(nodes), 1);
  // Smaller ones that were searched take longer.
  for (const json& other : j.at("searched")) {
    if (other.at("nodes") < nodes) {
      EXPECT_GT(other.at("days"), 100.0);
    }
  }
  EXPECT_EQ(asked({"--days", "100"}).out, r.out);  // from the store

  const Result never = asked({"--days", "0.1"});
  EXPECT_EQ(never.status, 4);
  EXPECT_FALSE(json::parse(never.out).at("met"));
  EXPECT_TRUE(json::parse(never.out).at("choice").is_object()) << "the nearest";

  const Result budget = asked({"--gpu-hours", "300K"});
  ASSERT_EQ(budget.status, 0) << budget.err;
  EXPECT_LE(json::parse(budget.out).at("choice").at("gpu_hours"), 300e3);
  EXPECT_EQ(asked({"--gpu-hours", "1"}).status, 4);
  const Result words = orrery(search({"--tokens", "1T", "--days", "100"}));
  EXPECT_TRUE(contains(words.out, "fewest nodes for 1.00 T tokens in 100 days")) << words.out;
}

TEST_F(SearchCli, AnotherBuildIsFoundOut) {
  ASSERT_EQ(orrery(search({"--store", path("s.sqlite")})).status, 0);
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open(path("s.sqlite").c_str(), &db), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(db,
                         "UPDATE simulated SET step_time_s = step_time_s + 1 WHERE candidate LIKE "
                         "'n8 tp4 cp2 pp4 %'",
                         nullptr, nullptr, nullptr),
            SQLITE_OK);
  sqlite3_close(db);
  const Result r = orrery(search({"--store", path("s.sqlite")}));
  EXPECT_EQ(r.status, 2);
  EXPECT_TRUE(contains(r.err,
                       "this store is of another build of orrery 0.1.0: there the "
                       "scenario's own plan takes "))
      << r.err;
}

TEST_F(SearchCli, WhereNothingFitsItSaysWhatIsNearest) {
  const Result r = orrery(search({"--memory-share", "0.05", "--write-best", path("best.yaml")}));
  EXPECT_EQ(r.status, 4) << r.err;
  EXPECT_TRUE(contains(r.out, "No candidate fits in memory. Nearest, with ")) << r.out;
  EXPECT_FALSE(fs::exists(path("best.yaml")));
  const Result as_json = orrery(search({"--memory-share", "0.05", "--json", "-"}));
  EXPECT_EQ(as_json.status, 4);
  EXPECT_TRUE(json::parse(as_json.out).at("nearest").is_object());
}

TEST_F(SearchCli, UsageErrorsExitWithTwo) {
  for (const auto& args : std::vector<std::vector<std::string>>{
           {"search"},
           {"search", path("none.yaml")},
           search({"--fresh"}),
           search({"--top", "0"}),
           search({"--threads", "0"}),
           search({"--memory-share", "1.5"}),
           search({"--json", "-", "--csv", "-"}),
           search({"--days", "60"}),
           search({"--tokens", "14.8T"}),
           search({"--tokens", "many", "--days", "60"}),
           search({"--tokens", "1T", "--days", "60", "--gpu-hours", "1M"}),
           search({"--tokens", "1T", "--days", "60", "--csv", path("c.csv")}),
           {"search", kLlama, "--space", path("none.yaml")}}) {
    const Result r = orrery(args);
    EXPECT_EQ(r.status, 2) << args.back();
    EXPECT_EQ(r.out, "");
    EXPECT_NE(r.err, "");
  }
}

}  // namespace
}  // namespace orrery
