// lockstep's side of ../nodes.py: the ranks of one node, each a process, which make the groups that
// a worker makes (shared memory below, an engine above) and time collectives as the peers do:
// batches of calls after a barrier, a batch as long as on the slowest rank, the median over
// batches. float32.
//
//   group NODE NODES RANKS ENGINE FOLDER MEMORY OPERATION:BYTES:BATCH:BATCHES …
//
// RANKS: of each node. FOLDER: empty, of all nodes: they find each other there. MEMORY: arena (the
// group's own) or ordinary. The first rank prints a JSON line for each.
#include <fmt/format.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <thread>

#include "lockstep/base/file.h"
#include "lockstep/collective/group.h"
#include "lockstep/memory/segment.h"
#include "lockstep/tools/collective_bench.h"
#include "lockstep/transport/transport.h"

namespace lockstep {
namespace {

struct Arguments {
  int node = 0, nodes = 1, ranks = 1;
  Engine engine = Engine::ucx;
  std::filesystem::path folder;
  bool arena = true;
  std::vector<std::string> cases;
};

std::string address_of(const std::filesystem::path& folder, int rank) {
  const auto path = folder / std::to_string(rank);
  for (const Deadline deadline = Deadline::after(std::chrono::seconds(30));;) {
    if (std::filesystem::exists(path)) return read_text_file(path);
    if (deadline.expired()) throw Error(fmt::format("rank {} did not come", rank));
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

std::shared_ptr<Group> make_group(const Arguments& arguments, int local_rank,
                                  std::shared_ptr<Segment> segment, Endpoint& endpoint) {
  const GroupOptions options{.timeout = std::chrono::minutes(2)};
  NodeGroups groups;
  groups.local_sizes.assign(arguments.nodes, arguments.ranks);
  groups.node = arguments.node;
  groups.local = arguments.ranks == 1 ? make_solo_group(options)
                                      : make_shm_group(std::move(segment), local_rank, options);
  std::vector<std::string> addresses;
  const int rank = arguments.node * arguments.ranks + local_rank;
  write_file_atomically(arguments.folder / std::to_string(rank), endpoint.address());
  for (int node = 0; node < arguments.nodes; ++node)
    addresses.push_back(address_of(arguments.folder, node * arguments.ranks + local_rank));
  groups.carriers =
      make_remote_group(endpoint.connect(addresses, arguments.node,
                                         {.deadline = Deadline::after(std::chrono::seconds(30))}),
                        options);
  return make_hierarchical_group(groups, options);
}

class Memory {
 public:
  Memory(Group& group, bool arena, std::size_t bytes) {
    constexpr std::size_t kAlignment = 64;
    if (!arena) own_.resize(bytes + kAlignment);
    const auto address = reinterpret_cast<std::uintptr_t>(own_.data());
    span_ = arena
                ? group.allocate(bytes, "the bench")
                : std::span(own_).subspan((kAlignment - address % kAlignment) % kAlignment, bytes);
  }
  std::span<std::byte> span() const { return span_; }

 private:
  std::vector<std::byte> own_;
  std::span<std::byte> span_;
};

void measure(Group& group, const std::string& spec, bool arena) {
  char name[32];
  unsigned long bytes = 0, batch = 0, batches = 0;
  if (std::sscanf(spec.c_str(), "%31[^:]:%lu:%lu:%lu", name, &bytes, &batch, &batches) != 4)
    throw ConfigError("no OPERATION:BYTES:BATCH:BATCHES: " + spec);
  const BenchOperation& operation = bench_operation(name);
  BenchCase c = bench_case(operation, Dtype::float32, Reduction::sum, group.size(), bytes);
  c.rank = group.rank();
  const Memory in(group, arena, bytes_of(operation.input, c));
  const Memory out(group, arena, bytes_of(operation.output, c));
  const auto call = [&] { operation.call(group, c, in.span(), out.span()); };
  for (unsigned long i = 0; i < std::max(batch, 5ul); ++i) call();
  std::vector<double> us(batches);
  for (double& mean : us) {
    group.barrier();
    const auto start = Clock::now();
    for (unsigned long i = 0; i < batch; ++i) call();
    mean = seconds(Clock::now() - start) * 1e6 / static_cast<double>(batch);
  }
  group.all_reduce(std::as_writable_bytes(std::span(us)), Dtype::float64, Reduction::max);
  if (operation.output != Extent::none) {
    fill(operation.input == Extent::none ? out.span() : in.span(), c.dtype, c.rank);
    call();
    check(operation, c, out.span());
  }
  group.barrier();  // all have checked
  if (group.rank() != 0) return;
  fmt::print("{}", json_line({.operation = name,
                              .ranks = group.size(),
                              .bytes = c.bytes(),
                              .count = c.count,
                              .arena = arena,
                              .us = summarize(std::move(us)),
                              .bus_factor = operation.bus_factor(c.ranks),
                              .iterations = batch * batches}));
  std::fflush(stdout);
}

int run_rank(const Arguments& arguments, int local_rank, std::shared_ptr<Segment> segment) {
  try {
    const auto endpoint = make_endpoint(arguments.engine, {.interface = "eth0"});
    const auto group = make_group(arguments, local_rank, std::move(segment), *endpoint);
    for (const std::string& spec : arguments.cases) measure(*group, spec, arguments.arena);
    return 0;
  } catch (const std::exception& error) {
    fmt::print(stderr, "node {}, local rank {}: {}\n", arguments.node, local_rank, error.what());
    return 1;
  }
}

// The ranks are forked; they end with this process, and it ends badly with the first that does.
int run_node(const Arguments& arguments) {
  const auto segment = arguments.ranks == 1 ? nullptr : Segment::create({.seats = arguments.ranks});
  for (int rank = 0; rank < arguments.ranks; ++rank) {
    const pid_t pid = ::fork();
    if (pid < 0) throw Error("no process for a rank");
    if (pid > 0) continue;
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    auto own = segment ? Segment::attach(UniqueFd(::dup(segment->fd()))) : nullptr;
    ::_exit(run_rank(arguments, rank, std::move(own)));
  }
  for (int status = 0; ::wait(&status) > 0;)
    if (status != 0) return 1;
  return 0;
}

}  // namespace
}  // namespace lockstep

int main(int argc, char** argv) {
  if (argc < 8) return 2;
  try {
    return lockstep::run_node({.node = std::atoi(argv[1]),
                               .nodes = std::atoi(argv[2]),
                               .ranks = std::atoi(argv[3]),
                               .engine = lockstep::engine_from(argv[4]),
                               .folder = argv[5],
                               .arena = std::string_view(argv[6]) == "arena",
                               .cases = {argv + 7, argv + argc}});
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
    return 1;
  }
}
