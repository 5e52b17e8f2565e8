#include "lockstep/update/optimizer.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <random>

#include "lockstep/base/error.h"
#include "lockstep/update/naive_test.h"

namespace lockstep {
namespace {

// --- Against torch.optim (PyTorch 2.13, 100 steps, learning rate and settings as named) ---

struct Known {
  OptimizerOptions options;
  double lr;
  std::vector<float> weights;  // after 100 steps from {1, -2, 0.5, 0}
};

std::vector<float> train(const Known& known, float gradient_scale) {
  std::vector<float> weights = {1.0f, -2.0f, 0.5f, 0.0f};
  Optimizer optimizer(known.options, weights.size());
  for (int step = 0; step < 100; ++step) {
    std::vector<float> gradient(weights.size());
    for (int i = 0; i < 4; ++i)
      gradient[static_cast<std::size_t>(i)] =
          static_cast<float>((step * 7 + i * 3) % 11 - 5) / 8 / gradient_scale;
    optimizer.step(weights, gradient, gradient_scale, known.lr);
  }
  return weights;
}

TEST(Optimizer, MatchesTorchOptim) {
  using enum OptimizerKind;
  const Known cases[] = {
      {{.kind = sgd}, 0.05, {1.03125f, -1.98749995f, 0.493750006f, -0.0250000004f}},
      {{.kind = sgd, .momentum = 0.9, .weight_decay = 0.01},
       0.05,
       {0.660634458f, -1.29045796f, 0.363293499f, -0.0450940393f}},
      {{.kind = sgd, .momentum = 0.9, .nesterov = true},
       0.05,
       {1.0863564f, -2.06829786f, 0.559362292f, -0.0854762122f}},
      {{.kind = adam}, 0.01, {1.01597965f, -2.00601029f, 0.497978002f, -0.0176117513f}},
      {{.kind = adam, .weight_decay = 0.1},
       0.01,
       {0.796094f, -1.59025419f, 0.384876937f, -0.0138549721f}},
      {{.kind = adamw, .weight_decay = 0.1},
       0.01,
       {0.919279456f, -1.81493604f, 0.450668156f, -0.0159985647f}},
  };
  for (const Known& known : cases) {
    const std::vector<float> weights = train(known, 1.0f);
    // PyTorch fuses multiply-adds where the machine can: a few units in the last place a step.
    for (std::size_t i = 0; i < 4; ++i)
      EXPECT_NEAR(weights[i], known.weights[i], 2e-6)
          << "case " << (&known - cases) << " element " << i;
    // A gradient summed over four and scaled by a quarter is the same gradient: powers of two.
    EXPECT_EQ(weights, train(known, 0.25f));
  }
}

TEST(Optimizer, SplittingTheSpanKeepsTheBits) {
  constexpr std::size_t kCount = 1037;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  std::vector<float> whole(kCount);
  for (float& value : whole) value = normal(random);
  std::vector<float> split = whole;
  constexpr std::size_t kCut = 333;

  const OptimizerOptions options{.kind = OptimizerKind::adamw, .weight_decay = 0.01};
  Optimizer one(options, kCount);
  Optimizer left(options, kCut);
  Optimizer right(options, kCount - kCut);
  for (int step = 0; step < 20; ++step) {
    std::vector<float> gradient(kCount);
    for (float& value : gradient) value = normal(random);
    const std::span<const float> g = gradient;
    one.step(whole, g, 0.3f, 1e-3);
    left.step(std::span(split).first(kCut), g.first(kCut), 0.3f, 1e-3);
    right.step(std::span(split).subspan(kCut), g.subspan(kCut), 0.3f, 1e-3);
  }
  EXPECT_EQ(whole, split);
}

// --- Kernels against a naive twin, bit for bit ---

struct Memory {
  std::vector<float> gradient;
  std::array<std::vector<float>, 1 + kMaxStateArrays> arrays;  // weights, states

  std::vector<std::uint32_t> bits() const {
    std::vector<std::uint32_t> all;
    for (const auto& array : arrays)
      for (const float value : array) all.push_back(std::bit_cast<std::uint32_t>(value));
    return all;
  }
};

Memory random_memory(std::size_t count) {
  std::mt19937 random(static_cast<unsigned>(count));
  std::normal_distribution<float> normal;
  Memory memory;
  const auto fill = [&](std::vector<float>& array) {
    for (std::size_t i = 0; i < count; ++i) array.push_back(normal(random));
  };
  fill(memory.gradient);
  for (auto& array : memory.arrays) fill(array);
  for (const std::size_t squares : {1, 2, 3})  // wherever an optimizer has them
    for (float& value : memory.arrays[squares]) value *= value;
  memory.gradient[3] = 0.0f;
  memory.gradient[17] = 1e-40f;  // subnormal
  memory.arrays[2][5] = 0.0f;
  return memory;
}

StepNumbers some_numbers(UpdateKernel kernel) {
  return {.kernel = kernel,
          .gradient_scale = 0.37f,
          .weight_decay = 0.013f,
          .shrink = kernel == UpdateKernel::adam ? 0.999f : 1.0f,
          .lr = 0.021f,
          .momentum = 0.9f,
          .one_minus_dampening = 0.7f,
          .beta1 = 0.9f,
          .one_minus_beta1 = 0.1f,
          .beta2 = 0.999f,
          .one_minus_beta2 = 0.001f,
          .root_correction2 = 0.04f,
          .eps = 1e-8f,
          .step_size = 0.003f};
}

void naive_steps(const StepNumbers& numbers, Memory& memory, std::size_t offset,
                 std::size_t count) {
  for (std::size_t i = offset; i < offset + count; ++i) {
    auto& [weights, first, second, third] = memory.arrays;
    float state[kMaxStateArrays] = {first[i], second[i], third[i]};
    naive::update_element(numbers, memory.gradient[i], weights[i], state);
    first[i] = state[0];
    second[i] = state[1];
    third[i] = state[2];
  }
}

// In place, or into other memory as the journal is.
void kernel_steps(const UpdateKernels& kernels, const StepNumbers& numbers, Memory& memory,
                  std::size_t offset, std::size_t count, bool in_place) {
  Memory after = memory;
  Memory& to = in_place ? memory : after;
  StepArrays arrays{.gradient = memory.gradient.data() + offset,
                    .weights = memory.arrays[0].data() + offset,
                    .states = {},
                    .new_weights = to.arrays[0].data() + offset,
                    .new_states = {},
                    .count = count};
  for (int i = 0; i < state_arrays(numbers.kernel); ++i) {
    const auto k = static_cast<std::size_t>(i);
    arrays.states[k] = memory.arrays[1 + k].data() + offset;
    arrays.new_states[k] = to.arrays[1 + k].data() + offset;
  }
  kernels.step(numbers.kernel)(numbers, arrays);
  if (!in_place) memory = after;
}

TEST(UpdateKernels, EveryInstructionSetGivesTheNaiveBits) {
  for (std::size_t kernel = 0; kernel < kUpdateKernelCount; ++kernel) {
    const StepNumbers numbers = some_numbers(static_cast<UpdateKernel>(kernel));
    for (const std::size_t count : {0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 1024, 1031}) {
      for (const std::size_t offset : {0, 1, 3, 16}) {
        Memory expected = random_memory(1100);
        const Memory start = expected;
        for (int i = 0; i < 3; ++i) naive_steps(numbers, expected, offset, count);
        for (const UpdateKernels& kernels : all_update_kernels()) {
          if (!kernels.usable) continue;
          SCOPED_TRACE(testing::Message() << kernels.name << " kernel " << kernel << ": " << count
                                          << " at " << offset);
          Memory actual = start;
          for (int i = 0; i < 3; ++i)
            kernel_steps(kernels, numbers, actual, offset, count, i % 2 == 0);
          ASSERT_EQ(actual.bits(), expected.bits());
        }
      }
    }
  }
  EXPECT_TRUE(update_kernels().usable);
  EXPECT_TRUE(all_update_kernels().front().usable);
}

TEST(UpdateKernels, EveryInstructionSetAddsSquaresAlikeAndFindsTheLargest) {
  const Memory memory = random_memory(1100);
  const float* const values = memory.gradient.data();
  for (const std::size_t count : {0, 1, 15, 16, 17, 100, 1023, 1024}) {
    float largest = 0;
    for (std::size_t i = 0; i < count; ++i) largest = std::max(largest, std::abs(values[i]));
    for (const UpdateKernels& kernels : all_update_kernels()) {
      if (!kernels.usable) continue;
      EXPECT_EQ(kernels.tile_squares(values, count),
                all_update_kernels().front().tile_squares(values, count));
      EXPECT_EQ(kernels.magnitude_bits(values, count), std::bit_cast<std::uint32_t>(largest));
    }
  }
}

TEST(MaxMagnitude, IsInfiniteWhereAnythingIsNotFinite) {
  EXPECT_EQ(max_magnitude({}), 0.0f);
  for (const float bad : {INFINITY, -INFINITY, NAN, -NAN}) {
    std::vector<float> values(1000, -2.5f);
    EXPECT_EQ(max_magnitude(values), 2.5f);
    values[777] = bad;
    EXPECT_EQ(max_magnitude(values), INFINITY);
  }
}

// --- Options ---

TEST(Options, HaveTorchOptimsDefaultsAndAreChecked) {
  EXPECT_EQ(OptimizerOptions(AdamW({.lr = 0.5})).weight_decay, 1e-2);
  EXPECT_EQ(OptimizerOptions(Adagrad{}).eps, 1e-10);
  EXPECT_EQ(OptimizerOptions(RMSprop{}).lr, 1e-2);
  for (std::size_t kernel = 0; kernel < kUpdateKernelCount; ++kernel)
    EXPECT_LE(state_arrays(static_cast<UpdateKernel>(kernel)), kMaxStateArrays);
  for (const OptimizerOptions& options : std::vector<OptimizerOptions>{
           SGD{}, SGD{.momentum = 0.9}, Adam{}, AdamW{.amsgrad = true}, Adagrad{}, RMSprop{},
           RMSprop{.momentum = 0.9}, RMSprop{.centered = true},
           RMSprop{.momentum = 0.9, .centered = true}}) {
    EXPECT_NO_THROW(check(options, "group"));
    EXPECT_EQ(static_cast<int>(state_names(options).size()), state_arrays(kernel_of(options)));
  }
  for (const OptimizerOptions& options : std::vector<OptimizerOptions>{
           SGD{.lr = -1}, SGD{.lr = NAN}, SGD{.momentum = INFINITY}, SGD{.nesterov = true},
           SGD{.momentum = 0.9, .dampening = 0.1, .nesterov = true}, SGD{.dampening = NAN},
           Adam{.betas = {1.0, 0.999}}, Adam{.betas = {0.9, -0.1}}, Adam{.eps = -1},
           Adagrad{.lr_decay = -1}, Adagrad{.initial_accumulator_value = 1e39},
           RMSprop{.alpha = -0.1}})
    EXPECT_THROW(check(options, "parameter group 1"), ConfigError);
}

// --- Sum of squares ---

TEST(SumOfSquares, CountsEveryElementOnce) {
  for (const std::size_t count : {0, 1, 15, 16, 17, 1023, 1024, 1025, 5000}) {
    std::vector<float> values(count);
    double expected = 0;
    for (std::size_t i = 0; i < count; ++i) {
      values[i] = static_cast<float>(i % 97) - 48;
      expected += static_cast<double>(values[i]) * values[i];  // whole numbers: exact in any order
    }
    EXPECT_EQ(sum_of_squares(values), expected) << count;
  }
}

TEST(SumOfSquares, AddsTilesInOrder) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> values(4 * 1024 + 100);
  for (float& value : values) value = normal(random);
  double by_tile = 0;
  for (std::size_t begin = 0; begin < values.size(); begin += 1024)
    by_tile += sum_of_squares(
        std::span(values).subspan(begin, std::min<std::size_t>(1024, values.size() - begin)));
  EXPECT_EQ(sum_of_squares(values), by_tile);

  std::vector<float> padded = values;  // zero padding is neutral
  padded.resize(values.size() + 28);
  EXPECT_EQ(sum_of_squares(padded), by_tile);
}

// --- Schedules ---

TEST(LearningRate, ConstantAndWarmUp) {
  EXPECT_EQ(learning_rate({.lr = 0.5}, 0), 0.5);
  EXPECT_EQ(learning_rate({.lr = 0.5}, 1'000'000), 0.5);
  const Schedule linear{.kind = Schedule::Kind::linear, .lr = 0.5, .warmup_steps = 4};
  EXPECT_EQ(learning_rate(linear, 0), 0.125);
  EXPECT_EQ(learning_rate(linear, 2), 0.375);
  EXPECT_EQ(learning_rate(linear, 3), 0.5);
  EXPECT_EQ(learning_rate(linear, 4), 0.5);
}

TEST(LearningRate, CosineFallsToItsMinimumAndStays) {
  const Schedule cosine{.kind = Schedule::Kind::cosine,
                        .lr = 1.0,
                        .min_lr = 0.2,
                        .warmup_steps = 10,
                        .total_steps = 110};
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 4), 0.5);
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 10), 1.0);
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 60), 0.6);
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 110), 0.2);
  EXPECT_DOUBLE_EQ(learning_rate(cosine, 5000), 0.2);
  for (std::int64_t step = 11; step <= 110; ++step)
    EXPECT_LT(learning_rate(cosine, step), learning_rate(cosine, step - 1));
  // A warm-up longer than the run leaves nothing to fall: no division by zero.
  EXPECT_DOUBLE_EQ(learning_rate({.kind = Schedule::Kind::cosine, .lr = 1.0, .warmup_steps = 5}, 7),
                   0.0);
}

TEST(LearningRate, StepFallsByGamma) {
  const Schedule step{.kind = Schedule::Kind::step, .lr = 1.0, .step_size = 30, .gamma = 0.5};
  EXPECT_EQ(learning_rate(step, 29), 1.0);
  EXPECT_EQ(learning_rate(step, 30), 0.5);
  EXPECT_EQ(learning_rate(step, 90), 0.125);
}

TEST(LearningRate, OnlyLinearAndCosineWarmUp) {
  using Kind = Schedule::Kind;
  for (const Kind kind : {Kind::constant, Kind::step, Kind::linear, Kind::cosine}) {
    const bool warms_up = kind == Kind::linear || kind == Kind::cosine;
    const Schedule schedule{
        .kind = kind, .lr = 1.0, .warmup_steps = 4, .total_steps = 100, .step_size = 50};
    EXPECT_EQ(learning_rate(schedule, 0), warms_up ? 0.25 : 1.0);
  }
}

}  // namespace
}  // namespace lockstep
