// A group: ranks that run collectives together. Synchronous; one thread at a time may call a group.
//
// Every call is a collective: all ranks of the group make the same calls in the same order. Before
// a result returns the ranks have compared a fingerprint (sequence number, operation, dtype, count,
// reduction, root): a mismatch is a CommError on every rank that quotes both calls. A deadline's
// CommError names the ranks that had not arrived, the operation each was last seen in, its tag and
// step, how long ago, and whether its process lives. After a CommError the group is over: further
// calls throw at once.
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
  Clock::duration total{};    // inside calls
  Clock::duration waiting{};  // of that: waiting for other ranks
};

// Contributions of this rank to a reduction in canonical order over V virtual ranks. All ranks pass
// the same runs.
struct TreeLayout {
  std::vector<VirtualRange> runs;  // one a rank, contiguous, together [0, virtual_ranks)
  int virtual_ranks = 1;
};

class Group {
 public:
  virtual ~Group() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual std::uint64_t generation() const = 0;

  virtual void barrier(const CallOptions& options = {}) = 0;
  // data: the root's bytes on every rank afterwards. Byte length a multiple of the dtype's size.
  virtual void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                         const CallOptions& options = {}) = 0;
  // output = the ranks' inputs one after another; output.size() == size() * input.size().
  virtual void all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options = {}) = 0;
  // In place. Integer mean divides toward zero.
  virtual void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                          const CallOptions& options = {}) = 0;
  // result = tree(0, V) over all ranks' contributions. `slots` holds this rank's maximal subtrees
  // (maximal_subtrees(runs[rank], V)) one after another, each result.size() bytes; both from
  // allocate() with symmetric calls: slots with room for the largest number of contributions of any
  // rank. result may be slots' first part. Dtype must be floating point.
  virtual void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                               const TreeLayout& layout, const CallOptions& options = {}) = 0;

  // Memory that collectives use in place, without a copy: 64-byte aligned, zeroed, lives as long as
  // the group. Collective: all ranks ask for the same size in the same order. Throws Error when
  // memory is short.
  virtual std::span<std::byte> allocate(std::size_t bytes, std::string_view what) = 0;

  virtual GroupStatistics statistics() const = 0;
};

class Segment;
struct GroupOptions {
  std::uint64_t generation = 0;
  Clock::duration timeout = kDefaultTimeout;
  // Called from inside every 512th operation: a tracer must read the flight recorder now, before it
  // is overwritten. Not for a group of one.
  std::function<void()> on_records = {};
};
std::unique_ptr<Group> make_solo_group(const GroupOptions& options = {});
// Ranks of one node over a segment made for exactly `segment->ranks()` ranks. Waits until all have
// joined, with a deadline.
std::unique_ptr<Group> make_shm_group(std::shared_ptr<Segment> segment, int rank,
                                      const GroupOptions& options = {});

}  // namespace lockstep
