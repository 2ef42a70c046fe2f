#include "reports/search/hand_out.hpp"

#include <fmt/format.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <mutex>
#include <optional>
#include <set>
#include <thread>
#include <utility>

#include "sim/check.hpp"

namespace orrery {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

/// Tasks that a thread has waiting beside the one that it is at: enough to bridge the way to rank
/// 0.
constexpr std::size_t kTasksAhead = 1;
/// How long rank 0, or a worker, waits for a message while threads of its own may come to an end.
constexpr auto kLook = 2ms;

// ---- messages: a letter that says what it is, then

constexpr char kHello = 'h';   // worker: threads, question
constexpr char kTask = 't';    // rank 0: id, task
constexpr char kResult = 'r';  // worker: id, result
constexpr char kFailed = 'f';  // worker: id, why
/// The id of what is no task's.
constexpr std::uint64_t kNoTask = ~std::uint64_t{0};

std::string letter(char kind, std::uint64_t number, std::string_view text) {
  std::string bytes(1 + sizeof number, kind);
  std::memcpy(bytes.data() + 1, &number, sizeof number);
  return bytes.append(text);
}

struct Letter {
  char kind = 0;
  std::uint64_t number = 0;
  std::string text;
};

Letter open(const Message& message) {
  Letter result;
  ORRERY_CHECK(message.bytes.size() >= 1 + sizeof result.number, "{} bytes from rank {}",
               message.bytes.size(), message.from);
  result.kind = message.bytes[0];
  std::memcpy(&result.number, message.bytes.data() + 1, sizeof result.number);
  result.text = message.bytes.substr(1 + sizeof result.number);
  return result;
}

// ---- the threads of this process

struct Finished {
  std::uint64_t id = 0;
  std::string result;
  std::optional<std::string> error;
};

class Pool {
 public:
  Pool(Compute compute, int threads) : compute_(std::move(compute)) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
  }
  ~Pool() {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    changed_.notify_all();
    for (std::thread& thread : threads_) thread.join();
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  std::size_t threads() const { return threads_.size(); }

  void add(std::uint64_t id, std::string task) {
    {
      const std::lock_guard lock(mutex_);
      tasks_.emplace_back(id, std::move(task));
    }
    changed_.notify_one();
  }

  /// What threads have not begun is forgotten; returns when they are done with the rest.
  void drop() {
    std::unique_lock lock(mutex_);
    tasks_.clear();
    some_finished_.wait(lock, [&] { return busy_ == 0; });
  }

  bool idle() const {
    const std::lock_guard lock(mutex_);
    return tasks_.empty() && busy_ == 0 && finished_.empty();
  }

  /// What has come since; waits for something until `at_most` has passed.
  std::vector<Finished> take(Clock::duration at_most) {
    std::unique_lock lock(mutex_);
    some_finished_.wait_for(lock, at_most, [&] { return !finished_.empty(); });
    return std::exchange(finished_, {});
  }

 private:
  void work() {
    // TBB within a task would only get in the way of the other threads.
    tbb::task_arena alone(1);
    for (std::unique_lock lock(mutex_);;) {
      changed_.wait(lock, [&] { return stop_ || !tasks_.empty(); });
      if (stop_) return;
      const auto [id, task] = std::move(tasks_.front());
      tasks_.pop_front();
      ++busy_;
      lock.unlock();
      Finished finished{.id = id};
      try {
        alone.execute([&, &task = task] { finished.result = compute_(task); });
      } catch (const std::exception& error) {
        finished.error = error.what();
      }
      lock.lock();
      --busy_;
      finished_.push_back(std::move(finished));
      some_finished_.notify_one();
    }
  }

  Compute compute_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::condition_variable some_finished_;
  std::deque<std::pair<std::uint64_t, std::string>> tasks_;
  std::vector<Finished> finished_;
  int busy_ = 0;
  bool stop_ = false;
  std::vector<std::thread> threads_;
};

}  // namespace

int threads_of(const Peers* peers, int wanted) {
  if (wanted > 0) return wanted;
  const int machine = static_cast<int>(std::max(1U, std::thread::hardware_concurrency()));
  return std::max(1, machine / (peers == nullptr ? 1 : std::max(1, peers->ranks_here())));
}

// ---- rank 0

class HandOut::State {
 public:
  State(Peers* peers, std::string question, Compute compute, HandOutOptions options)
      : peers_(peers),
        question_(std::move(question)),
        options_(std::move(options)),
        workers_(static_cast<std::size_t>(peers == nullptr ? 1 : peers->ranks())),
        pool_(std::move(compute), threads_of(peers, options_.threads)) {
    workers_[0].threads = pool_.threads();
  }

  std::size_t threads() const {
    std::size_t sum = 0;
    for (const Worker& worker : workers_) sum += worker.threads;
    return sum;
  }

  void run(std::span<const std::string> tasks,
           const std::function<void(std::span<const TaskResult>)>& done) {
    // Ids go on from run to run, so that a straggler of a run that was given up is told apart.
    first_ = last_;
    last_ += tasks.size();
    tasks_ = tasks;
    is_done_.assign(tasks.size(), 0);
    left_ = tasks.size();
    arrived_.clear();
    waiting_.clear();
    for (std::size_t i = 0; i < tasks.size(); ++i) waiting_.push_back(i);
    for (Worker& worker : workers_) worker.at.clear();
    try {
      take_all(done);
    } catch (...) {
      // What tasks refer to is the caller's, and may not live on.
      pool_.drop();
      throw;
    }
  }

 private:
  struct Worker {
    std::size_t threads = 0;   ///< 0: not heard of yet, or lost
    std::set<std::size_t> at;  ///< tasks that it has been given
  };

  void take_all(const std::function<void(std::span<const TaskResult>)>& done) {
    auto called = Clock::now();
    while (left_ > 0) {
      hand_out();
      const auto until = called + options_.batch;
      const auto wait = std::max(Clock::duration(0), until - Clock::now());
      take_own(peers_ == nullptr ? wait : std::min<Clock::duration>(wait, kLook));
      if (peers_ != nullptr) hear();
      if (left_ == 0 || Clock::now() >= until) {
        done(std::exchange(arrived_, {}));
        called = Clock::now();
      }
    }
  }

  void hand_out() {
    for (std::size_t rank = 0; rank < workers_.size(); ++rank) {
      Worker& worker = workers_[rank];
      while (!waiting_.empty() && worker.at.size() < worker.threads * (1 + kTasksAhead)) {
        const std::size_t task = waiting_.front();
        waiting_.pop_front();
        worker.at.insert(task);
        if (rank == 0) {
          pool_.add(first_ + task, tasks_[task]);
        } else {
          peers_->send(static_cast<int>(rank), letter(kTask, first_ + task, tasks_[task]));
        }
      }
    }
  }

  void take_own(Clock::duration at_most) {
    for (Finished& finished : pool_.take(at_most)) {
      if (finished.id < first_) continue;
      if (finished.error) throw std::runtime_error(*finished.error);
      arrive(0, finished.id, std::move(finished.result));
    }
  }

  void hear() {
    while (const auto message = peers_->receive(0ms)) {
      if (message->kind == Message::Kind::sent) {
        understand(message->from, open(*message));
      } else {
        lose(message->from);
      }
    }
  }

  void understand(int from, Letter said) {
    switch (said.kind) {
      case kHello:
        if (said.text != question_) {
          throw std::runtime_error(
              fmt::format("rank {} has another input, or is another build of the program, than "
                          "rank 0: all ranks must see the same files",
                          from));
        }
        workers_[static_cast<std::size_t>(from)].threads = said.number;
        return;
      case kResult:
        if (said.number >= first_) arrive(from, said.number, std::move(said.text));
        return;
      case kFailed:
        if (said.number < first_) return;  // of a run that was given up
        throw std::runtime_error(fmt::format("rank {}: {}", from, said.text));
      default:
        ORRERY_CHECK(false, "letter {} from rank {}", static_cast<int>(said.kind), from);
    }
  }

  void arrive(int from, std::uint64_t id, std::string result) {
    const std::size_t task = id - first_;
    ORRERY_CHECK(task < tasks_.size(), "task {} of {} from rank {}", task, tasks_.size(), from);
    workers_[static_cast<std::size_t>(from)].at.erase(task);
    if (std::exchange(is_done_[task], 1) != 0) return;
    --left_;
    arrived_.push_back({.task = task, .result = std::move(result)});
  }

  /// Its tasks come first: they have waited longest.
  void lose(int rank) {
    Worker& worker = workers_[static_cast<std::size_t>(rank)];
    std::size_t again = 0;
    for (auto it = worker.at.rbegin(); it != worker.at.rend(); ++it) {
      if (is_done_[*it] != 0) continue;
      waiting_.push_front(*it);
      ++again;
    }
    worker = {};
    if (options_.note) {
      options_.note(fmt::format("rank {} is lost; what it was at ({} task{}) is handed out again",
                                rank, again, again == 1 ? "" : "s"));
    }
  }

  Peers* peers_;
  const std::string question_;
  const HandOutOptions options_;
  std::vector<Worker> workers_;
  Pool pool_;

  // of the current run
  std::uint64_t first_ = 0;
  std::uint64_t last_ = 0;
  std::span<const std::string> tasks_;
  std::deque<std::size_t> waiting_;
  std::vector<char> is_done_;
  std::size_t left_ = 0;
  std::vector<TaskResult> arrived_;
};

HandOut::HandOut(Peers* peers, std::string question, Compute compute, HandOutOptions options)
    : state_(std::make_unique<State>(peers, std::move(question), std::move(compute),
                                     std::move(options))) {}
HandOut::~HandOut() = default;

void HandOut::run(std::span<const std::string> tasks,
                  const std::function<void(std::span<const TaskResult>)>& done) {
  state_->run(tasks, done);
}

int HandOut::threads() const {
  return static_cast<int>(state_->threads());
}

// ---- the others

void serve(Peers& peers, const std::function<Prepared()>& prepare, HandOutOptions options) {
  std::optional<Pool> pool;
  try {
    Prepared prepared = prepare();
    const int threads = threads_of(&peers, options.threads);
    pool.emplace(std::move(prepared.compute), threads);
    peers.send(0, letter(kHello, static_cast<std::uint64_t>(threads), prepared.question));
  } catch (const std::exception& error) {
    peers.send(0, letter(kFailed, kNoTask, error.what()));
  }
  for (;;) {
    const bool idle = !pool || pool->idle();
    while (const auto message = peers.receive(idle ? 100ms : 0ms)) {
      if (message->kind == Message::Kind::left) return;
      if (message->kind == Message::Kind::lost) {
        throw std::runtime_error(fmt::format("rank {}: rank 0 is lost", peers.rank()));
      }
      Letter said = open(*message);
      ORRERY_CHECK(said.kind == kTask && pool, "letter {}", static_cast<int>(said.kind));
      pool->add(said.number, std::move(said.text));
      if (idle) break;
    }
    if (!pool || pool->idle()) continue;
    for (Finished& finished : pool->take(kLook)) {
      peers.send(0, finished.error ? letter(kFailed, finished.id, *finished.error)
                                   : letter(kResult, finished.id, finished.result));
    }
  }
}

}  // namespace orrery
