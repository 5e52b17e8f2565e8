// Every plan, run over symbols for 1 to 64 ranks: each element reduced exactly once, everybody ends
// with everything, nobody waits for one who waits for him, and the canonical association where the
// plan promises it.
#include "lockstep/collective/plans.h"

#include <gtest/gtest.h>

#include <bit>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "lockstep/collective/canonical_tree.h"

namespace lockstep {
namespace {

constexpr int kMaxRanks = 64;
using Kind = PlanStep::Kind;
using Then = PlanStep::Then;
using Planner = Plan (*)(int rank, int size);

// Sums as symbols: the same number for the same tree of additions.
class Sums {
 public:
  int leaf(int rank) { return intern({-1 - rank, 0}, std::uint64_t{1} << rank); }
  int add(int a, int b) {
    EXPECT_EQ(ranks_[a] & ranks_[b], 0u) << "a rank's input is added twice";
    return intern({a, b}, ranks_[a] | ranks_[b]);
  }
  std::uint64_t ranks(int sum) const { return ranks_[sum]; }
  int canonical(VirtualRange node) {
    if (node.size() == 1) return leaf(node.lo);
    const int mid = split_point(node);
    return add(canonical({node.lo, mid}), canonical({mid, node.hi}));
  }

 private:
  int intern(std::pair<int, int> key, std::uint64_t ranks) {
    const auto [found, is_new] = numbers_.emplace(key, static_cast<int>(ranks_.size()));
    if (is_new) ranks_.push_back(ranks);
    return found->second;
  }
  std::map<std::pair<int, int>, int> numbers_;
  std::vector<std::uint64_t> ranks_;
};

// Runs the plans of all ranks. A message leaves and arrives only while both are in its step.
class Simulation {
 public:
  Simulation(Planner planner, int size) : at_(size), sent_(size), received_(size) {
    for (int rank = 0; rank < size; ++rank) {
      plans_.push_back(planner(rank, size));
      values_.emplace_back(plans_[0].chunks, sums_.leaf(rank));
      EXPECT_EQ(plans_[rank].chunks, plans_[0].chunks);
    }
    while (advance()) {
    }
  }

  bool ended() const {
    for (std::size_t rank = 0; rank < plans_.size(); ++rank)
      if (at_[rank] != plans_[rank].steps.size()) return false;
    return true;
  }

  void check() {
    const int size = static_cast<int>(plans_.size());
    const std::uint64_t everybody = ~std::uint64_t{0} >> (64 - size);
    const int canonical = sums_.canonical({0, size});
    ASSERT_TRUE(ended()) << "somebody waits for ever";
    for (int rank = 0; rank < size; ++rank) {
      for (std::size_t chunk = 0; chunk < values_[rank].size(); ++chunk) {
        ASSERT_EQ(sums_.ranks(values_[rank][chunk]), everybody) << "rank " << rank;
        ASSERT_EQ(values_[rank][chunk], values_[0][chunk]) << "rank " << rank;
        if (plans_[rank].canonical) {
          ASSERT_EQ(values_[rank][chunk], canonical) << "chunk " << chunk;
        }
      }
    }
  }

 private:
  const PlanStep* step(int rank) const {
    const auto& steps = plans_[rank].steps;
    return at_[rank] < steps.size() ? &steps[at_[rank]] : nullptr;
  }
  void next(int rank) {
    ++at_[rank];
    sent_[rank] = received_[rank] = false;
    pending_.erase(rank);
  }

  // Whether anything happened.
  bool advance() {
    bool moved = false;
    bool all_meet = true;
    for (int rank = 0; rank < static_cast<int>(plans_.size()); ++rank) {
      const PlanStep* mine = step(rank);
      all_meet &= mine != nullptr && mine->kind == Kind::meet;
      if (mine == nullptr || mine->kind == Kind::meet) continue;
      moved |= mine->kind == Kind::combine ? combine(rank, *mine) : deliver(rank, *mine);
      moved |= mine->kind == Kind::message && finish(rank, *mine);
    }
    if (!all_meet) return moved;
    touched_.clear();
    for (std::size_t rank = 0; rank < plans_.size(); ++rank) next(static_cast<int>(rank));
    return true;
  }

  // Between two meetings a chunk that one rank writes for all is that rank's alone.
  bool combine(int rank, const PlanStep& mine) {
    for (int chunk = mine.combines.first; chunk < mine.combines.last; ++chunk) {
      auto& [users, written] = touched_[chunk];
      users.insert(rank);
      written |= mine.for_all;
      EXPECT_TRUE(!written || users.size() == 1) << "chunk " << chunk << " is written and shared";
      const int sum = sums_.canonical({0, static_cast<int>(plans_.size())});
      for (std::size_t to = 0; to < plans_.size(); ++to)
        if (mine.for_all || static_cast<int>(to) == rank) values_[to][chunk] = sum;
    }
    next(rank);
    return true;
  }

  // What rank sends reaches its peer once that is in the step that receives it.
  bool deliver(int rank, const PlanStep& mine) {
    if (mine.send_to < 0 || sent_[rank]) return false;
    EXPECT_NE(mine.send_to, rank);
    const PlanStep* theirs = step(mine.send_to);
    if (theirs == nullptr || theirs->kind != Kind::message || theirs->receive_from != rank ||
        received_[mine.send_to])
      return false;
    EXPECT_EQ(mine.sends.size(), theirs->receives.size());
    EXPECT_EQ(mine.sends, theirs->receives) << "chunks go where they came from";
    for (int chunk = mine.sends.first; chunk < mine.sends.last; ++chunk)
      pending_[mine.send_to].push_back(values_[rank][chunk]);
    sent_[rank] = received_[mine.send_to] = true;
    return true;
  }

  // Received values take effect when the whole step is done, for what it sends is what was before.
  bool finish(int rank, const PlanStep& mine) {
    if ((mine.send_to >= 0 && !sent_[rank]) || (mine.receive_from >= 0 && !received_[rank]))
      return false;
    for (int i = 0; i < mine.receives.size(); ++i) {
      int& own = values_[rank][mine.receives.first + i];
      const int other = pending_[rank][i];
      own = mine.then == Then::replace      ? other
            : mine.then == Then::add_to_own ? sums_.add(own, other)
                                            : sums_.add(other, own);
    }
    next(rank);
    return true;
  }

  Sums sums_;
  std::vector<Plan> plans_;
  std::vector<std::vector<int>> values_;  // by rank and chunk
  std::vector<std::size_t> at_;
  std::vector<bool> sent_, received_;
  std::map<int, std::vector<int>> pending_;                // by receiver
  std::map<int, std::pair<std::set<int>, bool>> touched_;  // by chunk, since the last meeting
};

struct NamedPlan {
  std::string name;
  Planner planner;
  std::function<bool(int size)> canonical;
};
void PrintTo(const NamedPlan& plan, std::ostream* out) { *out << plan.name; }

bool always(int) { return true; }
bool power_of_two(int size) { return std::has_single_bit(static_cast<unsigned>(size)); }

class PlanTest : public ::testing::TestWithParam<NamedPlan> {};

TEST_P(PlanTest, IsRightFor1To64Ranks) {
  for (int size = 1; size <= kMaxRanks; ++size) {
    SCOPED_TRACE(std::to_string(size) + " ranks");
    Simulation(GetParam().planner, size).check();
    for (int rank = 0; rank < size; ++rank)
      EXPECT_EQ(GetParam().planner(rank, size).canonical, GetParam().canonical(size));
    if (HasFailure()) return;
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, PlanTest,
    ::testing::Values(NamedPlan{"OwnerWritesAll", plan_owner_writes_all, always},
                      NamedPlan{"Flat", plan_flat, always}, NamedPlan{"Tree", plan_tree, always},
                      NamedPlan{"Ring", plan_ring, [](int size) { return size == 1; }},
                      NamedPlan{"RecursiveDoubling", plan_recursive_doubling, power_of_two},
                      NamedPlan{"RecursiveHalving", plan_recursive_halving, power_of_two}),
    [](const auto& info) { return info.param.name; });

// The simulation itself finds what it is there to find.
TEST(PlanSimulationTest, TwoThatBothSendFirstNeverEnd) {
  const Planner both_send = [](int rank, int) {
    return Plan{.chunks = 1,
                .canonical = false,
                .steps = {{.send_to = 1 - rank, .sends = {0, 1}},
                          {.receive_from = 1 - rank, .receives = {0, 1}}}};
  };
  EXPECT_FALSE(Simulation(both_send, 2).ended());
}

// Traffic: what a rank sends, in chunks.
TEST(PlanTrafficTest, RingAndHalvingSendTwoNMinusOneParts) {
  for (const Planner planner : {plan_ring, plan_recursive_halving})
    for (const int size : {2, 4, 8, 16, 32, 64})
      for (int rank = 0; rank < size; ++rank) {
        int sent = 0;
        for (const PlanStep& step : planner(rank, size).steps) sent += step.sends.size();
        EXPECT_EQ(sent, 2 * (size - 1));
      }
}

}  // namespace
}  // namespace lockstep
