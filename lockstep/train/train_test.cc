// The trainer in a world of one, against hand-computed results. Equality over several workers is
// held end to end in tests/; here the pieces: batches, a step's arithmetic, evaluation, stopping,
// refusing non-finite losses, buffers.
#include <ATen/ops/mse_loss.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>

#include <cmath>
#include <limits>

#include "lockstep/base/error.h"
#include "lockstep/train/batches.h"
#include "lockstep/train/trainer.h"
#include "lockstep/train/tree_sum.h"

namespace lockstep {
namespace {

Dataset table(std::vector<float> values, std::vector<float> targets, std::int64_t columns) {
  Dataset data;
  data.source = "test";
  data.sample_shape = {columns};
  data.rows = targets.size();
  data.values = std::move(values);
  data.targets = std::move(targets);
  return data;
}

// y = 2x + 1 for x = 0 … rows - 1, scaled to [0, 1).
Dataset line(std::size_t rows) {
  std::vector<float> x, y;
  for (std::size_t i = 0; i < rows; ++i) {
    x.push_back(static_cast<float>(i) / static_cast<float>(rows));
    y.push_back(2 * x.back() + 1);
  }
  return table(x, y, 1);
}

LossValue squared_error(const at::Tensor& output, const at::Tensor& target) {
  return {at::mse_loss(output, target, at::Reduction::Sum), static_cast<double>(output.size(0))};
}

struct Fixture {
  torch::nn::Linear linear{1, 1};
  Task task{
      linear.ptr(), [this](const at::Tensor& x) { return linear->forward(x); }, squared_error, {}};
  World world = init_from(Place{}, {});
  Fixture() {
    for (const auto& parameter : linear->parameters()) parameter.detach().zero_();
  }
  float weight() const { return linear->weight.item<float>(); }
  float bias() const { return linear->bias.item<float>(); }
};

const OptimizerOptions kSgd{.kind = OptimizerKind::sgd};

TEST(Batches, NormalizeImagesAndGiveThemAChannel) {
  Dataset images;
  images.sample_shape = {1, 2};
  images.bytes = {0, 10, 20, 30};
  images.classes = {1, 0};
  images.class_count = 2;
  images.rows = 2;
  const DatasetBatches batches(images, {{10.0f}, {2.0f}}, TargetForm::signs);
  const std::vector<std::uint64_t> indices = {1, 0, 1};
  const Batch batch = batches.batch(indices);
  EXPECT_EQ(batch.input.sizes().vec(), (std::vector<std::int64_t>{3, 1, 1, 2}));
  EXPECT_EQ(batch.input[0][0][0][1].item<float>(), 10.0f);
  EXPECT_EQ(batch.input[1][0][0][0].item<float>(), -5.0f);
  EXPECT_EQ(batch.target.sizes().vec(), (std::vector<std::int64_t>{3, 1}));
  EXPECT_EQ(batch.target[0][0].item<float>(), -1.0f);
  EXPECT_EQ(batch.target[1][0].item<float>(), 1.0f);
}

TEST(Batches, StatisticsOfAllBytes) {
  Dataset images;
  images.sample_shape = {2, 1};
  images.bytes = {1, 3, 5, 7};
  images.rows = 2;
  const Normalization statistics = image_statistics(images);
  EXPECT_FLOAT_EQ(statistics.mean.at(0), 4.0f);
  EXPECT_FLOAT_EQ(statistics.deviation.at(0), std::sqrt(5.0f));
}

// One full-batch gradient step on 5 rows: dw = -2 sum(x·y) / 5, whatever the number of virtual
// ranks, one of which is short.
TEST(Trainer, OneStepIsTheMeanGradient) {
  const Dataset data = line(5);
  const DatasetBatches train(data, {}, TargetForm::values);
  double gradient = 0;
  for (int i = 0; i < 5; ++i)
    gradient -= 2.0 * double{data.values[i]} * double{data.targets[i]} / 5;
  for (int virtual_ranks : {1, 2, 3, 5}) {
    Fixture fixture;
    Trainer trainer(fixture.world,
                    {.epochs = 1, .global_batch_size = 5, .virtual_ranks = virtual_ranks});
    trainer.fit(fixture.task, kSgd, {.lr = 0.5}, train, nullptr);
    EXPECT_NEAR(fixture.weight(), -0.5 * gradient, 1e-6) << virtual_ranks;
  }
}

TEST(Trainer, LearnsALineAndReportsEpochs) {
  const Dataset data = line(40);
  const DatasetBatches train(data, {}, TargetForm::values);
  Fixture fixture;
  Trainer trainer(fixture.world, {.epochs = 200, .global_batch_size = 16, .virtual_ranks = 3});
  const auto epochs = trainer
                          .fit(fixture.task, {.kind = OptimizerKind::sgd, .momentum = 0.9},
                               {.lr = 0.05}, train, &train)
                          .epochs;
  ASSERT_EQ(epochs.size(), 200u);
  EXPECT_EQ(epochs.back().step, 600);  // 40 rows in batches of 16: 3 steps, the last one short
  EXPECT_NEAR(fixture.weight(), 2.0, 1e-3);
  EXPECT_NEAR(fixture.bias(), 1.0, 1e-3);
  EXPECT_LT(epochs.back().test_loss, 1e-6);
}

TEST(Trainer, ClipsTheMeanGradient) {
  const Dataset data = line(5);
  const DatasetBatches train(data, {}, TargetForm::values);
  Fixture fixture;
  Trainer trainer(fixture.world, {.epochs = 1, .global_batch_size = 5, .clip_grad_norm = 0.25});
  trainer.fit(fixture.task, kSgd, {.lr = 1.0}, train, nullptr);
  EXPECT_NEAR(std::hypot(fixture.weight(), fixture.bias()), 0.25, 1e-6);
}

TEST(Trainer, StopsAtMaxStepsAndAtTolerance) {
  const Dataset data = line(8);
  const DatasetBatches train(data, {}, TargetForm::values);
  Fixture fixture;
  auto epochs = Trainer(fixture.world, {.epochs = 9, .max_steps = 3, .global_batch_size = 4})
                    .fit(fixture.task, kSgd, {.lr = 0.1}, train, nullptr)
                    .epochs;
  EXPECT_EQ(epochs.size(), 2u);
  EXPECT_EQ(epochs.back().step, 3);
  for (bool of_norm : {false, true}) {
    Fixture again;
    epochs = Trainer(again.world, {.epochs = 10000,
                                   .global_batch_size = 8,
                                   .tolerance = 1e-4,
                                   .tolerance_of_gradient_norm = of_norm})
                 .fit(again.task, kSgd, {.lr = 0.1}, train, nullptr)
                 .epochs;
    EXPECT_LT(epochs.size(), 1000u) << of_norm;
    EXPECT_GT(epochs.size(), 3u) << of_norm;
  }
}

TEST(Trainer, RefusesANonFiniteLossAndKeepsTheWeights) {
  Dataset data = line(8);
  data.targets[5] = std::numeric_limits<float>::quiet_NaN();
  const DatasetBatches train(data, {}, TargetForm::values);
  Fixture fixture;
  // In order, batches of 2: rows 4 and 5 come in step 3.
  Trainer trainer(fixture.world, {.epochs = 1, .global_batch_size = 2, .shuffle = false});
  try {
    trainer.fit(fixture.task, kSgd, {.lr = 0.1}, train, nullptr);
    FAIL() << "a NaN loss was accepted";
  } catch (const Error& error) {
    EXPECT_NE(std::string(error.what()).find("step 3: the loss of rank 0 is nan"),
              std::string::npos)
        << error.what();
  }
  EXPECT_TRUE(std::isfinite(fixture.weight()));
  EXPECT_NE(fixture.weight(), 0.0f);
}

// A finite loss whose gradient is not: sqrt at 0.
TEST(Trainer, RefusesANonFiniteGradientNamingTheRank) {
  const Dataset data = table({0, 0}, {0, 0}, 1);
  const DatasetBatches train(data, {}, TargetForm::values);
  Fixture fixture;
  fixture.task.loss = [](const at::Tensor& output, const at::Tensor&) {
    return LossValue{output.sqrt().sum(), 2.0};
  };
  Trainer trainer(fixture.world, {.epochs = 1, .global_batch_size = 2});
  try {
    trainer.fit(fixture.task, kSgd, {.lr = 0.1}, train, nullptr);
    FAIL() << "an infinite gradient was accepted";
  } catch (const Error& error) {
    EXPECT_NE(
        std::string(error.what()).find("step 1: the gradient or a buffer of rank 0 is not finite"),
        std::string::npos)
        << error.what();
  }
  EXPECT_EQ(fixture.bias(), 0.0f);
}

TEST(Trainer, RefusesMoreVirtualRanksThanSamples) {
  const Dataset data = line(3);
  const DatasetBatches train(data, {}, TargetForm::values);
  Fixture fixture;
  Trainer trainer(fixture.world, {.epochs = 1, .global_batch_size = 8, .virtual_ranks = 4});
  EXPECT_THROW(trainer.fit(fixture.task, kSgd, {}, train, nullptr), ConfigError);
}

// Batch norm's running mean after one step is the mean over virtual ranks of what each computed
// alone from the committed one; a virtual rank without samples does not count.
TEST(Trainer, BuffersAreAveragedOverVirtualRanks) {
  const Dataset data = table({1, 3, 10, 30}, {0, 0, 0, 0}, 1);
  const DatasetBatches train(data, {}, TargetForm::values);
  for (auto [virtual_ranks, mean] : {std::pair{1, 11.0}, {2, 11.0}}) {
    torch::nn::BatchNorm1d norm(1);
    const Task task{
        norm.ptr(), [&](const at::Tensor& x) { return norm->forward(x); }, squared_error, {}};
    const World world = init_from(Place{}, {});
    Trainer(world,
            {.epochs = 1, .global_batch_size = 4, .virtual_ranks = virtual_ranks, .shuffle = false})
        .fit(task, kSgd, {.lr = 0.0}, train, nullptr);
    EXPECT_NEAR(norm->running_mean.item<float>(), 0.1 * mean, 1e-6);
    EXPECT_EQ(norm->num_batches_tracked.item<std::int64_t>(), 1);
  }
}

// Batch norm hides an overflowing variance from the loss.
TEST(Trainer, RefusesANonFiniteBuffer) {
  const Dataset data = table({0, 3e38f, -3e38f, 1}, {0, 0, 0, 0}, 1);
  const DatasetBatches train(data, {}, TargetForm::values);
  torch::nn::BatchNorm1d norm(1);
  const Task task{norm.ptr(),
                  [&](const at::Tensor& x) { return norm->forward(x).mul(0).nan_to_num(); },
                  squared_error,
                  {}};
  const World world = init_from(Place{}, {});
  EXPECT_THROW(Trainer(world, {.epochs = 1, .global_batch_size = 4})
                   .fit(task, kSgd, {.lr = 0.0}, train, nullptr),
               Error);
}

TEST(Evaluate, EverySampleOnceWithAShortLastBatch) {
  const Dataset data = line(7);
  const DatasetBatches batches(data, {}, TargetForm::values);
  Fixture fixture;
  double expected = 0;
  for (float y : data.targets) expected += double{y} * double{y} / 7;
  for (std::int64_t batch_size : {1, 3, 7, 100}) {
    const Evaluation evaluation = evaluate(fixture.world, fixture.task, batches, batch_size);
    EXPECT_NEAR(evaluation.loss, expected, 1e-6);
    EXPECT_EQ(evaluation.samples, 7u);
  }
}

}  // namespace
}  // namespace lockstep
