#include "reports/search/sqlite.hpp"

#include <fmt/format.h>

#include <cstring>
#include <utility>

namespace orrery {

Database::Database(std::string path) : path_(std::move(path)) {
  sqlite3* handle = nullptr;
  const int code =
      sqlite3_open_v2(path_.c_str(), &handle,
                      SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_NOMUTEX, nullptr);
  handle_.reset(handle);  // there is one even after most failures, to tell why
  if (code != SQLITE_OK) fail("open");
  sqlite3_extended_result_codes(handle, 1);
}

SqliteError Database::error(std::string_view doing) const {
  const int code = handle_ == nullptr ? SQLITE_NOMEM : sqlite3_extended_errcode(handle_.get());
  std::string why = handle_ == nullptr ? "out of memory" : sqlite3_errmsg(handle_.get());
  // What the system said is often clearer: "disk I/O error" may be a file that grew too large.
  const int system = handle_ == nullptr ? 0 : sqlite3_system_errno(handle_.get());
  const int kind = code & 0xFF;
  if (system != 0 && (kind == SQLITE_IOERR || kind == SQLITE_CANTOPEN || kind == SQLITE_FULL)) {
    why += fmt::format(" ({})", std::strerror(system));
  }
  return {fmt::format("cannot {} {}: {}", doing, path_, why), code};
}

void Database::execute(const char* sql, std::string_view doing) {
  if (sqlite3_exec(handle(), sql, nullptr, nullptr, nullptr) != SQLITE_OK) fail(doing);
}

std::int64_t Database::integer(const char* sql, std::string_view doing) {
  Statement statement(*this, sql, doing);
  return statement.next() ? statement.integer(0) : 0;
}

Statement::Statement(Database& database, const char* sql, std::string_view doing)
    : database_(&database), doing_(doing) {
  sqlite3_stmt* statement = nullptr;
  const int code = sqlite3_prepare_v2(database.handle(), sql, -1, &statement, nullptr);
  statement_.reset(statement);
  if (code != SQLITE_OK) database_->fail(doing_);
}

Statement& Statement::bind(int parameter, std::int64_t value) {
  if (sqlite3_bind_int64(statement_.get(), parameter + 1, value) != SQLITE_OK) {
    database_->fail(doing_);
  }
  return *this;
}

Statement& Statement::bind(int parameter, double value) {
  if (sqlite3_bind_double(statement_.get(), parameter + 1, value) != SQLITE_OK) {
    database_->fail(doing_);
  }
  return *this;
}

Statement& Statement::bind(int parameter, std::string_view text) {
  if (sqlite3_bind_text64(statement_.get(), parameter + 1, text.data(), text.size(), SQLITE_STATIC,
                          SQLITE_UTF8) != SQLITE_OK) {
    database_->fail(doing_);
  }
  return *this;
}

bool Statement::next() {
  const int code = sqlite3_step(statement_.get());
  if (code == SQLITE_ROW) return true;
  if (code == SQLITE_DONE) {
    reset();
    return false;
  }
  const SqliteError error = database_->error(doing_);
  reset();
  throw error;
}

void Statement::run() {
  while (next()) {
  }
}

void Statement::reset() {
  sqlite3_reset(statement_.get());
}

std::int64_t Statement::integer(int column) const {
  return sqlite3_column_int64(statement_.get(), column);
}

double Statement::number(int column) const {
  return sqlite3_column_double(statement_.get(), column);
}

std::string Statement::text(int column) const {
  const auto* bytes = sqlite3_column_text(statement_.get(), column);
  if (bytes == nullptr) return "";
  return {reinterpret_cast<const char*>(bytes),
          static_cast<std::size_t>(sqlite3_column_bytes(statement_.get(), column))};
}

Transaction::Transaction(Database& database, const char* begin, std::string_view doing)
    : database_(database), doing_(doing) {
  database_.execute(begin, doing_);
}

Transaction::~Transaction() {
  // A failed commit may have rolled back already; then this fails, which is fine.
  if (open_) sqlite3_exec(database_.handle(), "ROLLBACK", nullptr, nullptr, nullptr);
}

void Transaction::commit() {
  database_.execute("COMMIT", doing_);
  open_ = false;
}

}  // namespace orrery
