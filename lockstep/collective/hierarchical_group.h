// The group of several ranks on each of several nodes, made of those of a node (local) and those
// across nodes (carriers). Private to this layer. Owned by its user, used by one thread at a time.
//
// Every call begins with a meeting: the ranks of a node give their calls to its leader, local rank
// 0, the leaders exchange and compare them and tell the ranks of their nodes. Little data travels
// with the calls, and every leader reduces it for his node. Of much data each carrier has a slice.
// In pieces, so that adding and sending overlap, it reads the slice from all ranks of its node,
// combines it to the node's maximal subtrees, reduces these with the other nodes' carriers of its
// number (direct_reduction.h), and writes the sums to all ranks of its node. Memory that the ranks
// of a node can't reach passes through staging buffers.
//
// Files: hierarchical_group.cc (meeting, what only copies), hierarchical_reduce.cc.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lockstep/collective/call.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/reachable.h"
#include "lockstep/collective/reduce.h"
#include "lockstep/collective/remote_group.h"

namespace lockstep {

// What follows from a TreeLayout for one node.
struct NodeTree {
  Tree all;                           // ranks' contributions
  Tree nodes;                         // the nodes' maximal subtrees: their contributions
  std::vector<CombinePlan> subtrees;  // each of this node's: of its local ranks' slots
  std::vector<std::size_t> locals;    // contributions of this node's ranks

  NodeTree(TreeLayout layout, const std::vector<int>& firsts, int node);
};

class HierarchicalGroup final : public Group {
 public:
  HierarchicalGroup(const NodeGroups& groups, const GroupOptions& options);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::uint64_t generation() const override { return options_.generation; }
  GroupStatistics statistics() const override { return statistics_; }
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    return groups_.local->allocate(bytes, what);
  }

  void barrier(const CallOptions& options) override;
  void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                 const CallOptions& options) override;
  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override;
  void all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                         std::span<const std::uint64_t> counts, Dtype dtype,
                         const CallOptions& options) override;
  void gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
              const CallOptions& options) override;
  void scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
               const CallOptions& options) override;
  void all_to_all(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options) override;
  void all_to_all_uneven(std::span<const std::byte> input,
                         std::span<const std::uint64_t> input_counts, std::span<std::byte> output,
                         std::span<const std::uint64_t> output_counts, Dtype dtype,
                         const CallOptions& options) override;
  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                  const CallOptions& options) override;
  void reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
              const CallOptions& options) override;
  void reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      Reduction reduction, const CallOptions& options) override;
  void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                       const TreeLayout& layout, const CallOptions& options) override;
  void send(std::span<const std::byte> data, Dtype dtype, int destination,
            const CallOptions& options) override;
  void recv(std::span<std::byte> data, Dtype dtype, int source,
            const CallOptions& options) override;
  std::unique_ptr<Group> split(int color, int key, const CallOptions& options) override;

 private:
  using Payloads = std::vector<const std::byte*>;  // by rank
  // What travels with the calls: as many bytes of each rank, and an answer that each node's leader
  // makes of all of them.
  struct Luggage {
    std::span<const std::byte> payload = {};
    std::size_t room = 0;  // for each rank's payload: the same on all
    std::span<std::byte> answer = {};
    std::function<void(const Payloads&)> make_answer = {};
  };
  // Contributions of this rank and what it has of the sums.
  struct Reducing {
    static constexpr int kAll = -1, kParts = -2;
    const NodeTree& tree;
    Dtype dtype;  // of slots and result
    Reduction reduction;
    bool round_once;
    std::span<const std::byte> slots;
    std::size_t slot_bytes;
    std::span<std::byte> result;
    int root = kAll;  // who gets the sums; all; kParts: each a part of one size
  };
  // What is reduced at a time, as the ranks of this node have it: their contributions, which of the
  // sums each gets, and where.
  struct Reached {
    std::size_t count = 0;  // elements of a contribution
    std::vector<const std::byte*> slots = {};
    std::size_t slot_bytes = 0;
    std::vector<Slice> windows = {};
    std::vector<std::byte*> results = {};
  };

  // One operation: the meeting, then body(). Whatever fails in it ends the group and those below.
  void run(const Call& call, const CallOptions& options, std::uint64_t bytes,
           const Luggage& luggage, const std::function<void()>& body = {});
  void guarded(const CallOptions& options, std::uint64_t bytes, const std::function<void()>& body);
  void meet(const Luggage& luggage);
  void compare(const std::byte* frames, std::size_t frame_bytes, std::string& difference) const;
  [[noreturn]] void end_with(const std::string& message);
  GroupStatistics below() const;  // of the groups below, together
  CallOptions inner() const { return {.tag = inner_tag_, .timeout = timeout_}; }
  bool is_small(std::size_t bytes) const;
  int node_of(int rank) const;
  bool carries() const { return local_rank_ < carriers_; }
  Group& everyone() const;

  void gather_all(std::span<const std::byte> input, std::span<std::byte> output,
                  std::span<const std::uint64_t> counts, Dtype dtype);
  void reduce_all(const Call& call, const CallOptions& options, const Reducing& what,
                  std::uint64_t bytes);
  // Where all ranks' memory is reachable on their nodes; where it is not.
  void reduce_in_place(const Reducing& what);
  void reduce_staged(const Reducing& what);
  void reduce_reached(const Reducing& what, const Reached& reached);
  // DirectPlan's.
  void contribute(const Reducing& what, const Reached& reached, Slice piece, std::byte* to,
                  std::size_t stride);
  void deliver(const Reducing& what, const Reached& reached, Slice piece, const std::byte* sum);
  static Dtype computed_as(const Reducing& what);
  // Which of so many sums each rank of this node gets.
  std::vector<Slice> windows_of(const Reducing& what, std::size_t count) const;
  // The memory of this node's ranks.
  std::vector<std::span<std::byte>> reach(std::span<const std::byte> mine, Dtype dtype);
  // The beginning of a scratch buffer that grows with its use.
  static std::span<std::byte> room(std::vector<std::byte>& memory, std::size_t bytes) {
    if (memory.size() < bytes) memory.resize(bytes);
    return std::span(memory).first(bytes);
  }

  const NodeGroups groups_;
  const GroupOptions options_;
  const int node_;
  const int local_rank_;
  const int local_size_;
  const int nodes_;
  const int carriers_;       // on each node
  std::vector<int> firsts_;  // by node: its first rank; at the end: all ranks
  int rank_ = 0, size_ = 0;
  std::unique_ptr<NodeTree> own_tree_;  // all_reduce: one virtual rank a rank
  std::unique_ptr<NodeTree> tree_;      // tree_all_reduce: the last layout's
  Reducer reducer_;
  Reachable* const reachable_;  // local; null: of one rank
  RemoteGroup* const across_;   // carriers
  std::span<std::byte> staging_;
  std::vector<std::byte> frames_, wide_, packed_;
  Call call_;
  std::string inner_tag_;
  std::optional<Clock::duration> timeout_;
  std::uint64_t next_sequence_ = 0;
  std::string over_;
  GroupStatistics statistics_;
};

}  // namespace lockstep
