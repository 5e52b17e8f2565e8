// The group of ranks of different nodes: plans over a Transport. Private to this layer. Owned by
// its user, used by one thread at a time.
//
// A call's first message is a frame with the call, which every rank sends every other one; data
// that fits travels in it (remote_meeting.h). What only copies is an exchange: parcels from each to
// each. Reductions: little data goes to everybody, who adds for himself; much goes to the owner of
// a slice, who adds in canonical order and sends the sum to everybody (direct_reduction.h).
//
// Files: remote_group.cc (joining, splitting, what only copies), remote_reduce.cc.
#pragma once

#include <memory>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/collective/direct_reduction.h"
#include "lockstep/collective/endable.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/plain_memory.h"
#include "lockstep/collective/plan_choice.h"
#include "lockstep/collective/plans.h"
#include "lockstep/collective/reduce.h"
#include "lockstep/collective/remote_meeting.h"

namespace lockstep {

// Up to so much is sent to everybody whole: what each rank receives.
inline constexpr std::size_t kMostToAll = 64 << 10;

class RemoteGroup final : public Group, public Endable {
 public:
  RemoteGroup(std::shared_ptr<RemoteLink> link, std::vector<int> members, int rank, int channel,
              const GroupOptions& options, const std::string& name);

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  std::uint64_t generation() const override { return options_.generation; }
  GroupStatistics statistics() const override {
    GroupStatistics statistics = meeting_.statistics();
    statistics.moved = reducer_.moved();
    return statistics;
  }
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    return memory_.allocate(bytes, what);
  }

  void end_group(const std::string& why) noexcept override { end_quietly(meeting_, why); }

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

  // all_reduce by a plan that all ranks name; 16-bit types only to_all and directly, bytes not by
  // the engine.
  void all_reduce_by(AllReducePlan by, std::span<std::byte> data, Dtype dtype, Reduction reduction,
                     const CallOptions& options);
  // A reduction of `bytes` of which all ranks have a plan.
  void reduce_directly(const Call& call, const CallOptions& options, DirectPlan plan,
                       std::uint64_t bytes);

 private:
  // One operation. Whatever fails in it ends the group.
  template <typename Body>
  void run(std::uint64_t bytes, Body&& body) {
    try {
      meeting_.check_open();
      body();
    } catch (const TransportError& error) {
      meeting_.lost(error);
    } catch (const CommError&) {
      throw;
    } catch (const std::exception& error) {
      meeting_.fail(error.what());
    }
    meeting_.end(bytes);
  }
  // An operation that only copies: out_of(r) goes to rank r, in_of(r) comes from it; this rank's
  // own is copied.
  template <typename OutOf, typename InOf>
  void exchange(const Call& call, const CallOptions& options, std::uint64_t bytes, OutOf&& out_of,
                InOf&& in_of);
  // What ranks contribute goes to whom it concerns, whole: out_of(r) to rank r, in_bytes(r) from
  // it. `result`: empty on ranks that have none.
  template <typename OutOf, typename InBytes>
  void reduce_whole(const Call& call, const CallOptions& options, const DirectPlan& plan,
                    std::span<std::byte> result, std::uint64_t bytes, OutOf&& out_of,
                    InBytes&& in_bytes);
  static DirectPlan plan_of(const Tree& tree, Dtype dtype, Reduction reduction,
                            std::span<const std::byte> slots, std::size_t slot_bytes) {
    return {.tree = tree,
            .dtype = dtype,
            .reduction = reduction,
            .round_once = true,
            .slots = slots,
            .slot_bytes = slot_bytes};
  }
  AllReducePlan plan_for(std::size_t bytes, Dtype dtype);
  void reduce_by_engine(std::span<std::byte> data, Dtype dtype, Reduction reduction);
  // Of messages between two ranks at a time (plans.h).
  void execute(const Plan& plan, std::span<std::byte> data, Dtype dtype, Reduction reduction);
  std::vector<Slice> chunks_of(std::size_t count, Dtype dtype) const;
  // Whether so much is sent to everybody whole.
  bool goes_to_all(std::size_t bytes) const;
  void message(int peer, const Call& call, const CallOptions& options,
               std::span<const std::byte> out, std::span<std::byte> in);

  const int rank_;
  const int size_;
  const GroupOptions options_;
  RemoteMeeting meeting_;
  const Tree own_tree_;         // one virtual rank a rank
  std::unique_ptr<Tree> tree_;  // tree_all_reduce: the last layout's
  PlainMemory memory_;
  Reducer reducer_;
  std::vector<std::byte> scratch_;
  unsigned told_ = 0;  // of which plans on_choice was, a bit each
};

}  // namespace lockstep
