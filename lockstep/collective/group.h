// A group: ranks that run collectives together. Synchronous; one thread at a time may call a group.
//
// Every call but send and recv is a collective: all ranks make the same calls in the same order.
// Before a result returns the ranks have compared a fingerprint (sequence number, operation, dtype,
// count, reduction, root): a mismatch is a CommError on every rank that quotes both calls. A
// deadline's CommError names the ranks that had not arrived, the operation each was last seen in,
// its tag and step, how long ago, and whether its process lives. After a CommError the group is
// over: further calls throw at once.
//
// Associations: reductions add in canonical order (canonical_tree.h with one virtual rank a rank),
// bit for bit the same on every rank and on every run. 16-bit types accumulate in fp32.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/base/dtype.h"
#include "lockstep/collective/canonical_tree.h"

namespace lockstep {

enum class Reduction : std::uint8_t { sum = 0, mean = 1, min = 2, max = 3, product = 4 };
std::string_view name_of(Reduction reduction);

struct CallOptions {
  std::string_view tag = {};                    // the tensor's or bucket's name, for messages
  std::optional<Clock::duration> timeout = {};  // default: the group's
};

inline constexpr Clock::duration kDefaultTimeout = std::chrono::minutes(5);

struct GroupStatistics {
  std::uint64_t operations = 0;
  std::uint64_t bytes = 0;    // payload bytes of this rank's calls
  std::uint64_t moved = 0;    // of all ranks' data: read and written by this rank's reductions
  Clock::duration total{};    // inside calls
  Clock::duration waiting{};  // of that: waiting for other ranks
};

// Contributions of this rank to a reduction in canonical order over V virtual ranks. All ranks pass
// the same runs.
struct TreeLayout {
  std::vector<VirtualRange> runs;  // one a rank, contiguous, together [0, virtual_ranks)
  int virtual_ranks = 1;
  bool operator==(const TreeLayout&) const = default;
};

class Group {
 public:
  virtual ~Group() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::uint64_t generation() const = 0;

  virtual void barrier(const CallOptions& options = {}) = 0;
  // data: the root's bytes on every rank afterwards. Here and below: byte lengths are multiples of
  // the dtype's size, input and output don't overlap unless that is said.
  virtual void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                         const CallOptions& options = {}) = 0;
  // output = the ranks' inputs one after another; output.size() == size() * input.size(). Input may
  // be its own part of output.
  virtual void all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options = {}) = 0;
  // The same with counts[r] elements of rank r; all ranks pass the same counts.
  virtual void all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                                 std::span<const std::uint64_t> counts, Dtype dtype,
                                 const CallOptions& options = {}) = 0;
  // all_gather whose output only the root has; elsewhere it is empty.
  virtual void gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      int root, const CallOptions& options = {}) = 0;
  // output = this rank's part of the root's input, whose size is size() * output.size(); elsewhere
  // input is empty. The root's output may be its own part of input.
  virtual void scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                       int root, const CallOptions& options = {}) = 0;
  // Part r of input goes to rank r, where it is part rank() of output. Parts of one size.
  virtual void all_to_all(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options = {}) = 0;
  // The same with input_counts[r] elements for rank r and output_counts[r] from it, which must
  // agree with what rank r passes.
  virtual void all_to_all_uneven(std::span<const std::byte> input,
                                 std::span<const std::uint64_t> input_counts,
                                 std::span<std::byte> output,
                                 std::span<const std::uint64_t> output_counts, Dtype dtype,
                                 const CallOptions& options = {}) = 0;
  // In place. Integer mean divides toward zero.
  virtual void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                          const CallOptions& options = {}) = 0;
  // all_reduce whose result only the root has; elsewhere data stays as it is.
  virtual void reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
                      const CallOptions& options = {}) = 0;
  // output = this rank's part of the reduced inputs; input.size() == size() * output.size().
  virtual void reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output,
                              Dtype dtype, Reduction reduction,
                              const CallOptions& options = {}) = 0;
  // result = tree(0, V) over all ranks' contributions. `slots` holds this rank's maximal subtrees
  // (maximal_subtrees(runs[rank], V)) one after another, each result.size() bytes; both from
  // allocate() with symmetric calls: slots with room for the largest number of contributions of any
  // rank. result may be slots' first part. Dtype must be floating point.
  virtual void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                               const TreeLayout& layout, const CallOptions& options = {}) = 0;

  // Between two ranks alone: the n-th call of one with the other meets the other's n-th with it,
  // and one must send what the other receives. Returns when the data is received, so that two
  // ranks that both send first are told of it.
  virtual void send(std::span<const std::byte> data, Dtype dtype, int destination,
                    const CallOptions& options = {}) = 0;
  virtual void recv(std::span<std::byte> data, Dtype dtype, int source,
                    const CallOptions& options = {}) = 0;

  // The group of the ranks that pass the same color, ordered by key, then by rank in this group;
  // none for a negative color. Collective over this group. The new group fails and ends alone; it
  // may outlive this one.
  virtual std::unique_ptr<Group> split(int color, int key, const CallOptions& options = {}) = 0;

  // Memory that collectives use in place, without a copy: 64-byte aligned, zeroed, lives as long as
  // the group. Collective: all ranks ask for the same size in the same order. Throws Error when
  // memory is short.
  virtual std::span<std::byte> allocate(std::size_t bytes, std::string_view what) = 0;

  virtual GroupStatistics statistics() const = 0;
};

class Segment;
struct FlightRecorder;
struct KnownLinkCosts;
struct GroupOptions {
  std::uint64_t generation = 0;
  Clock::duration timeout = kDefaultTimeout;
  // Called from inside every 512th operation: a tracer must read the flight recorder now, before it
  // is overwritten. Not for a group of one.
  std::function<void()> on_records = {};
  std::vector<int> seats = {};  // of the members, by rank; none: everybody in the segment
  // Asked in every wait for another node: why the generation is over, "" while it is not.
  std::function<std::string()> is_over = {};
  int local_ranks = 1;   // across nodes: how many ranks of this node want a core
  bool exact = true;     // across nodes: only plans of canonical association
  std::string key = {};  // the job's secret, which ranks of other nodes must prove; "": none
  // Across nodes: where this rank's operations are recorded, and must be as long as the group
  // lives; none: nowhere.
  FlightRecorder* recorder = nullptr;
  // Across nodes: what links cost, for groups of the same ranks in later generations; none:
  // measured each time.
  std::shared_ptr<KnownLinkCosts> known_costs = {};
  // Across nodes: told once of each plan that an all_reduce runs, and why that one.
  std::function<void(const std::string&)> on_choice = {};
};
std::unique_ptr<Group> make_solo_group(const GroupOptions& options = {});
// Ranks of one node over a segment. Waits until all have joined, with a deadline.
std::unique_ptr<Group> make_shm_group(std::shared_ptr<Segment> segment, int rank,
                                      const GroupOptions& options = {});
class Transport;
// Ranks of several nodes, one rank of the transport each. Waits until all have joined and proved
// the key, with a deadline.
std::unique_ptr<Group> make_remote_group(std::unique_ptr<Transport> transport,
                                         const GroupOptions& options = {});
// Ranks of several nodes, several on each: nodes[n] are node n's ranks, contiguous and in order.
// `local` are this node's. `carriers` are the remote group of those local ranks of one number that
// every node has, by node: each carries a part of the data; null on a rank that others have no
// partner for.
struct NodeGroups {
  std::shared_ptr<Group> local;
  std::shared_ptr<Group> carriers;
  std::vector<int> local_sizes;  // by node
  int node = 0;
  // A remote group of all ranks, in their order: for messages between ranks of different nodes,
  // all_to_all, gather, scatter and sub-groups that span nodes. Null: these throw ConfigError.
  std::shared_ptr<Group> everyone = nullptr;
};
std::unique_ptr<Group> make_hierarchical_group(const NodeGroups& groups,
                                               const GroupOptions& options = {});

}  // namespace lockstep
