// The group of several ranks on each of several nodes, made of those of a node (local) and those
// across nodes (carriers). Private to this layer. Owned by its user, used by one thread at a time.
//
// Every call begins with a meeting: the ranks of a node give their calls to its leader, local rank
// 0, the leaders exchange and compare them and tell the ranks of their nodes. Little data travels
// with the calls, and every leader reduces it for his node. Of much data each carrier has a part:
// the ranks of a node combine theirs to the node's maximal subtrees, part by part, carriers of one
// number reduce these, and all ranks of the node take what the carriers have.
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
#include "lockstep/collective/reduce.h"

namespace lockstep {

// What follows from a TreeLayout for one node.
struct NodeTree {
  Tree all;                           // ranks' contributions
  Tree nodes;                         // the nodes' maximal subtrees: their contributions
  bool plain = false;                 // nodes contribute as if each was one rank
  std::vector<CombinePlan> subtrees;  // each of this node's: of its local ranks' slots
  bool plain_inside = false;          // this node's is one, of ranks with one contribution each
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
  // Contributions of this rank and where the reduced ones go. count: elements.
  struct Reducing {
    const NodeTree& tree;
    Dtype dtype;  // of slots and result
    Reduction reduction;
    bool round_once;
    std::span<const std::byte> slots;
    std::size_t slot_bytes;
    std::span<std::byte> result;
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
  // Of every carrier's `slice` elements, from `first` on.
  void reduce_chunk(const Reducing& what, std::size_t first, std::size_t slice);
  // This rank's contributions to the chunk, a carrier's after the other's: in place where they lie
  // so.
  std::span<const std::byte> contributions_to(const Reducing& what, std::size_t first,
                                              std::size_t slice);
  // A carrier's slice: the node's subtrees, one after another; then the sum of all nodes'.
  std::span<std::byte> combine_locally(const Reducing& what, Dtype computed,
                                       std::span<const std::byte> chunk, std::size_t slice);
  void combine_nodes(const Reducing& what, Dtype computed, std::span<std::byte> subtrees,
                     std::size_t slice);
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
  std::vector<std::byte> frames_, wide_, packed_, gathered_, parts_;
  Call call_;
  std::string inner_tag_;
  std::optional<Clock::duration> timeout_;
  std::uint64_t next_sequence_ = 0;
  std::string over_;
  GroupStatistics statistics_;
};

}  // namespace lockstep
