#include "lockstep/update/shared_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>

#include "lockstep/update/update_case_test.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

UpdateSpec small_spec() {
  return {.elements = 3000,
          .groups = {Adam{}, SGD{.momentum = 0.9}},
          .ranges = {{0, 2000, 0}, {2000, 2900, 1}, {2900, 3000, UpdateRange::kAverage}}};
}

std::string error_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

TEST(SharedLayout, PlacesAreApartAlignedAndInside) {
  const UpdateSpec spec = small_spec();
  for (const int slices : {1, 3, 1024}) {
    for (const std::uint64_t buffer_bytes : {0, 1, 64, 1000}) {
      const SharedLayout layout = SharedLayout::of(spec, slices, buffer_bytes);
      const SharedMemory memory(layout.total_bytes());
      const auto state = SharedState::create(memory.span(), spec, layout, first_record(spec));
      std::vector<std::pair<std::byte*, std::size_t>> places;
      const auto add = [&](auto span) {
        places.emplace_back(std::as_writable_bytes(span).data(), span.size_bytes());
        EXPECT_EQ((places.back().first - memory.span().data()) % 64, 0);
      };
      places.emplace_back(memory.span().data() + layout.words_offset(), 128 + slices * 64);
      for (const std::uint64_t step : {0, 1}) {
        places.emplace_back(memory.span().data() + layout.record_offset(step), sizeof(StepRecord));
        add(state.buffers(step));
      }
      add(state.squares());
      for (int slice = 0; slice < slices; ++slice)
        add(state.journal(static_cast<std::uint64_t>(slice)));
      add(state.weights());
      for (const int index : {0, 1}) add(state.state(index));
      EXPECT_EQ(layout.weights_offset() % 4096, 0u);
      std::sort(places.begin(), places.end());
      for (std::size_t i = 0; i + 1 < places.size(); ++i)
        EXPECT_LE(places[i].first + places[i].second, places[i + 1].first) << i;
      EXPECT_LE(places.back().first + places.back().second,
                memory.span().data() + layout.total_bytes());
    }
  }
}

TEST(SharedState, RefusesWhatDiffersByName) {
  const UpdateSpec spec = small_spec();
  const SharedLayout layout = SharedLayout::of(spec, 2, 8);
  const SharedMemory memory(layout.total_bytes());
  const auto error = [&](std::span<std::byte> span) {
    return error_of([&] { SharedState::attach(span, layout); });
  };
  EXPECT_THAT(error(memory.span().first(10)), HasSubstr("too few for a header"));
  EXPECT_THAT(error(memory.span()), HasSubstr("magic"));
  SharedState::create(memory.span(), spec, layout, first_record(spec));
  EXPECT_EQ(error(memory.span()), "no error");
  EXPECT_THAT(error(memory.span().first(layout.total_bytes() - 1)), HasSubstr("but there are"));

  UpdateSpec other = spec;
  other.ranges[1].begin = 2001;
  EXPECT_THAT(error_of([&] { SharedState::attach(memory.span(), SharedLayout::of(other, 2, 8)); }),
              HasSubstr("fingerprint"));
  other.elements = 4000;
  EXPECT_THAT(error_of([&] { SharedState::attach(memory.span(), SharedLayout::of(other, 2, 8)); }),
              HasSubstr("3000 elements, this module has 4000"));
  EXPECT_THAT(error_of([&] { SharedLayout::of(spec, 0); }), HasSubstr("0 slices"));
  EXPECT_THAT(error_of([&] { SharedLayout::of(spec, 1025); }), HasSubstr("1025 slices"));
  other.groups.resize(kMaxGroups + 1);
  EXPECT_THAT(error_of([&] { SharedLayout::of(other, 1); }), HasSubstr("65 parameter groups"));
}

// Whatever a hostile holder writes is an Error or harmless, never a fault. Run under the address
// sanitizer, this is a fuzzer of few rounds.
TEST(SharedState, HostileBytesAreAnErrorOrHarmless) {
  const UpdateCase what{.spec = small_spec()};
  const SharedLayout layout = SharedLayout::of(what.spec, 3, 8);
  const std::vector<VirtualRange> runs = partition_virtual_ranks(4, 3);
  const std::vector<float> slots(2 * 3072, 1.0f);
  const std::vector<std::span<const float>> ranks(3, slots);
  std::mt19937_64 random(11);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    const SharedMemory memory(layout.total_bytes());
    const auto genuine =
        SharedState::create(memory.span(), what.spec, layout, first_record(what.spec));
    genuine.decide(what.plan(first_record(what.spec), runs, 3));
    // Anything before the weights; often the header and the words, and the record's numbers.
    const std::uint64_t places[] = {layout.record_offset(0), layout.record_offset(0),
                                    layout.squares_offset()};
    for (std::uint64_t i = 0; i <= random() % 4; ++i) {
      const std::uint64_t at = random() % places[random() % 3] / 8 * 8;
      const std::uint64_t values[] = {random(), random() % 8, ~std::uint64_t{0},
                                      std::uint64_t{1} << random() % 64};
      std::memcpy(memory.span().data() + at, &values[random() % 4], 8);
    }
    try {
      const SharedState state = SharedState::attach(memory.span(), layout);
      SliceUpdate update(what.spec, state);
      const RecoveryState found = recovery_state(state, what.spec);
      const RecoveryPlan plan = plan_recovery(found, 2);
      for (const std::size_t me : {0, 1})
        recover(update, plan, me, {.ranks = ranks, .stride = 3072});
      if (plan.action == RecoveryPlan::Action::finish)
        state.commit(state.record(found.decided, what.spec));
    } catch (const Error&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 300);
  EXPECT_LT(refused, 2900);
}

TEST(SharedState, CommitNeedsEverySlice) {
  const UpdateCase what{.spec = small_spec(), .virtual_ranks = 2};
  const CaseMemory memory(what, 2);
  const SharedState state = memory.state();
  SliceUpdate update(what.spec, state);
  const StepRecord record = what.plan(first_record(what.spec), {{0, 1}, {1, 2}}, 2);
  state.decide(record);
  update.run(record, memory.contributions(), 1);
  EXPECT_THAT(error_of([&] { state.commit(record); }), HasSubstr("slice 0"));
  EXPECT_EQ(state.committed(), 0u);
  update.run(record, memory.contributions(), 0);
  state.commit(record);
  state.commit(record);  // somebody else's
  EXPECT_EQ(state.committed(), 1u);
  // Late, when the others are at work on the next step.
  const StepRecord next = what.plan(record, {{0, 2}}, 1);
  state.decide(next);
  update.run(next, memory.contributions(), 0);
  state.commit(record);
  EXPECT_EQ(state.committed(), 1u);
}

// --- The decision ---

TEST(RecoveryPlan, BeforeTheDecisionNothingIsFinished) {
  const RecoveryState idle{.committed = 12, .decided = 12, .sealed = {12, 12, 11}};
  EXPECT_EQ(plan_recovery(idle, 2).action, RecoveryPlan::Action::nothing);
  const RecoveryState sealed{.committed = 12, .decided = 12, .sealed = {13, 12, 13}};
  const RecoveryPlan plan = plan_recovery(sealed, 2);
  EXPECT_EQ(plan.action, RecoveryPlan::Action::discard);
  EXPECT_EQ(plan.reason,
            "step 13 is computed again: 2 contributions were sealed, but it was not decided");
  EXPECT_TRUE(plan.tasks.empty());
}

TEST(RecoveryPlan, AfterItEverySliceHasOneWorker) {
  using Task = RecoveryPlan::Task;
  const RecoveryState state{
      .committed = 12,
      .decided = 13,
      .sealed = {13, 13, 13, 13},
      .progress = {{13, 5, false}, {13, 7, true}, {12, 9, false}, {}},
      .whole = {{13, 5, false}, {13, 10, false}, {13, 15, false}, {13, 20, false}}};
  const RecoveryPlan plan = plan_recovery(state, 3);
  EXPECT_EQ(plan.action, RecoveryPlan::Action::finish);
  EXPECT_EQ(plan.tasks, (std::vector<Task>{{0, 0}, {1, 1}, {2, 2}, {3, 0}}));
  EXPECT_EQ(plan.reason, "step 13 was decided and is finished: 1 of 4 slices were whole");
  // Nobody is left but one new worker: it does it all.
  for (const Task& task : plan_recovery(state, 1).tasks) EXPECT_EQ(task.worker, 0u);
}

}  // namespace
}  // namespace lockstep
