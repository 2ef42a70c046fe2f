#pragma once
// As much of SQLite's C interface as stores need, with exceptions. Only .cpp files of this folder
// include it.

#include <sqlite3.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>

namespace orrery {

/// What SQLite, or the system below it, says no to.
class SqliteError : public std::runtime_error {
 public:
  SqliteError(const std::string& what, int code) : std::runtime_error(what), code_(code) {}
  /// SQLITE_FULL, SQLITE_BUSY, ...: without the details of extended codes.
  int code() const { return code_ & 0xFF; }

 private:
  int code_;
};

class Database {
 public:
  /// Opens or creates the file; ":memory:" is none. Throws SqliteError, as everything here does,
  /// with the path, what was being done and why it failed.
  explicit Database(std::string path);

  /// Statements without results, one or several.
  void execute(const char* sql, std::string_view doing);
  /// The first column of the first row, 0 without one.
  std::int64_t integer(const char* sql, std::string_view doing);

  const std::string& path() const { return path_; }
  sqlite3* handle() const { return handle_.get(); }
  /// What went wrong last.
  SqliteError error(std::string_view doing) const;
  [[noreturn]] void fail(std::string_view doing) const { throw error(doing); }

 private:
  struct Close {
    void operator()(sqlite3* handle) const { sqlite3_close_v2(handle); }
  };
  std::string path_;
  std::unique_ptr<sqlite3, Close> handle_;
};

/// A prepared statement; outlived by its database. Columns and parameters count from 0.
class Statement {
 public:
  Statement(Database& database, const char* sql, std::string_view doing);

  Statement& bind(int parameter, std::int64_t value);
  Statement& bind(int parameter, double value);
  /// The text must stay as it is until the statement is reset or bound anew.
  Statement& bind(int parameter, std::string_view text);

  /// True with the next row, false at the end; then, and after a failure, it can be bound and run
  /// again.
  bool next();
  /// Runs a statement without rows.
  void run();
  void reset();

  std::int64_t integer(int column) const;
  double number(int column) const;
  std::string text(int column) const;

 private:
  struct Finalize {
    void operator()(sqlite3_stmt* statement) const { sqlite3_finalize(statement); }
  };
  Database* database_;
  std::string doing_;
  std::unique_ptr<sqlite3_stmt, Finalize> statement_;
};

/// Rolled back unless committed.
class Transaction {
 public:
  /// `begin`: "BEGIN IMMEDIATE", ...
  Transaction(Database& database, const char* begin, std::string_view doing);
  ~Transaction();
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  void commit();

 private:
  Database& database_;
  std::string doing_;
  bool open_ = true;
};

}  // namespace orrery
