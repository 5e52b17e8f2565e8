// What becomes of a step when its workers have died: a decision, as a pure function of what the
// shared state says, and its execution. docs/shared-weights.md explains why it is right.
//
// When: everybody lost is fenced (SIGKILL sent and its exit seen), and everybody left has met in
// the next generation, so that nobody works on the old step any more. Everybody plans (the plans
// are equal), executes its part, meets again, and commits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "lockstep/update/slice_update.h"

namespace lockstep {

struct RecoveryState {
  std::uint64_t committed = 0;
  std::uint64_t decided = 0;
  std::vector<std::uint64_t> sealed = {};    // the last step that each old rank sealed
  std::vector<SliceProgress> progress = {};  // of the decided record's slices; unused otherwise
  std::vector<SliceProgress> whole = {};  // the progress that these slices have when they are whole
};
// Throws Error if what the memory says is damaged.
RecoveryState recovery_state(const SharedState& state, const UpdateSpec& spec);

struct RecoveryPlan {
  enum class Action {
    nothing,  // no step was under way
    discard,  // no weight has changed: forget the contributions, compute the step again
    finish,   // the step was decided: forward
  };
  struct Task {
    std::size_t slice = 0;
    std::size_t worker = 0;  // who makes sure that the slice is whole
    bool operator==(const Task&) const = default;
  };
  Action action = Action::nothing;
  std::vector<Task> tasks;  // every slice once
  std::string reason;       // in words
};
// Slices are dealt out in turn: nobody works on the step any more, and so it does not matter who
// owned which, or who still lives.
RecoveryPlan plan_recovery(const RecoveryState& state, std::size_t workers);

// Worker `me`'s tasks. Idempotent: if it dies, too, plan again. Contributions are those of the
// record's ranks, dead or alive.
void recover(SliceUpdate& update, const RecoveryPlan& plan, std::size_t me,
             const Contributions& contributions, const SliceUpdate::Hook& hook = {});

// --- Across nodes ---
// Each node has weights of its own. A step is decided anywhere only when every node has the whole
// reduced gradient: so a node that has not heard of the decision can still make the step.
struct NodeState {
  std::uint64_t whole = 0;   // 1: it has weights, of the steps that follow
  std::uint64_t edited = 0;  // 1: they were being written to on purpose
  std::uint64_t committed = 0;
  std::uint64_t decided = 0;
  std::uint64_t reduced = 0;  // ReducedGradient::step()
};

struct NodesPlan {
  enum class Action {
    make,         // nobody has weights: this node makes new ones
    keep,         // it is as far as anybody
    finish,       // it has decided the step that others have, and makes it whole
    take_record,  // it finishes a step that others have decided, from the source's record
    take_weights  // it has none, or older ones: the source's, when that has finished
  };
  std::vector<Action> actions;  // by node
  int source = 0;
  std::string reason;  // "": every node goes its own way
  bool any(Action action) const;
};
NodesPlan plan_nodes(std::span<const NodeState> nodes);

}  // namespace lockstep
