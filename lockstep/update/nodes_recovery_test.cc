// What every node does with its weights when a generation begins.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "lockstep/update/recovery.h"
#include "lockstep/update/reduced_gradient.h"

namespace lockstep {
namespace {

using Action = NodesPlan::Action;
using Actions = std::vector<Action>;

constexpr NodeState at(std::uint64_t committed, std::uint64_t decided, std::uint64_t reduced) {
  return {.whole = 1, .committed = committed, .decided = decided, .reduced = reduced};
}

TEST(NodesPlan, NobodyHasWeights) {
  const NodesPlan plan = plan_nodes(std::vector<NodeState>(3));
  EXPECT_EQ(plan.actions, (Actions{Action::make, Action::take_weights, Action::take_weights}));
  EXPECT_EQ(plan.source, 0);
}

TEST(NodesPlan, WhoIsAsFarAsAnybodyStays) {
  EXPECT_EQ(plan_nodes(std::vector{at(4, 4, 4), at(4, 4, 5)}).actions,
            (Actions{Action::keep, Action::keep}));
  EXPECT_EQ(plan_nodes(std::vector{at(4, 4, 4), at(4, 4, 5)}).reason, "");
}

TEST(NodesPlan, ADecisionAnywhereIsMadeWholeEverywhere) {
  const NodesPlan plan = plan_nodes(std::vector{at(4, 4, 5), at(4, 5, 5), at(5, 5, 5)});
  EXPECT_EQ(plan.actions, (Actions{Action::take_record, Action::finish, Action::keep}));
  EXPECT_EQ(plan.source, 1);
  EXPECT_EQ(plan.reason, "node 0 finishes step 5 as node 1 decided it");
}

TEST(NodesPlan, WhoIsNewOrBehindTakesTheNewest) {
  const NodesPlan plan = plan_nodes(std::vector{NodeState{}, at(2, 3, 3), at(8, 9, 9)});
  EXPECT_EQ(plan.actions, (Actions{Action::take_weights, Action::take_weights, Action::finish}));
  EXPECT_EQ(plan.source, 2);
  EXPECT_EQ(plan.reason,
            "node 0, without weights, takes step 9 from node 2, node 1, at step 2, takes step 9 "
            "from node 2");
}

// Every reachable state of three nodes in a step, and every set of them that is left: they end at
// one step, with what it needs; the decision holds if anybody left has heard of it.
TEST(NodesPlan, WhoeverIsLeftEndsAtOneStep) {
  std::vector<NodeState> phases = {at(4, 4, 4), at(4, 4, 5), at(4, 5, 5), at(5, 5, 5)};
  for (int code = 0; code < 5 * 5 * 5; ++code) {
    std::vector<NodeState> nodes;
    for (int rest = code; nodes.size() < 3; rest /= 5)
      nodes.push_back(rest % 5 == 4 ? NodeState{} : phases[static_cast<std::size_t>(rest % 5)]);
    const bool decided = std::ranges::any_of(nodes, [](auto& one) { return one.decided == 5; });
    const bool reachable = !decided || std::ranges::none_of(nodes, [](auto& one) {
      return one.whole != 0 && one.reduced != 5;
    });
    if (!reachable) continue;
    const NodesPlan plan = plan_nodes(nodes);
    for (std::size_t i = 0; i < nodes.size(); ++i) {
      switch (plan.actions[i]) {
        case Action::make:
          EXPECT_TRUE(std::ranges::none_of(nodes, [](auto& one) { return one.whole != 0; }));
          break;
        case Action::keep:
          EXPECT_EQ(nodes[i].committed, decided ? 5u : 4u);
          break;
        case Action::finish:
          EXPECT_EQ(nodes[i].decided, 5u);
          break;
        case Action::take_record:
          EXPECT_EQ(nodes[i].reduced, 5u);
          break;
        case Action::take_weights:
          EXPECT_EQ(nodes[i].whole, 0u);  // of the others nobody need be sent anything
      }
    }
    const auto source = plan.actions[static_cast<std::size_t>(plan.source)];
    EXPECT_TRUE(source == Action::make || source == Action::keep || source == Action::finish);
  }
}

TEST(ReducedGradient, IsCompleteWhenEveryCarrierSaysSo) {
  alignas(64) std::array<std::byte, kMaxSlices * 8 + 12> memory{};
  const ReducedGradient reduced(memory, 3);
  EXPECT_EQ(reduced.values().size(), 3u);
  EXPECT_EQ(reduced.step(), 0u);
  reduced.complete(0, 2, 7);
  EXPECT_EQ(reduced.step(), 0u);
  reduced.complete(1, 2, 7);
  EXPECT_EQ(reduced.step(), 7u);
  reduced.complete(1, 2, 8);
  EXPECT_EQ(reduced.step(), 0u);
  reduced.complete(0, 1, 8);  // fewer than before
  EXPECT_EQ(reduced.step(), 8u);
  memory.fill(std::byte{0xff});
  EXPECT_EQ(reduced.step(), 0u);
  EXPECT_THROW(ReducedGradient(memory, 4), Error);
}

}  // namespace
}  // namespace lockstep
