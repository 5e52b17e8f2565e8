#include "lockstep/collective/plan_choice.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <vector>

#include "lockstep/base/error.h"

namespace lockstep {

std::string_view name_of(AllReducePlan plan) {
  constexpr std::string_view kNames[] = {"to_all", "direct", "doubling", "halving",
                                         "tree",   "ring",   "engine"};
  return kNames[static_cast<int>(plan)];
}

PlanChoice choose_all_reduce(const LinkCosts& costs, int size, std::size_t bytes, bool exact,
                             bool in_frame) {
  LOCKSTEP_CHECK(size >= 1);
  const auto ranks = static_cast<unsigned>(size);
  const double others = size - 1, share = others / size, data = static_cast<double>(bytes);
  const bool is_power = std::has_single_bit(ranks);
  // Those beyond a power of two give their data to others, and get the result.
  const double rounds = std::bit_width(ranks) - 1, folds = is_power ? 0 : 2;
  const double depth = std::bit_width(ranks - 1);
  // `steps` after one another, of `messages` each rank sends, with `sent` and `added` bytes.
  const auto cost = [&](double steps, double messages, double sent, double added) {
    return steps * costs.latency_s + messages * costs.message_s +
           sent / costs.bandwidth_bytes_per_s + added / costs.adding_bytes_per_s;
  };
  struct Candidate {
    AllReducePlan plan;
    double seconds;
    bool is_canonical;
  };
  const double fold_bytes = folds * data;
  std::vector<Candidate> all = {
      {AllReducePlan::to_all,
       cost(in_frame ? 0 : 1, in_frame ? 0 : others, others * data, others * data), true},
      {AllReducePlan::direct, cost(2, 2 * others, 2 * share * data, share * data), true},
      {AllReducePlan::doubling,
       cost(rounds + folds, rounds + folds, rounds * data + fold_bytes,
            (rounds + folds / 2) * data),
       is_power},
      {AllReducePlan::halving,
       cost(2 * rounds + folds, 2 * rounds + folds, 2 * share * data + fold_bytes,
            (share + folds / 2) * data),
       is_power},
      {AllReducePlan::tree, cost(2 * depth, 2 * depth, 2 * depth * data, depth * data), true},
      {AllReducePlan::ring, cost(2 * others, 2 * others, 2 * share * data, share * data), false}};
  if (costs.engine_bytes_per_s > 0)
    all.push_back({AllReducePlan::engine, costs.engine_s + data / costs.engine_bytes_per_s, false});
  if (exact) std::erase_if(all, [](const Candidate& one) { return !one.is_canonical; });
  std::ranges::stable_sort(all, {}, &Candidate::seconds);
  return {.plan = all[0].plan,
          .expected_s = all[0].seconds,
          .reason = fmt::format(
              "{}: {:.3g} ms expected, then {} with {:.3g} ms ({} ranks, {} bytes, {:.3g} us "
              "latency, {:.3g} MB/s{})",
              name_of(all[0].plan), all[0].seconds * 1e3, name_of(all[1].plan),
              all[1].seconds * 1e3, size, bytes, costs.latency_s * 1e6,
              costs.bandwidth_bytes_per_s * 1e-6, exact ? ", canonical order" : "")};
}

}  // namespace lockstep
