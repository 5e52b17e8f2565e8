#include "lockstep/update/recovery.h"

#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"

namespace lockstep {

RecoveryState recovery_state(const SharedState& state, const UpdateSpec& spec) {
  RecoveryState found{.committed = state.committed(), .decided = state.decided()};
  if (found.decided != found.committed && found.decided != found.committed + 1)
    throw Error(fmt::format("the shared weights are damaged: step {} is committed, {} decided",
                            found.committed, found.decided));
  for (std::uint64_t rank = 0; rank < state.layout().slices; ++rank)
    found.sealed.push_back(state.sealed(static_cast<int>(rank)));
  if (found.decided == found.committed) return found;
  const StepRecord record = state.record(found.decided, spec);
  for (std::size_t slice = 0; slice < record.slices(); ++slice) {
    found.progress.push_back(state.progress(slice));
    found.whole.push_back(whole_slice(record, slice));
  }
  return found;
}

RecoveryPlan plan_recovery(const RecoveryState& state, std::size_t workers) {
  LOCKSTEP_CHECK(workers > 0, "somebody is left to recover");
  RecoveryPlan plan;
  const std::uint64_t next = state.committed + 1;
  if (state.decided == state.committed) {
    const auto sealed = std::count(state.sealed.begin(), state.sealed.end(), next);
    plan.action = sealed != 0 ? RecoveryPlan::Action::discard : RecoveryPlan::Action::nothing;
    plan.reason = sealed != 0 ? fmt::format(
                                    "step {} is computed again: {} contributions were "
                                    "sealed, but it was not decided",
                                    next, sealed)
                              : fmt::format("step {} is whole, step {} had not begun to be summed",
                                            state.committed, next);
    return plan;
  }
  plan.action = RecoveryPlan::Action::finish;
  std::size_t done = 0;
  for (std::size_t slice = 0; slice < state.progress.size(); ++slice) {
    plan.tasks.push_back({.slice = slice, .worker = slice % workers});
    done += state.progress[slice] == state.whole[slice] ? 1 : 0;
  }
  plan.reason = fmt::format("step {} was decided and is finished: {} of {} slices were whole", next,
                            done, state.progress.size());
  return plan;
}

void recover(SliceUpdate& update, const RecoveryPlan& plan, std::size_t me,
             const Contributions& contributions, const SliceUpdate::Hook& hook) {
  if (plan.action != RecoveryPlan::Action::finish) return;
  const StepRecord record = update.state().record(update.state().decided(), update.spec());
  for (const RecoveryPlan::Task& task : plan.tasks)
    if (task.worker == me) update.run(record, contributions, task.slice, hook);
}

bool NodesPlan::any(Action action) const {
  return std::ranges::find(actions, action) != actions.end();
}

NodesPlan plan_nodes(std::span<const NodeState> nodes) {
  using Action = NodesPlan::Action;
  NodesPlan plan;
  const NodeState* newest = nullptr;
  for (const NodeState& node : nodes)
    if (node.whole != 0 && (newest == nullptr || node.decided > newest->decided)) newest = &node;
  if (newest == nullptr) {
    plan.actions.assign(nodes.size(), Action::take_weights);
    plan.actions[0] = Action::make;
    return plan;
  }
  plan.source = static_cast<int>(newest - nodes.data());
  const std::uint64_t goal = newest->decided;
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const NodeState& node = nodes[i];
    const bool behind = node.committed + 1 == goal;
    Action action = Action::take_weights;
    if (node.whole != 0 && node.committed == goal) action = Action::keep;
    if (node.whole != 0 && behind && node.reduced == goal) action = Action::take_record;
    if (node.whole != 0 && behind && node.decided == goal) action = Action::finish;
    plan.actions.push_back(action);
    if (action != Action::take_record && action != Action::take_weights) continue;
    if (!plan.reason.empty()) plan.reason += ", ";
    plan.reason +=
        action == Action::take_record
            ? fmt::format("node {} finishes step {} as node {} decided it", i, goal, plan.source)
            : fmt::format("node {}, {}, takes step {} from node {}", i,
                          node.whole != 0 ? fmt::format("at step {}", node.committed)
                                          : std::string("without weights"),
                          goal, plan.source);
  }
  return plan;
}

}  // namespace lockstep
