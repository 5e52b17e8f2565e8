// For tests alone: what the conformance suites run against, and with. A new backend is one more
// line in backends().
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "lockstep/collective/naive_test.h"
#include "lockstep/collective/ranks_test.h"
#include "lockstep/transport/nodes_test.h"

namespace lockstep {

using Body = std::function<void(Group&)>;

struct Backend {
  std::string name;
  std::vector<int> sizes;
  // Calls body as every rank of a group of that size.
  std::function<void(int size, const Body& body)> run;
};
inline void PrintTo(const Backend& backend, std::ostream* out) { *out << backend.name; }

inline void run_solo(int, const Body& body) { body(*make_solo_group({.timeout = kTestTimeout})); }

inline void run_shm_threads(int size, const Body& body) {
  auto segment = make_segment(size);
  run_threads(size,
              [&](int rank) { body(*make_shm_group(segment, rank, {.timeout = kTestTimeout})); });
}

inline void run_shm_processes(int size, const Body& body) {
  Processes processes(make_segment(size));
  for (int rank = 0; rank < size; ++rank)
    processes.start(rank, [&body, rank](const auto& segment, const auto&) {
      body(*make_shm_group(segment, rank, {.timeout = kTestTimeout}));
    });
  for (int rank = 0; rank < size; ++rank)
    EXPECT_EQ(processes.join(rank), 0) << "rank " << rank << " of " << size;
}

// One transport a rank, of ranks that are threads.
class LoopbackNodes {
 public:
  explicit LoopbackNodes(int nodes) {
    const auto hub = make_loopback_hub();
    for (int node = 0; node < nodes; ++node) {
      endpoints_.push_back(make_loopback_endpoint(hub));
      addresses_.push_back(endpoints_.back()->address());
    }
  }
  std::unique_ptr<Transport> connect(int node, std::uint64_t generation = 0) const {
    return endpoints_[node]->connect(addresses_, node, {.generation = generation});
  }

 private:
  std::vector<std::unique_ptr<Endpoint>> endpoints_;
  std::vector<std::string> addresses_;
};

inline void run_remote_threads(int size, const Body& body) {
  const LoopbackNodes nodes(size);
  run_threads(size, [&](int rank) {
    body(*make_remote_group(nodes.connect(rank), {.timeout = kTestTimeout}));
  });
}

// Ranks that are threads, as many on each node as local_sizes says: segments for the nodes, one
// transport for carriers of each number and one for all.
inline void run_nodes(const std::vector<int>& local_sizes,
                      const std::function<void(const NodeGroups&)>& body) {
  const auto nodes = static_cast<int>(local_sizes.size());
  std::vector<std::shared_ptr<Segment>> segments;
  std::vector<std::pair<int, int>> places;  // node, local rank
  for (int node = 0; node < nodes; ++node) {
    segments.push_back(make_segment(local_sizes[node]));
    for (int local = 0; local < local_sizes[node]; ++local) places.emplace_back(node, local);
  }
  const auto size = static_cast<int>(places.size());
  const LoopbackNodes everyone(size);
  std::vector<LoopbackNodes> carriers;
  for (int local = 0; local < *std::ranges::min_element(local_sizes); ++local)
    carriers.emplace_back(nodes);
  run_threads(size, [&](int rank) {
    const auto [node, local] = places[rank];
    const GroupOptions options{.timeout = kTestTimeout};
    NodeGroups groups{.local = make_shm_group(segments[node], local, options),
                      .carriers = nullptr,
                      .local_sizes = local_sizes,
                      .node = node};
    if (local < static_cast<int>(carriers.size()))
      groups.carriers = make_remote_group(carriers[local].connect(node), options);
    groups.everyone = make_remote_group(everyone.connect(rank), options);
    body(groups);
  });
}

inline std::function<void(int, const Body&)> run_hierarchical(
    const std::vector<std::vector<int>>& shapes) {
  return [shapes](int size, const Body& body) {
    for (const std::vector<int>& shape : shapes)
      if (std::accumulate(shape.begin(), shape.end(), 0) == size)
        run_nodes(shape, [&](const NodeGroups& groups) {
          body(*make_hierarchical_group(groups, {.timeout = kTestTimeout}));
        });
  };
}

// Over the nodes that this process is one of: a remote group of the first ones where they have a
// rank each, else a hierarchical one, made as a worker makes it.
inline void run_test_nodes(int size, const Body& body) {
  static std::uint64_t generation = 0;  // of the transports, in step on all nodes
  const TestNode& here = *test_node();
  const bool is_remote = std::ranges::count(here.local_sizes, 1) == std::ssize(here.local_sizes);
  if (size > here.size() || (!is_remote && size < here.size())) return;
  const auto segment = make_segment(here.local_sizes[here.node]);
  ++generation;
  here.run(size, [&](int rank) {
    const GroupOptions options{.timeout = kTestTimeout, .key = "secret"};
    std::shared_ptr<Group> everyone =
        make_remote_group(here.connect(rank, size, generation), options);
    if (is_remote) return body(*everyone);
    const int local_rank = rank - here.first;
    const bool carries = local_rank < *std::ranges::min_element(here.local_sizes);
    body(*make_hierarchical_group({.local = make_shm_group(segment, local_rank, options),
                                   .carriers = everyone->split(carries ? local_rank : -1, rank),
                                   .local_sizes = here.local_sizes,
                                   .node = here.node,
                                   .everyone = everyone},
                                  options));
  });
}

// The processes that mpirun has started, of which the first `size` take part.
inline void run_mpi(int size, const Body& body, const GroupOptions& options = {}) {
  static std::uint64_t generation = 0;
  static const auto endpoint = make_endpoint(Engine::mpi, {});
  std::vector<std::string> addresses = exchange_by_mpi(endpoint->address());
  const auto rank =
      static_cast<int>(std::ranges::find(addresses, endpoint->address()) - addresses.begin());
  ASSERT_GE(std::ssize(addresses), size) << "mpirun -np";
  addresses.resize(size);
  ++generation;
  try {
    if (rank < size)
      body(*make_remote_group(endpoint->connect(addresses, rank, {.generation = generation}),
                              options));
  } catch (const std::exception& error) {
    ADD_FAILURE() << "rank " << rank << ": " << error.what();
  }
  exchange_by_mpi("");
}

inline std::vector<Backend> backends() {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") != nullptr)
    return {{"Mpi", {2, 3}, [](int size, const Body& body) { run_mpi(size, body); }}};
  if (const TestNode* here = test_node()) {
    std::vector<int> sizes = {here->size()};
    if (here->local_sizes == std::vector(4, 1)) sizes.insert(sizes.begin(), 3);
    return {{"Nodes", sizes, run_test_nodes}};
  }
  std::vector<Backend> all = {
      {"Solo", {1}, run_solo},
      {"ShmThreads", {1, 2, 3, 4, 5, 6, 7, 8}, run_shm_threads},
      {"RemoteThreads", {1, 2, 3, 5}, run_remote_threads},
      {"HierarchicalThreads", {2, 4}, run_hierarchical({{1, 1}, {2, 2}})},
      {"UnevenNodesThreads", {1, 3, 5}, run_hierarchical({{1}, {2, 1}, {2, 1, 2}})}};
  if (!kThreadSanitizer) all.push_back({"ShmProcesses", {2, 3, 8}, run_shm_processes});
  return all;
}

enum class Memory { arena, ordinary, mixed };
inline constexpr Reduction kReductions[] = {Reduction::sum, Reduction::mean, Reduction::min,
                                            Reduction::max, Reduction::product};
inline constexpr std::size_t kSizes[] = {0, 1, 1037, 4099};
// More than two staging buffers (one where it takes long), and not a multiple of anything; and how
// many ranks.
inline constexpr std::size_t kLargeBytes = ((kThreadSanitizer ? 5 : 9) << 20) + 4;
inline const std::vector<int> kLargeSizes =
    kThreadSanitizer ? std::vector<int>{3} : std::vector<int>{1, 2, 3};

// Memory of the kind asked for; for mixed, even ranks have arena memory.
class Buffer {
 public:
  Buffer(Group& group, Memory memory, std::size_t bytes) {
    if (memory == Memory::arena || (memory == Memory::mixed && group.rank() % 2 == 0)) {
      bytes_ = group.allocate(bytes, "a test's buffer");
    } else {
      own_.resize(bytes);
      bytes_ = own_;
    }
  }
  std::span<std::byte> bytes() const { return bytes_; }
  void set(const std::vector<std::byte>& from) {
    std::copy(from.begin(), from.end(), bytes_.begin());
  }
  std::vector<std::byte> get() const { return {bytes_.begin(), bytes_.end()}; }

 private:
  std::vector<std::byte> own_;
  std::span<std::byte> bytes_;
};

class ConformanceTest : public ::testing::TestWithParam<Backend> {
 protected:
  // body(group, dtype, zero of its type) for all sizes of group and dtypes.
  template <typename TypedBody>
  void for_all(TypedBody&& body) {
    for (const int size : GetParam().sizes)
      GetParam().run(size, [&](Group& group) {
        for (int i = 0; i < kDtypeCount; ++i) {
          const auto dtype = static_cast<Dtype>(i);
          SCOPED_TRACE("rank " + std::to_string(group.rank()) + " of " + std::to_string(size) +
                       ", " + std::string(name_of(dtype)));
          naive::with_type(dtype, [&](auto zero) { body(group, dtype, zero); });
        }
      });
  }
};

using Memories = std::vector<Memory>;
inline const Memories kMemories = {Memory::arena, Memory::ordinary, Memory::mixed};

}  // namespace lockstep
