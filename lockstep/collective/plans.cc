#include "lockstep/collective/plans.h"

#include <bit>

#include "lockstep/base/error.h"
#include "lockstep/collective/canonical_tree.h"

namespace lockstep {
namespace {

using Kind = PlanStep::Kind;
using Then = PlanStep::Then;

PlanStep send_step(int peer, ChunkRange range) { return {.send_to = peer, .sends = range}; }
PlanStep receive_step(int peer, ChunkRange range, Then then) {
  return {.receive_from = peer, .receives = range, .then = then};
}

// The way from the root of the canonical tree to the leaf `rank`: the inner nodes only.
std::vector<VirtualRange> path_to(int rank, int size) {
  std::vector<VirtualRange> path;
  for (VirtualRange node{0, size}; node.size() > 1;) {
    path.push_back(node);
    const int mid = split_point(node);
    node = rank < mid ? VirtualRange{node.lo, mid} : VirtualRange{mid, node.hi};
  }
  return path;
}

// For plans that need a power of two of ranks: those beyond give their data to one within, which
// gives them the result. core(power) is what the ranks within do.
template <typename Core>
void fold(int rank, int size, Plan& plan, Core&& core) {
  const int power = static_cast<int>(std::bit_floor(static_cast<unsigned>(size)));
  const ChunkRange all{0, plan.chunks};
  plan.canonical = power == size;
  if (rank >= power) {
    plan.steps = {send_step(rank - power, all), receive_step(rank - power, all, Then::replace)};
    return;
  }
  const bool folds = rank + power < size;
  if (folds) plan.steps.push_back(receive_step(rank + power, all, Then::add_to_own));
  core(power);
  if (folds) plan.steps.push_back(send_step(rank + power, all));
}

// The operand of the lower rank comes first.
Then order(int rank, int peer) { return rank < peer ? Then::add_to_own : Then::own_to_added; }

void check_rank(int rank, int size) { LOCKSTEP_CHECK(0 <= rank && rank < size); }

}  // namespace

Plan plan_owner_writes_all(int rank, int size) {
  check_rank(rank, size);
  return {.chunks = size,
          .canonical = true,
          .steps = {{.kind = Kind::meet},
                    {.kind = Kind::combine, .combines = {rank, rank + 1}, .for_all = true},
                    {.kind = Kind::meet}}};
}

Plan plan_flat(int rank, int size) {
  check_rank(rank, size);
  return {.chunks = 1,
          .canonical = true,
          .steps = {{.kind = Kind::meet}, {.kind = Kind::combine, .combines = {0, 1}}}};
}

Plan plan_tree(int rank, int size) {
  check_rank(rank, size);
  Plan plan{.chunks = 1, .canonical = true, .steps = {}};
  const auto path = path_to(rank, size);
  // A node's value is with its lowest rank: that of its left child adds the right child's.
  for (auto node = path.rbegin(); node != path.rend(); ++node) {
    const int mid = split_point(*node);
    if (rank == node->lo) plan.steps.push_back(receive_step(mid, {0, 1}, Then::add_to_own));
    if (rank == mid) plan.steps.push_back(send_step(node->lo, {0, 1}));
  }
  for (const VirtualRange node : path) {
    const int mid = split_point(node);
    if (rank == node.lo) plan.steps.push_back(send_step(mid, {0, 1}));
    if (rank == mid) plan.steps.push_back(receive_step(node.lo, {0, 1}, Then::replace));
  }
  return plan;
}

Plan plan_ring(int rank, int size) {
  check_rank(rank, size);
  Plan plan{.chunks = size, .canonical = size == 1, .steps = {}};
  const auto chunk = [&](int number) {
    const int index = ((number % size) + size) % size;
    return ChunkRange{index, index + 1};
  };
  const auto step = [&](ChunkRange sends, ChunkRange receives, Then then) {
    plan.steps.push_back({.send_to = (rank + 1) % size,
                          .sends = sends,
                          .receive_from = (rank + size - 1) % size,
                          .receives = receives,
                          .then = then});
  };
  for (int i = 0; i < size - 1; ++i) step(chunk(rank - i), chunk(rank - i - 1), Then::own_to_added);
  for (int i = 0; i < size - 1; ++i) step(chunk(rank + 1 - i), chunk(rank - i), Then::replace);
  return plan;
}

Plan plan_recursive_doubling(int rank, int size) {
  check_rank(rank, size);
  Plan plan{.chunks = 1, .canonical = false, .steps = {}};
  fold(rank, size, plan, [&](int power) {
    for (int distance = 1; distance < power; distance *= 2) {
      const int peer = rank ^ distance;
      plan.steps.push_back({.send_to = peer,
                            .sends = {0, 1},
                            .receive_from = peer,
                            .receives = {0, 1},
                            .then = order(rank, peer)});
    }
  });
  return plan;
}

Plan plan_recursive_halving(int rank, int size) {
  check_rank(rank, size);
  Plan plan{.chunks = static_cast<int>(std::bit_floor(static_cast<unsigned>(size))),
            .canonical = false,
            .steps = {}};
  fold(rank, size, plan, [&](int power) {
    std::vector<PlanStep> back;
    ChunkRange mine{0, power};
    for (int distance = 1; distance < power; distance *= 2) {
      const int peer = rank ^ distance;
      const int mid = mine.first + mine.size() / 2;
      ChunkRange keeps{mine.first, mid}, gives{mid, mine.last};
      if (rank > peer) std::swap(keeps, gives);
      plan.steps.push_back({.send_to = peer,
                            .sends = gives,
                            .receive_from = peer,
                            .receives = keeps,
                            .then = order(rank, peer)});
      back.push_back({.send_to = peer, .sends = keeps, .receive_from = peer, .receives = gives});
      mine = keeps;
    }
    plan.steps.insert(plan.steps.end(), back.rbegin(), back.rend());
  });
  return plan;
}

}  // namespace lockstep
