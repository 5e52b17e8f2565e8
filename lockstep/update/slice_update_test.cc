#include "lockstep/update/slice_update.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "lockstep/update/update_case_test.h"

namespace lockstep {
namespace {

// Two groups that alternate, frozen parameters, gaps, float buffers; cuts inside and across tiles.
UpdateSpec mixed_spec(const OptimizerOptions& first, const OptimizerOptions& second) {
  constexpr int kAverage = UpdateRange::kAverage;
  return {.elements = 5 * 1024 + 300,
          .groups = {first, second},
          .ranges = {{0, 700, 0},
                     {700, 705, 1},
                     {720, 1024, 0},
                     {1024, 3072, 0},
                     {3072, 3073, 1},
                     {3500, 4900, 1},
                     {4900, 5000, kAverage},
                     {5100, 5420, kAverage}}};
}

// One step by all slices of one process, as the workers do it.
void make_step(const UpdateCase& what, const CaseMemory& memory, SliceUpdate& update, int ranks) {
  const SharedState state = memory.state();
  const auto runs = partition_virtual_ranks(what.virtual_ranks, ranks);
  const StepRecord last = state.record(state.committed(), what.spec);
  StepRecord record = what.plan(last, runs, ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    memory.contribute(what, record.step, rank, runs[static_cast<std::size_t>(rank)]);
    state.seal(rank, record.step);
  }
  if (what.max_norm > 0) {
    for (std::size_t slice = 0; slice < record.slices(); ++slice)
      update.measure(record, memory.contributions(), slice);
    clip(record, update.squares(), what.max_norm);
  }
  state.decide(record);
  for (std::size_t slice = 0; slice < record.slices(); ++slice)
    update.run(record, memory.contributions(), slice);
  state.commit(record);
}

const std::vector<OptimizerOptions> kEveryOptimizer = {
    SGD{.lr = 0.1, .weight_decay = 0.01},
    SGD{.lr = 0.1, .momentum = 0.9, .dampening = 0.3},
    SGD{.lr = 0.1, .momentum = 0.9, .nesterov = true},
    Adam{.lr = 0.01, .weight_decay = 0.1},
    Adam{.lr = 0.01, .amsgrad = true},
    AdamW{.lr = 0.01},
    Adagrad{.lr = 0.1, .lr_decay = 0.1, .weight_decay = 0.01, .initial_accumulator_value = 0.1},
    RMSprop{},
    RMSprop{.momentum = 0.9},
    RMSprop{.centered = true},
    RMSprop{.weight_decay = 0.01, .momentum = 0.9, .centered = true}};

TEST(SliceUpdate, GivesTheTwinsBitsForAnyOptimizerPartitionAndClipping) {
  for (std::size_t i = 0; i < kEveryOptimizer.size(); ++i) {
    for (const double max_norm : {0.0, 5.0}) {
      const UpdateCase what{.spec = mixed_spec(kEveryOptimizer[i], kEveryOptimizer[(i + 4) % 11]),
                            .virtual_ranks = 5,
                            .max_norm = max_norm};
      const naive::Weights expected = what.twin_after(3);
      for (const int ranks : {1, 2, 3, 4, 5}) {
        SCOPED_TRACE(testing::Message() << "optimizer " << i << " on " << ranks << " ranks");
        const CaseMemory memory(what, 5);
        SliceUpdate update(what.spec, memory.state());
        for (int step = 0; step < 3; ++step) make_step(what, memory, update, ranks);
        ASSERT_TRUE(same_bits(memory.state(), expected));
        EXPECT_EQ(memory.state().committed(), 3u);
        const StepRecord record = memory.state().record(3, what.spec);
        EXPECT_EQ(max_norm > 0, record.clip_factor < 1.0);
      }
    }
  }
}

TEST(SliceUpdate, ChangingTheNumberOfRanksKeepsTheBits) {
  const UpdateCase what{.spec = mixed_spec(Adam{.lr = 0.01}, SGD{.momentum = 0.9}),
                        .virtual_ranks = 7,
                        .max_norm = 0.5};
  const CaseMemory memory(what, 5);
  SliceUpdate update(what.spec, memory.state());
  for (const int ranks : {5, 1, 3, 2, 4}) make_step(what, memory, update, ranks);
  EXPECT_TRUE(same_bits(memory.state(), what.twin_after(5)));
}

TEST(SliceUpdate, ASliceMayBeEmpty) {
  const UpdateCase what{.spec = {.elements = 10, .groups = {Adam{}}, .ranges = {{0, 10, 0}}}};
  const CaseMemory memory(what, 4);
  SliceUpdate update(what.spec, memory.state());
  make_step(what, memory, update, 4);
  EXPECT_TRUE(same_bits(memory.state(), what.twin_after(1)));
}

TEST(SliceUpdate, SquaresAreThoseOfSumOfSquares) {
  const UpdateCase what{
      .spec = {.elements = 5000, .groups = {SGD{}}, .ranges = {{0, 1500, 0}, {1500, 5000, 0}}},
      .virtual_ranks = 1};
  const CaseMemory memory(what, 1);
  SliceUpdate update(what.spec, memory.state());
  const StepRecord record = what.plan(first_record(what.spec), {{0, 1}}, 1);
  memory.contribute(what, 1, 0, {0, 1});
  update.measure(record, memory.contributions(), 0);
  EXPECT_EQ(update.squares(), sum_of_squares(memory.contributions().ranks[0].first(5000)));
}

TEST(SliceUpdate, MeasuringFindsWhatIsNotFiniteEvenIfOnlyTheSumIsNot) {
  const UpdateCase what{.spec = mixed_spec(SGD{}, SGD{}), .virtual_ranks = 2};
  const CaseMemory memory(what, 2);
  SliceUpdate update(what.spec, memory.state());
  const std::vector<VirtualRange> runs = {{0, 1}, {1, 2}};
  const StepRecord record = what.plan(first_record(what.spec), runs, 2);
  const auto squares_with = [&](std::size_t element, float a, float b) {
    for (int rank = 0; rank < 2; ++rank) {
      memory.contribute(what, 1, rank, runs[static_cast<std::size_t>(rank)]);
      const float value = rank == 0 ? a : b;
      const_cast<float&>(memory.contributions().ranks[static_cast<std::size_t>(rank)][element]) =
          value;
    }
    for (const std::size_t slice : {0, 1}) update.measure(record, memory.contributions(), slice);
    return update.squares();
  };
  constexpr float kLarge = 3e38f;
  for (const std::size_t element : {0, 703, 3072, 4899, 4950, 5419}) {
    EXPECT_TRUE(std::isfinite(squares_with(element, kLarge, -kLarge))) << element;
    EXPECT_FALSE(std::isfinite(squares_with(element, kLarge, kLarge))) << element;
    EXPECT_FALSE(std::isfinite(squares_with(element, NAN, 1))) << element;
  }
  for (const std::size_t element : {710, 3200, 5050})  // frozen, or padding: nobody reads it
    EXPECT_TRUE(std::isfinite(squares_with(element, NAN, INFINITY))) << element;
}

TEST(SliceUpdate, ASkippedStepChangesNothingButTheStep) {
  const UpdateCase what{.spec = mixed_spec(Adam{}, Adam{}), .virtual_ranks = 2};
  const CaseMemory memory(what, 2);
  const SharedState state = memory.state();
  SliceUpdate update(what.spec, state);
  make_step(what, memory, update, 2);
  const std::vector<float> before(state.weights().begin(), state.weights().end());
  StepRecord record = what.plan(state.record(1, what.spec), partition_virtual_ranks(2, 2), 2);
  EXPECT_EQ(record.groups.items[0].steps, 2u);
  skip(record);
  state.decide(record);
  for (const std::size_t slice : {0, 1}) update.run(record, memory.contributions(), slice);
  state.commit(record);
  EXPECT_TRUE(same_bits(state.weights(), before));
  EXPECT_EQ(state.committed(), 2u);
  EXPECT_EQ(state.record(2, what.spec).groups.items[1].steps, 1u);
  EXPECT_EQ(what.plan(state.record(2, what.spec), {{0, 2}}, 1).groups.items[1].steps, 2u);
}

// Every instant of a slice's update, and every instant of its repetition, as the end of whoever was
// at work.
TEST(SliceUpdate, IsIdempotentFromEveryInstant) {
  struct Killed {};
  const UpdateCase what{.spec = mixed_spec(AdamW{}, SGD{.momentum = 0.9}), .virtual_ranks = 2};
  const naive::Weights expected = what.twin_after(1);
  const auto runs = partition_virtual_ranks(2, 2);
  const StepRecord record = what.plan(first_record(what.spec), runs, 1);
  // True if it died.
  const auto dies = [&](const CaseMemory& memory, int instant) {
    SliceUpdate update(what.spec, memory.state());
    try {
      update.run(record, memory.contributions(), 0, [&](auto, auto) {
        if (instant-- == 0) throw Killed{};
      });
    } catch (const Killed&) {
      return true;
    }
    return false;
  };
  int first = 0;
  for (bool died = true; died; ++first) {
    for (int second = 0;; second += 61) {
      const CaseMemory memory(what, 2);
      for (const int rank : {0, 1})
        memory.contribute(what, 1, rank, runs[static_cast<std::size_t>(rank)]);
      memory.state().decide(record);
      died = dies(memory, first);
      const bool died_again = dies(memory, second);
      ASSERT_FALSE(dies(memory, -1));
      ASSERT_TRUE(same_bits(memory.state(), expected)) << first << " " << second;
      memory.state().commit(record);
      if (!died_again) break;
    }
  }
  EXPECT_GT(first, 50);
}

TEST(StepRecord, LossScaleAndClippingGoIntoOneFactor) {
  const UpdateSpec spec{.elements = 10, .groups = {SGD{.lr = 0.5}}, .ranges = {{0, 10, 0}}};
  const std::vector<VirtualLoss> losses = {{1, 3}, {1, 1}, {}};
  const std::vector<VirtualRange> runs = {{0, 3}};
  StepRecord record = plan_step(
      spec, first_record(spec),
      {.groups = spec.groups, .runs = runs, .losses = losses, .slices = 1, .loss_scale = 8});
  EXPECT_EQ(record.total_weight, 4);
  EXPECT_EQ(record.averaged_over, 2u);
  EXPECT_EQ(record.groups.items[0].numbers.gradient_scale, 1.0f / 32);
  clip(record, 64 * 64, 1.0);  // norm 64 / 32
  EXPECT_EQ(record.gradient_norm, 2.0);
  EXPECT_EQ(record.clip_factor, 0.5);
  EXPECT_EQ(record.groups.items[0].numbers.gradient_scale, 1.0f / 64);
}

TEST(StepRecord, TilesAreShared) {
  EXPECT_EQ(partition_tiles(5 * 1024 + 1, 4), (std::vector<std::uint64_t>{0, 2, 4, 5, 6}));
  EXPECT_EQ(partition_tiles(1024, 3), (std::vector<std::uint64_t>{0, 1, 1, 1}));
  EXPECT_EQ(partition_tiles(0, 1), (std::vector<std::uint64_t>{0, 0}));
}

}  // namespace
}  // namespace lockstep
