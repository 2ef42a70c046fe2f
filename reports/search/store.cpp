#include "reports/search/store.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <array>
#include <cmath>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string_view>
#include <utility>
#include <variant>

#include "reports/search/sqlite.hpp"
#include "reports/study.hpp"
#include "sim/check.hpp"
#include "sim/config.hpp"

namespace orrery {
namespace {

namespace fs = std::filesystem;

/// In the file's header, beside the schema's version (PRAGMA application_id, user_version): "Orry".
constexpr std::int64_t kApplication = 0x4F727279;
constexpr std::int64_t kFormat = 1;

// One table a fidelity, alike. STRICT keeps integers and 64-bit floating point numbers as they are;
// the primary key, that nothing is stored twice.
constexpr const char* kTables = R"(
  CREATE TABLE question (part TEXT PRIMARY KEY, text TEXT NOT NULL) STRICT, WITHOUT ROWID;
  CREATE TABLE session (id INTEGER PRIMARY KEY, begun TEXT NOT NULL, program TEXT NOT NULL,
                        command TEXT NOT NULL, space TEXT NOT NULL, host TEXT NOT NULL,
                        ranks INTEGER NOT NULL) STRICT;
)";
constexpr const char* kTable = R"(
  CREATE TABLE {} (
    candidate TEXT PRIMARY KEY,    -- its key
    fits INTEGER NOT NULL,
    memory_peak_bytes INTEGER NOT NULL,
    step_time_s REAL NOT NULL,
    forward_s REAL NOT NULL,
    backward_s REAL NOT NULL,
    weight_s REAL NOT NULL,
    overlapped_s REAL NOT NULL,
    bubble_s REAL NOT NULL,
    optimizer_s REAL NOT NULL,
    exposed_communication_s REAL NOT NULL,
    session INTEGER NOT NULL REFERENCES session (id)
  ) STRICT, WITHOUT ROWID;
)";
constexpr const char* kFind =
    "SELECT fits, memory_peak_bytes, step_time_s, forward_s, backward_s, weight_s, overlapped_s, "
    "bubble_s, optimizer_s, exposed_communication_s FROM {} WHERE candidate = ?";
constexpr const char* kAdd = "INSERT INTO {} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)";

constexpr std::array kFidelities = {Fidelity::coarse, Fidelity::full};

/// `full` is a word of SQL's.
const char* table_of(Fidelity fidelity) {
  return fidelity == Fidelity::coarse ? "coarse" : "simulated";
}

std::array<double*, 8> times_of(Evaluation& e) {
  PhaseTimes& p = e.phases_s;
  return {&e.step_time_s, &p.forward, &p.backward,  &p.weight,
          &p.overlapped,  &p.bubble,  &p.optimizer, &p.exposed_communication};
}

/// FNV-1a.
class Hash {
 public:
  void mix(std::string_view text) {
    for (const char c : text) hash_ = (hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3U;
    hash_ = (hash_ ^ 0xFF) * 0x100000001b3U;  // no byte of UTF-8
  }
  std::string text() const { return fmt::format("{:016x}", hash_); }

 private:
  std::uint64_t hash_ = 0xcbf29ce484222325U;
};

std::string counts_of(const Routing& routing) {
  const auto* recorded = std::get_if<RecordedCounts>(&routing.kind);
  if (recorded == nullptr) return "none";
  Hash hash;
  for (const auto& [layer, micro_batches] : recorded->layers) {
    hash.mix(fmt::format("layer {}", layer));
    for (const auto& counts : micro_batches) hash.mix(fmt::format("{}", fmt::join(counts, ",")));
  }
  return fmt::format("contents {}", hash.text());
}

/// The first line that differs, of texts that do.
std::string difference(const std::string& stored, const std::string& asked) {
  const auto lines = [](const std::string& text) {
    std::vector<std::string> list;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find('\n', begin), text.size());
      const std::size_t first = std::min(text.find_first_not_of(' ', begin), end);
      list.push_back(text.substr(first, end - first));
      begin = end + 1;
    }
    return list;
  };
  const auto a = lines(stored);
  const auto b = lines(asked);
  const auto [x, y] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
  const auto said = [](const auto& at, const auto& list) {
    return at == list.end() ? std::string("nothing") : fmt::format("'{}'", *at);
  };
  return fmt::format("{} there, {} here", said(x, a), said(y, b));
}

[[noreturn]] void refuse(const std::string& path, std::string message, std::string hint) {
  std::vector<Problem> problems(1);
  problems[0].at.file = path;
  problems[0].message = std::move(message);
  problems[0].hint = std::move(hint);
  throw InputError(std::move(problems));
}

constexpr const char* kStartOver = "--fresh starts over in it, or name another --store";

std::string now_utc() {
  const std::time_t now = std::time(nullptr);
  std::tm utc{};
  gmtime_r(&now, &utc);
  std::array<char, 32> text{};
  std::strftime(text.data(), text.size(), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return text.data();
}

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "";
}

/// A file's own words on what it is, whatever the state of the rest.
bool says_that_it_is_a_store(const std::string& path) {
  std::array<char, 100> header{};
  std::ifstream file(path, std::ios::binary);
  if (!file.read(header.data(), header.size())) return false;
  const auto application = [&] {
    std::int64_t value = 0;
    for (std::size_t i = 68; i < 72; ++i)
      value = value << 8 | static_cast<unsigned char>(header[i]);
    return value;
  };
  constexpr std::string_view kMagic("SQLite format 3\0", 16);
  return std::string_view(header.data(), kMagic.size()) == kMagic && application() == kApplication;
}

void remove_store(const std::string& path) {
  for (const char* suffix : {"", "-wal", "-shm", "-journal"}) fs::remove(path + suffix);
}

/// The database, this process's alone until it is closed, and looked over.
Database open_database(const std::string& path) {
  Database db(path);
  // Within a moment: another search that was killed may take it to be gone.
  sqlite3_busy_timeout(db.handle(), 1000);
  if (sqlite3_db_readonly(db.handle(), "main") == 1) {
    throw SqliteError(fmt::format("cannot write {}: it is read-only", path), SQLITE_READONLY);
  }
  // One search at a time. The lock is given back by the system when the process ends, however it
  // ends. It also keeps WAL's index in our own memory instead of in a mapped file, which network
  // file systems do not share.
  db.execute("PRAGMA locking_mode = EXCLUSIVE", "open");
  return db;
}

/// Whether it is ours: nothing for a file without tables.
bool is_new(Database& db) {
  const std::int64_t application = db.integer("PRAGMA application_id", "read");
  if (application == kApplication) return false;
  if (application == 0 && db.integer("SELECT count(*) FROM sqlite_master", "read") == 0)
    return true;
  refuse(db.path(), "this is a database of another program, not a store of orrery search",
         "name another --store");
}

}  // namespace

std::string contents_of_file(const std::string& file) {
  if (file.empty()) return "none";
  std::ifstream stream(file, std::ios::binary);
  Hash hash;
  hash.mix(std::string(std::istreambuf_iterator<char>(stream), {}));
  return fmt::format("{}, contents {}", fs::path(file).filename().string(), hash.text());
}

StoreQuestion store_question(const Scenario& of, const SearchOptions& options,
                             const std::string& program) {
  // What no evaluation depends on does not make it another question.
  Scenario scenario = of;
  scenario.name.clear();
  scenario.training = {};
  return {
      {{"program", program},
       {"scenario", to_yaml(scenario)},
       {"profile", contents_of_file(scenario.profile.file)},
       {"fabric", contents_of_file(scenario.cluster.fabric)},
       {"recorded counts", counts_of(scenario.plan.routing)},
       {"network", network_of(scenario, options.network) == Network::flows ? "flows" : "formula"},
       {"share of memory", fmt::format("{}", options.memory_share)}}};
}

std::string to_text(const SearchSpace& space) {
  std::string text;
  const auto list = [&](std::string_view name, const auto& values, auto word) {
    text += fmt::format("{}: [", name);
    for (std::size_t i = 0; i < values.size(); ++i) {
      text += fmt::format("{}{}", i > 0 ? ", " : "", word(values[i]));
    }
    text += "]\n";
  };
  const auto numbers = [&](std::string_view name, const std::vector<std::int64_t>& values) {
    list(name, values, [](std::int64_t value) { return value; });
  };
  numbers("nodes", space.nodes);
  numbers("tp", space.tp);
  numbers("cp", space.cp);
  numbers("pp", space.pp);
  numbers("ep", space.ep);
  numbers("expert_tp", space.expert_tp);
  numbers("zero", space.zero);
  numbers("micro_batch", space.micro_batch);
  list("schedule", space.schedules, [](ScheduleKind kind) { return name_of(kind); });
  numbers("virtual_stages", space.virtual_stages);
  numbers("lighter_last", space.lighter_last);
  list("precision", space.precisions, [](const Precision& p) { return name_of(p.kind); });
  list("recompute", space.recomputes, [](const Recompute& r) {
    return fmt::format("norms {} mla_up_projection {} activation {} attention_core {} full {}",
                       r.norms, r.mla_up_projection, r.activation, r.attention_core, r.full);
  });
  numbers("communication_sms", space.communication_sms);
  return text;
}

std::string fingerprint_of(const StoreQuestion& question) {
  Hash hash;
  for (const auto& [part, text] : question.parts) {
    hash.mix(part);
    hash.mix(text);
  }
  return hash.text();
}

struct Store::Open {
  Database db;
  std::int64_t session = 0;
  std::optional<Statement> select[2];
  std::optional<Statement> insert[2];

  explicit Open(Database database) : db(std::move(database)) {}

  void create(const StoreQuestion& question) {
    // All of it or nothing, identity included: who is killed here leaves an empty file.
    Transaction transaction(db, "BEGIN EXCLUSIVE", "create");
    db.execute(
        fmt::format("PRAGMA application_id = {}; PRAGMA user_version = {};", kApplication, kFormat)
            .c_str(),
        "create");
    db.execute(kTables, "create");
    for (const Fidelity fidelity : kFidelities) {
      db.execute(fmt::format(kTable, table_of(fidelity)).c_str(), "create");
    }
    Statement add(db, "INSERT INTO question VALUES (?, ?)", "create");
    for (const auto& [part, text] : question.parts) add.bind(0, part).bind(1, text).run();
    transaction.commit();
  }

  void empty() {
    Transaction transaction(db, "BEGIN EXCLUSIVE", "start over in");
    std::vector<std::string> tables;
    {
      Statement list(db, "SELECT name FROM sqlite_master WHERE type = 'table'", "start over in");
      while (list.next()) tables.push_back(list.text(0));
    }
    for (const std::string& table : tables) {
      db.execute(fmt::format("DROP TABLE \"{}\"", table).c_str(), "start over in");
    }
    db.execute("PRAGMA application_id = 0", "start over in");
    transaction.commit();
  }

  void check_question(const StoreQuestion& question) {
    const std::int64_t format = db.integer("PRAGMA user_version", "read");
    if (format != kFormat) {
      refuse(db.path(),
             fmt::format("a store of format {}, and this program knows {}", format, kFormat),
             kStartOver);
    }
    Statement find(db, "SELECT text FROM question WHERE part = ?", "read");
    for (const auto& [part, text] : question.parts) {
      const std::string stored = find.bind(0, part).next() ? find.text(0) : "";
      find.reset();
      if (stored != text) {
        refuse(db.path(),
               fmt::format("this store is of another {}: {}", part, difference(stored, text)),
               kStartOver);
      }
    }
  }

  /// Pages, and that rows are in order: what a disk or another program may have done to it.
  void check_whole() {
    Statement check(db, "PRAGMA quick_check(1)", "read");
    const std::string result = check.next() ? check.text(0) : "no answer";
    check.reset();
    if (result != "ok") {
      throw SqliteError(fmt::format("cannot read {}: {}", db.path(), result), SQLITE_CORRUPT);
    }
  }

  void begin(const StoreSession& by, const std::string& program) {
    // A killed process loses nothing that was committed, since the system has it; FULL also waits
    // at each commit until it is on the disk, so a power cut loses nothing either. That costs some
    // ten milliseconds a batch of results, and batches are as large as what comes in a fifth of a
    // second. A write-ahead log needs one such wait a commit where a rollback journal needs three.
    db.integer("PRAGMA journal_mode = WAL", "write");
    db.execute("PRAGMA synchronous = FULL", "write");
    Transaction transaction(db, "BEGIN EXCLUSIVE", "write");
    Statement add(db,
                  "INSERT INTO session (begun, program, command, space, host, ranks) "
                  "VALUES (?, ?, ?, ?, ?, ?)",
                  "write");
    const std::string begun = now_utc();
    const std::string host = host_name();
    add.bind(0, begun).bind(1, program).bind(2, by.command).bind(3, by.space).bind(4, host);
    add.bind(5, std::int64_t{by.ranks}).run();
    session = sqlite3_last_insert_rowid(db.handle());
    transaction.commit();
    for (std::size_t i = 0; i < kFidelities.size(); ++i) {
      const char* table = table_of(kFidelities[i]);
      select[i].emplace(db, fmt::format(kFind, table).c_str(), "read");
      insert[i].emplace(db, fmt::format(kAdd, table).c_str(), "write");
    }
  }

  void add(const StoredEvaluation& row, Fidelity fidelity) {
    Statement& to = *insert[static_cast<std::size_t>(fidelity)];
    Evaluation e = row.evaluation;
    to.bind(0, row.key).bind(1, std::int64_t{e.fits}).bind(2, e.memory_peak_bytes);
    int parameter = 3;
    for (double* time : times_of(e)) {
      // SQLite has no NaN.
      ORRERY_CHECK(!std::isnan(*time), "{} of {}", *time, row.key);
      to.bind(parameter++, *time);
    }
    to.bind(parameter, session).run();
  }
};

namespace {

[[noreturn]] void explain(const SqliteError& error, const std::string& path) {
  switch (error.code()) {
    case SQLITE_NOTADB:
      refuse(path, "this is no store of orrery search (and no SQLite database)",
             "name another --store");
    case SQLITE_CORRUPT:
      throw SqliteError(fmt::format("{}: the store is damaged; --fresh starts over", error.what()),
                        error.code());
    case SQLITE_BUSY:
    case SQLITE_LOCKED:
      throw SqliteError(
          fmt::format("{} is in use by another search, or another program has it open", path),
          error.code());
    default:
      throw error;
  }
}

}  // namespace

Store::Store(const std::string& path, const StoreQuestion& question, const StoreSession& session,
             bool fresh) {
  ORRERY_CHECK(!question.parts.empty(), "a question without a program");
  const std::string file = path.empty() ? ":memory:" : path;
  if (!path.empty() && fs::exists(path) && !fs::is_regular_file(path)) {
    throw std::runtime_error(fmt::format("cannot open {}: it is no regular file", path));
  }
  const auto open = [&] {
    open_ = std::make_unique<Open>(open_database(file));
    if (!is_new(open_->db) && fresh) open_->empty();
    if (is_new(open_->db)) {
      open_->create(question);
    } else {
      open_->check_question(question);
      open_->check_whole();
    }
    open_->begin(session, question.parts.front().second);
  };
  try {
    try {
      open();
    } catch (const SqliteError& error) {
      open_.reset();
      const bool damaged = error.code() == SQLITE_CORRUPT || error.code() == SQLITE_NOTADB;
      if (!fresh || !damaged || !says_that_it_is_a_store(path)) throw;
      remove_store(path);
      open();
    }
  } catch (const SqliteError& error) {
    explain(error, file);
  }
}

Store::~Store() = default;

std::optional<Evaluation> Store::find(const std::string& key, Fidelity fidelity) const {
  Statement& select = *open_->select[static_cast<std::size_t>(fidelity)];
  if (!select.bind(0, key).next()) return std::nullopt;
  Evaluation e;
  e.fits = select.integer(0) != 0;
  e.memory_peak_bytes = select.integer(1);
  int column = 2;
  for (double* time : times_of(e)) *time = select.number(column++);
  select.reset();
  return e;
}

std::size_t Store::size(Fidelity fidelity) const {
  return static_cast<std::size_t>(open_->db.integer(
      fmt::format("SELECT count(*) FROM {}", table_of(fidelity)).c_str(), "read"));
}

void Store::add(std::span<const StoredEvaluation> evaluations, Fidelity fidelity) {
  if (evaluations.empty()) return;
  try {
    Transaction transaction(open_->db, "BEGIN IMMEDIATE", "write");
    for (const StoredEvaluation& row : evaluations) open_->add(row, fidelity);
    transaction.commit();
  } catch (const SqliteError& error) {
    throw SqliteError(
        fmt::format("{}; what was stored before is kept, and the same command goes on "
                    "with it",
                    error.what()),
        error.code());
  }
}

}  // namespace orrery
