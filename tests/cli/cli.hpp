#pragma once
// The program as a child of a test.

#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>
#include <vector>

namespace orrery {

namespace fs = std::filesystem;

struct Result {
  int status = 0;  ///< exit status, or -signal
  std::string out;
  std::string err;
};

/// Runs the program, with a folder of its own for files.
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
  Result orrery(const std::vector<std::string>& args, int out = -1) const {
    return wait_for(start(args, out));
  }

  /// A child that runs the program.
  pid_t start(std::vector<std::string> args, int out = -1) const {
    args.insert(args.begin(), ORRERY_BINARY);
    std::vector<char*> argv;
    for (std::string& arg : args) argv.push_back(arg.data());
    argv.push_back(nullptr);
    std::string path_set = "PATH=/usr/bin";
    std::string no_nccl = "ORRERY_NCCL_LIBRARY=/nowhere/libnccl.so.2";  // whatever is installed
    char* environment[] = {path_set.data(), no_nccl.data(), nullptr};
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
    return child;
  }

  Result wait_for(pid_t child) const {
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

inline bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

}  // namespace orrery
