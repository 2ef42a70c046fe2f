// The store keeps what it was given, to the bit, through kills and restarts, and says what is
// wrong.

#include "reports/search/store.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <sstream>
#include <thread>

#include "sim/config.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

StoreQuestion question() {
  return {{{"program", "orrery 1.2.3"},
           {"scenario", "plan:\n  layout: {tp: 1}\n  global_batch: 4\n  precision: bf16\n"},
           {"network", "flows"}}};
}

/// Numbers that no decimal text of a few digits holds.
Evaluation evaluation_of(std::size_t index) {
  const double x = static_cast<double>(index) + 1;
  Evaluation e;
  e.fits = index % 3 != 0;
  e.memory_peak_bytes = static_cast<std::int64_t>(index) * 1'000'003 + 1;
  e.step_time_s = x / 3;
  e.phases_s = {.forward = x / 7,
                .backward = x / 11,
                .weight = x / 13,
                .overlapped = x * 0.1,
                .bubble = x * 1e-12,
                .optimizer = 0,
                .exposed_communication = x / 17};
  return e;
}

std::string key_for(std::size_t index) {
  return fmt::format("n1 tp{} pp1", index);
}

std::vector<StoredEvaluation> rows(std::size_t begin, std::size_t end) {
  std::vector<StoredEvaluation> list;
  for (std::size_t i = begin; i < end; ++i) list.push_back({key_for(i), evaluation_of(i)});
  return list;
}

class SearchStore : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::TempDir() + "orrery_store_" + std::to_string(getpid());
    fs::create_directories(folder_);
    path_ = folder_ + "/s.sqlite";
  }
  void TearDown() override { fs::remove_all(folder_); }

  Store open(bool fresh = false) const { return Store(path_, question(), {}, fresh); }

  /// What opening says is wrong; nothing if it does not.
  template <class Error>
  std::string error_of(const StoreQuestion& asked = question(), bool fresh = false) const {
    try {
      Store(path_, asked, {}, fresh);
    } catch (const Error& error) {
      return error.what();
    }
    return "nothing";
  }

  void expect_rows(const Store& store, std::size_t count) const {
    EXPECT_EQ(store.size(Fidelity::full), count);
    for (std::size_t i = 0; i < count; ++i) {
      EXPECT_EQ(store.find(key_for(i), Fidelity::full), evaluation_of(i)) << i;
    }
  }

  static std::string slurp(const std::string& path) {
    std::ostringstream text;
    text << std::ifstream(path, std::ios::binary).rdbuf();
    return text.str();
  }

  std::string folder_;
  std::string path_;
};

TEST_F(SearchStore, GivesBackWhatItWasGivenToTheBit) {
  const double values[] = {0.1,
                           1.0 / 3,
                           1e-300,
                           std::numeric_limits<double>::denorm_min(),
                           std::numeric_limits<double>::max(),
                           9007199254740993.0,
                           123456789.0,
                           std::nextafter(1.0, 2.0),
                           std::numeric_limits<double>::infinity()};
  Evaluation odd;
  odd.fits = true;
  odd.memory_peak_bytes = std::numeric_limits<std::int64_t>::max();
  std::vector<StoredEvaluation> given;
  for (std::size_t i = 0; i < std::size(values); ++i) {
    odd.step_time_s = odd.phases_s.weight = values[i];
    given.push_back({key_for(i), odd});
  }
  {
    const auto store = std::make_unique<Store>(path_, question(), StoreSession{}, false);
    store->add(given, Fidelity::coarse);
    EXPECT_EQ(store->find(key_for(0), Fidelity::full), std::nullopt) << "coarse and full are apart";
    store->add(rows(0, 5), Fidelity::full);
  }
  const Store store(path_, question(), {}, false);
  EXPECT_EQ(store.size(Fidelity::coarse), given.size());
  for (const StoredEvaluation& row : given) {
    EXPECT_EQ(store.find(row.key, Fidelity::coarse), row.evaluation) << row.key;
  }
  expect_rows(store, 5);
  EXPECT_EQ(store.find("n1 tp5 pp1", Fidelity::full), std::nullopt);
}

TEST_F(SearchStore, KeepsAllInMemoryWithoutAPath) {
  Store store("", question(), {}, false);
  store.add(rows(0, 5), Fidelity::full);
  expect_rows(store, 5);
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(SearchStore, ClosedItIsOneFile) {
  { open().add(rows(0, 5), Fidelity::full); }
  EXPECT_EQ(std::distance(fs::directory_iterator(folder_), {}), 1);
}

TEST_F(SearchStore, NothingIsStoredTwice) {
  Store store(path_, question(), {}, false);
  store.add(rows(0, 3), Fidelity::full);
  EXPECT_THROW(store.add(rows(2, 5), Fidelity::full), std::runtime_error);
  expect_rows(store, 3);  // all of a batch or nothing
  store.add(rows(3, 5), Fidelity::full);
  expect_rows(store, 5);
}

TEST_F(SearchStore, WhatIsCommittedIsInTheFiles) {
  // A copy of the files while it is open: what a power cut would leave, had nothing been in flight.
  Store store(path_, question(), {}, false);
  for (std::size_t batch = 0; batch < 4; ++batch) {
    store.add(rows(batch * 10, batch * 10 + 10), Fidelity::full);
    const std::string copy = folder_ + "/copy.sqlite";
    for (const char* suffix : {"", "-wal"}) {
      fs::copy_file(path_ + suffix, copy + suffix, fs::copy_options::overwrite_existing);
    }
    expect_rows(Store(copy, question(), {}, false), batch * 10 + 10);
    for (const auto& entry : fs::directory_iterator(folder_)) {
      if (entry.path().string().rfind(copy, 0) == 0) fs::remove(entry.path());
    }
  }
}

/// Batches of 7 until it is killed; says on the pipe how many rows are in.
[[noreturn]] void add_for_ever(const std::string& path, int to) {
  Store store(path, question(), {}, false);
  for (std::size_t count = store.size(Fidelity::full);; count += 7) {
    store.add(rows(count, count + 7), Fidelity::full);
    const std::size_t said = count + 7;
    if (write(to, &said, sizeof said) != sizeof said) _exit(1);
  }
}

TEST_F(SearchStore, KilledAgainAndAgainItLosesNothing) {
  std::mt19937 random(7);
  std::size_t before = 0;
  for (int round = 0; round < 12; ++round) {
    int ends[2];
    ASSERT_EQ(pipe(ends), 0);
    const pid_t child = fork();
    if (child == 0) {
      close(ends[0]);
      add_for_ever(path_, ends[1]);
    }
    close(ends[1]);
    // At any point: while it opens, in the middle of a commit or of a checkpoint.
    std::this_thread::sleep_for(
        std::chrono::microseconds(std::uniform_int_distribution<>(0, 60'000)(random)));
    ASSERT_EQ(kill(child, SIGKILL), 0);
    int status = 0;
    waitpid(child, &status, 0);
    EXPECT_TRUE(WIFSIGNALED(status)) << "it ended by itself";
    std::size_t acknowledged = before;
    for (std::size_t said = 0; read(ends[0], &said, sizeof said) == sizeof said;) {
      acknowledged = said;
    }
    close(ends[0]);
    const Store store(path_, question(), {}, false);
    const std::size_t count = store.size(Fidelity::full);
    EXPECT_GE(count, acknowledged);
    EXPECT_LE(count, acknowledged + 7);  // committed, and killed before it could say so
    EXPECT_EQ(count % 7, 0u) << "a part of a batch";
    expect_rows(store, count);
    before = count;
  }
  EXPECT_GT(before, 50u);
}

TEST_F(SearchStore, RefusesAnotherQuestionWithWords) {
  { open().add(rows(0, 5), Fidelity::full); }
  StoreQuestion other = question();
  other.parts[1].second = "plan:\n  layout: {tp: 1}\n  global_batch: 8\n  precision: bf16\n";
  EXPECT_THAT(error_of<InputError>(other),
              HasSubstr("this store is of another scenario: 'global_batch: 4' there, "
                        "'global_batch: 8' here"));
  EXPECT_THAT(error_of<InputError>(other), HasSubstr("--fresh starts over"));
  other = question();
  other.parts[0].second = "orrery 1.2.4";
  EXPECT_THAT(error_of<InputError>(other),
              HasSubstr("another program: 'orrery 1.2.3' there, 'orrery 1.2.4' here"));
  other = question();
  other.parts[2].second += "\nand more";
  EXPECT_THAT(error_of<InputError>(other),
              HasSubstr("another network: nothing there, 'and more' here"));
  other = question();
  other.parts.push_back({"fabric", "tree"});
  EXPECT_THAT(error_of<InputError>(other), HasSubstr("another fabric"));
  expect_rows(open(), 5);  // looking did no harm

  { Store(path_, other, {}, true).add(rows(0, 1), Fidelity::full); }
  expect_rows(Store(path_, other, {}, false), 1);
}

TEST_F(SearchStore, LeavesFilesOfOthersAlone) {
  const std::string text = "dear diary, " + std::string(2000, 'x');
  std::ofstream(path_) << text;
  for (const bool fresh : {false, true}) {
    EXPECT_THAT(error_of<InputError>(question(), fresh), HasSubstr("this is no store"));
    EXPECT_EQ(slurp(path_), text);
  }
  fs::remove(path_);
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open(path_.c_str(), &db), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(db, "CREATE TABLE addresses (x)", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(db);
  const std::string bytes = slurp(path_);
  for (const bool fresh : {false, true}) {
    EXPECT_THAT(error_of<InputError>(question(), fresh),
                HasSubstr("a database of another program"));
    EXPECT_EQ(slurp(path_), bytes);
  }
}

TEST_F(SearchStore, AnEmptyFileBecomesAStore) {
  std::ofstream(path_).close();
  { open().add(rows(0, 5), Fidelity::full); }
  expect_rows(open(), 5);
}

TEST_F(SearchStore, RefusesAnotherFormat) {
  { open(); }
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open(path_.c_str(), &db), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(db, "PRAGMA user_version = 9", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(db);
  EXPECT_THAT(error_of<InputError>(), HasSubstr("a store of format 9, and this program knows 1"));
  EXPECT_EQ(error_of<std::exception>(question(), true), "nothing");
}

TEST_F(SearchStore, SaysThatItIsDamaged) {
  { open().add(rows(0, 2000), Fidelity::full); }
  // The pages after the first three: of the table's tree.
  const auto size = fs::file_size(path_);
  ASSERT_GT(size, 50'000u);
  std::string bytes = slurp(path_);
  for (std::size_t i = 20'000; i < 40'000; ++i) bytes[i] = static_cast<char>(i * 7);
  std::ofstream(path_, std::ios::binary) << bytes;
  EXPECT_THAT(error_of<std::runtime_error>(),
              HasSubstr("the store is damaged; --fresh starts over"));
  { open(true).add(rows(0, 3), Fidelity::full); }
  expect_rows(open(), 3);
  // Cut short.
  { open(true).add(rows(0, 2000), Fidelity::full); }
  fs::resize_file(path_, 30'000);
  EXPECT_THAT(error_of<std::runtime_error>(), HasSubstr("the store is damaged"));
  // Where even the pages that list the tables are gone.
  fs::resize_file(path_, 100);
  EXPECT_THAT(error_of<std::exception>(), testing::Not("nothing"));
  { open(true).add(rows(0, 3), Fidelity::full); }
  expect_rows(open(), 3);
}

TEST_F(SearchStore, SaysThatItIsInUse) {
  const Store store(path_, question(), {}, false);
  // Another process: locks of one process do not stop itself.
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    const std::string why = error_of<std::runtime_error>();
    _exit(write(ends[1], why.data(), why.size()) == static_cast<ssize_t>(why.size()) ? 0 : 1);
  }
  close(ends[1]);
  char text[500] = {};
  EXPECT_GT(read(ends[0], text, sizeof text - 1), 0);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  EXPECT_THAT(std::string(text), HasSubstr("s.sqlite is in use by another search"));
}

TEST_F(SearchStore, SaysThatThereIsNoRoom) {
  { open().add(rows(0, 100), Fidelity::full); }
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  const pid_t child = fork();
  if (child == 0) {
    // Files of this process cannot grow beyond that: writing fails as on a full disk.
    signal(SIGXFSZ, SIG_IGN);
    const rlimit limit = {100'000, 100'000};
    setrlimit(RLIMIT_FSIZE, &limit);
    std::string why = "nothing";
    try {
      Store store(path_, question(), {}, false);
      for (std::size_t i = 100; i < 100'000; i += 100) store.add(rows(i, i + 100), Fidelity::full);
    } catch (const std::exception& error) {
      why = error.what();
    }
    _exit(write(ends[1], why.data(), why.size()) == static_cast<ssize_t>(why.size()) ? 0 : 1);
  }
  close(ends[1]);
  char text[500] = {};
  EXPECT_GT(read(ends[0], text, sizeof text - 1), 0);
  close(ends[0]);
  waitpid(child, nullptr, 0);
  EXPECT_THAT(std::string(text), HasSubstr("cannot write " + path_ +
                                           ": disk I/O error; what was "
                                           "stored before is kept"));
  const Store store(path_, question(), {}, false);
  const std::size_t count = store.size(Fidelity::full);
  EXPECT_EQ(count % 100, 0u);
  EXPECT_GE(count, 100u);
  expect_rows(store, count);
}

TEST_F(SearchStore, SaysWhyItCannotBeOpened) {
  path_ = folder_ + "/none/s.sqlite";
  EXPECT_THAT(error_of<std::runtime_error>(),
              HasSubstr("cannot open " + path_ + ": unable to open database file (No such file"));
  path_ = folder_;
  EXPECT_THAT(error_of<std::runtime_error>(), HasSubstr("it is no regular file"));
  path_ = "/proc/version";
  EXPECT_THAT(error_of<std::runtime_error>(), HasSubstr("/proc/version"));
}

TEST_F(SearchStore, SessionsSayWhoComputedWhat) {
  {
    Store(path_, question(), {.command = "orrery search a", .ranks = 4}, false)
        .add(rows(0, 2), Fidelity::full);
  }
  {
    Store(path_, question(), {.command = "orrery search b"}, false).add(rows(2, 5), Fidelity::full);
  }
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open(path_.c_str(), &db), SQLITE_OK);
  std::string found;
  sqlite3_exec(
      db,
      "SELECT command || ' ' || ranks || ': ' || count(*) FROM simulated JOIN session "
      "ON session = session.id GROUP BY session.id",
      [](void* to, int, char** columns, char**) {
        *static_cast<std::string*>(to) += std::string(columns[0]) + "; ";
        return 0;
      },
      &found, nullptr);
  sqlite3_close(db);
  EXPECT_EQ(found, "orrery search a 4: 2; orrery search b 1: 3; ");
}

}  // namespace
}  // namespace orrery
