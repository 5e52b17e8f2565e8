// lockstep bench: how fast the collectives are on this machine. Each rank is a process of its own;
// rank 0 prints.
#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <optional>

#include "lockstep/base/deadline.h"
#include "lockstep/base/file.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/collective/group.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/append_file.h"
#include "lockstep/tools/collective_bench.h"
#include "lockstep/tools/commands.h"
#include "lockstep/tools/output_folder.h"
#include "lockstep/tools/training_bench.h"

namespace lockstep {
namespace {

constexpr int kMaxRanks = 64;
constexpr std::uint64_t kDefaultBatches = 50;
constexpr std::uint64_t kFewestWarmupCalls = 5;

struct BenchFlags {
  std::vector<std::string> operations{"all_reduce"}, sizes{"4", "1K", "16K", "1M", "26214400"};
  int ranks = 2;
  std::string dtype = "float32", reduction = "sum", json;
  bool arena = false;
  std::uint64_t iterations = 0, warmup = 0;  // 0: by size
};

// What the ranks run, resolved from the flags.
struct BenchPlan {
  std::vector<std::pair<const BenchOperation*, BenchCase>> cases;
  std::vector<BenchCase> copies;  // sizes of the yardstick
  BenchFlags flags;
};

void add_flags(CLI::App& app, BenchFlags& flags) {
  std::vector<std::string_view> names;
  for (const BenchOperation& operation : bench_operations()) names.push_back(operation.name);
  app.add_option("--operation", flags.operations, fmt::format("{}", fmt::join(names, ", ")))
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--ranks", flags.ranks, "processes")->capture_default_str();
  app.add_option("--sizes", flags.sizes, "bytes; K, M and G are powers of 1024")
      ->delimiter(',')
      ->capture_default_str();
  app.add_option("--dtype", flags.dtype, "element type")->capture_default_str();
  app.add_option("--reduction", flags.reduction, "sum, mean, min, max or product")
      ->capture_default_str();
  app.add_flag("--arena", flags.arena, "in the group's own memory, in place");
  app.add_option("--iterations", flags.iterations, "timed calls a size; 0: by size")
      ->capture_default_str();
  app.add_option("--warmup", flags.warmup, "calls before them; 0: by size")->capture_default_str();
  app.add_option("--json", flags.json, "a file for one JSON object a line");
}

Reduction reduction_of(const std::string& name) {
  for (const Reduction reduction :
       {Reduction::sum, Reduction::mean, Reduction::min, Reduction::max, Reduction::product})
    if (name_of(reduction) == name) return reduction;
  throw ConfigError(fmt::format("--reduction {}: no such reduction", name),
                    "sum, mean, min, max or product");
}

BenchPlan resolve(const BenchFlags& flags) {
  if (flags.ranks < 1 || flags.ranks > kMaxRanks)
    throw ConfigError(
        fmt::format("--ranks {} is not a number from 1 to {}", flags.ranks, kMaxRanks));
  const auto dtype = dtype_from_name(flags.dtype);
  if (!dtype)
    throw ConfigError(fmt::format("--dtype {}: no such dtype", flags.dtype),
                      "float64, float32, float16, bfloat16, int8, int32, int64 or uint8");
  const Reduction reduction = reduction_of(flags.reduction);
  BenchPlan plan{.cases = {}, .copies = {}, .flags = flags};
  for (const std::string& name : flags.operations) {
    const BenchOperation& operation = bench_operation(name);
    for (const std::string& size : flags.sizes) {
      plan.cases.emplace_back(
          &operation, bench_case(operation, *dtype, reduction, flags.ranks, parse_size(size)));
      if (operation.output == Extent::none) break;
      const BenchCase& c = plan.cases.back().second;
      if (std::ranges::find(plan.copies, c.count, &BenchCase::count) == plan.copies.end())
        plan.copies.push_back(c);
    }
  }
  if (!flags.json.empty()) check_writable_place(flags.json, "--json");
  return plan;
}

// --- One rank ---

class BenchRank {
 public:
  BenchRank(const BenchPlan& plan, std::shared_ptr<Segment> segment, int rank, AppendFile* json)
      : plan_(plan), group_(make_shm_group(std::move(segment), rank)), json_(json) {
    std::size_t input = 0, output = 0;
    for (const auto& [operation, c] : plan.cases) {
      input = std::max(input, bytes_of(operation->input, c));
      output = std::max(output, bytes_of(operation->output, c));
    }
    for (const BenchCase& c : plan.copies)
      input = output = std::max<std::size_t>({input, output, c.bytes()});
    input_ = allocate(input, "the bench's input");
    output_ = allocate(output, "the bench's output");
  }

  void run() {
    for (const auto& [operation, c] : plan_.cases) run_case(*operation, c);
    for (const BenchCase& c : plan_.copies)
      for (const int ranks : {1, group_->size()}) {
        copy(c, ranks);
        if (group_->size() == 1) break;
      }
  }

 private:
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) {
    constexpr std::size_t kAlignment = 64;
    if (plan_.flags.arena) return group_->allocate(bytes, what);
    auto& memory = ordinary_.emplace_back(bytes + kAlignment);
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return std::span(memory).subspan((kAlignment - address % kAlignment) % kAlignment, bytes);
  }

  void run_case(const BenchOperation& operation, BenchCase c) {
    c.rank = group_->rank();
    const auto input = input_.first(bytes_of(operation.input, c));
    const auto output = output_.first(bytes_of(operation.output, c));
    const auto call = [&] { operation.call(*group_, c, input, output); };
    // Zeros: a sum of sums would end in infinities.
    std::fill(input.begin(), input.end(), std::byte{});
    std::fill(output.begin(), output.end(), std::byte{});
    BenchResult result = measure(operation.name, c, group_->size(), call);
    result.bus_factor = operation.bus_factor(c.ranks);
    if (operation.output != Extent::none) {
      fill(operation.input == Extent::none ? output : input, c.dtype, c.rank);
      call();
      check(operation, c, output);
    }
    group_->barrier();  // all have checked
    show(result);
  }

  // The yardstick: each of the first `ranks` ranks copies memory of its own.
  void copy(const BenchCase& c, int ranks) {
    const auto from = input_.first(c.bytes());
    const auto to = output_.first(c.bytes());
    show(measure("memcpy", c, ranks, [&] {
      std::memcpy(to.data(), from.data(), from.size());
      asm volatile("" ::: "memory");  // every copy counts, even of the same bytes
    }));
  }

  // call() on the first `ranks` ranks.
  template <typename Call>
  BenchResult measure(std::string_view operation, const BenchCase& c, int ranks, Call&& call) {
    const BenchFlags& flags = plan_.flags;
    const bool takes_part = group_->rank() < ranks;
    std::uint64_t batch = calls_in_batch(c.bytes());
    if (flags.iterations != 0) batch = std::min(batch, flags.iterations);
    const std::uint64_t batches =
        flags.iterations == 0 ? kDefaultBatches : (flags.iterations + batch - 1) / batch;
    const std::uint64_t warmup =
        flags.warmup != 0 ? flags.warmup : std::max(batch, kFewestWarmupCalls);
    if (takes_part)
      for (std::uint64_t i = 0; i < warmup; ++i) call();
    const std::uint64_t moved_before = group_->statistics().moved;
    std::vector<double> us(batches);
    for (double& mean : us) {
      group_->barrier();
      const auto start = Clock::now();
      if (takes_part)
        for (std::uint64_t i = 0; i < batch; ++i) call();
      mean = takes_part ? seconds(Clock::now() - start) * 1e6 / static_cast<double>(batch) : 0;
    }
    double moved = static_cast<double>(group_->statistics().moved - moved_before) /
                   static_cast<double>(batch * batches);
    group_->all_reduce(std::as_writable_bytes(std::span(&moved, 1)), Dtype::float64,
                       Reduction::sum);
    // A batch takes as long as on the slowest rank.
    group_->all_reduce(std::as_writable_bytes(std::span(us)), Dtype::float64, Reduction::max);
    BenchResult result{.operation = std::string(operation),
                       .ranks = ranks,
                       .bytes = c.bytes(),
                       .count = c.count,
                       .dtype = c.dtype,
                       .arena = flags.arena,
                       .us = summarize(std::move(us)),
                       .iterations = batch * batches};
    // Elsewhere copies to and from the staging buffer, which are not counted, come on top.
    if (flags.arena) result.moved_bytes = moved;
    return result;
  }

  void show(const BenchResult& result) {
    if (group_->rank() != 0) return;
    print(table_row(result));
    console().flush(Deadline::never());  // this is a forked rank, which ends without exit()
    if (json_ != nullptr) json_->append(as_byte_span(json_line(result)));
  }

  const BenchPlan& plan_;
  std::unique_ptr<Group> group_;
  AppendFile* const json_;
  std::vector<std::vector<std::byte>> ordinary_;
  std::span<std::byte> input_, output_;
};

// --- All ranks ---

// Forked ranks; they end with this process.
class Ranks {
 public:
  Ranks() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) throw Error("no pipe: " + errno_text(errno));
    reader_ = UniqueFd(ends[0]);
    writer_ = UniqueFd(ends[1]);
  }

  template <typename Body>
  void start(int rank, Body&& body) {
    const pid_t parent = ::getpid();
    const pid_t pid = ::fork();
    if (pid < 0) throw Error(fmt::format("cannot start rank {}: {}", rank, errno_text(errno)));
    if (pid == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      if (::getppid() != parent) ::_exit(kExitFailedRun);
      try {
        body();
      } catch (const std::exception& error) {
        write_all(writer_.get(), as_byte_span(error.what()));
        ::_exit(kExitFailedRun);
      }
      ::_exit(0);
    }
    pids_.push_back(pid);
  }

  // Returns when all have ended well. Throws Error naming the first that did not.
  void wait() {
    for (std::size_t left = pids_.size(); left > 0;) {
      int status = 0;
      const pid_t pid = ::waitpid(-1, &status, 0);
      const auto ended = std::ranges::find(pids_, pid);
      if (ended == pids_.end()) continue;
      --left;
      const auto rank = ended - pids_.begin();
      if (WIFSIGNALED(status))
        throw Error(fmt::format("rank {} (pid {}) was killed by {}", rank, pid,
                                signal_name(WTERMSIG(status))));
      if (status != 0) throw Error(fmt::format("rank {}: {}", rank, message()));
    }
  }

 private:
  std::string message() {
    writer_ = UniqueFd();
    std::array<char, 4096> text;
    const auto size = ::read(reader_.get(), text.data(), text.size());
    return size > 0 ? std::string(text.data(), size) : "ended without a message";
  }

  UniqueFd reader_, writer_;
  std::vector<pid_t> pids_;
};

int bench_collective(const std::vector<std::string>& arguments) {
  CLI::App app(
      "Times a collective over shared memory between processes of this machine. Times are of\n"
      "one call, the slowest rank's; bandwidths in GB/s (10^9 bytes) are nccl-tests'. The memcpy\n"
      "lines are what the machine can do: one rank alone, and all at once.",
      "lockstep bench collective");
  BenchFlags flags;
  add_flags(app, flags);
  if (!parse_arguments(app, arguments)) return 0;
  const BenchPlan plan = resolve(flags);
  std::optional<AppendFile> json;
  if (!flags.json.empty()) json.emplace(flags.json);
  const auto segment = Segment::create({.seats = flags.ranks});
  print(table_heading());
  console().flush(Deadline::never());  // before the ranks inherit it
  Ranks ranks;
  for (int rank = 0; rank < flags.ranks; ++rank)
    ranks.start(rank, [&] {
      // A mapping of its own, as a worker's.
      auto own = Segment::attach(UniqueFd(::dup(segment->fd())));
      BenchRank(plan, std::move(own), rank, json ? &*json : nullptr).run();
    });
  ranks.wait();
  return 0;
}

}  // namespace

int bench_command(const std::vector<std::string>& arguments, const Start&) {
  if (arguments.empty() || arguments[0] == "--help" || arguments[0] == "-h") {
    print(
        "lockstep bench collective: times collectives between processes of this machine\n"
        "lockstep bench training: times training steps of one of five works\n");
    return 0;
  }
  if (arguments[0] == "training") return bench_training({arguments.begin() + 1, arguments.end()});
  if (arguments[0] != "collective")
    throw ConfigError(fmt::format("nothing to measure called {}", arguments[0]),
                      "lockstep bench collective, or lockstep bench training");
  return bench_collective({arguments.begin() + 1, arguments.end()});
}

}  // namespace lockstep
