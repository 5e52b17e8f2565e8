// The Trainer as a library: modules and data sets of a user's, callbacks, checkpoints without an
// agent, resumption in one process. Kills and other numbers of workers: tests/resume_test.py.
#include <ATen/Context.h>
#include <ATen/ops/scalar_tensor.h>
#include <ATen/ops/tensor.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/container/sequential.h>
#include <torch/nn/modules/dropout.h>
#include <torch/nn/modules/linear.h>

#include <cstdlib>

#include "lockstep/base/error.h"
#include "lockstep/checkpoint/checkpoint.h"
#include "lockstep/train/batches.h"
#include "lockstep/train/losses.h"
#include "lockstep/train/trainer.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

class Folder {
 public:
  Folder() {
    char name[] = "/tmp/lockstep-fit-XXXXXX";
    path_ = ::mkdtemp(name);
  }
  ~Folder() { fs::remove_all(path_); }
  const fs::path& path() const { return path_; }

 private:
  fs::path path_;
};

// What torch::data calls a map-style data set: two classes on a line.
struct Line {
  struct Example {
    at::Tensor data, target;
  };
  std::size_t rows = 54;
  Example get(std::size_t index) {
    const auto x = static_cast<float>(index) / static_cast<float>(rows);
    return {at::tensor({x, 1 - x}), at::scalar_tensor(x > 0.4f ? 1 : 0, at::kLong)};
  }
  std::optional<std::size_t> size() const { return rows; }
};

torch::nn::Sequential make_net() {
  at::manual_seed(3);
  return torch::nn::Sequential(torch::nn::Linear(2, 6), torch::nn::BatchNorm1d(6),
                               torch::nn::Dropout(0.3), torch::nn::Linear(6, 2));
}

std::vector<float> values_of(const torch::nn::Sequential& net) {
  std::vector<float> values;
  for (const auto& tensors : {net->parameters(), net->buffers()})
    for (const at::Tensor& tensor : tensors) {
      const at::Tensor floats = tensor.to(at::kFloat).contiguous();
      values.insert(values.end(), floats.const_data_ptr<float>(),
                    floats.const_data_ptr<float>() + floats.numel());
    }
  return values;
}

World alone() { return init_from(Place{}, {}); }

// 54 samples in batches of 16: 4 steps an epoch, the last one of 6 samples.
TrainerOptions options(const fs::path& folder) {
  return {.epochs = 4,
          .global_batch_size = 16,
          .virtual_ranks = 2,
          .clip_grad_norm = 1.0,
          .checkpoint_dir = folder,
          .resume = true};
}

FitReport fit(const torch::nn::Sequential& net, const TrainerOptions& with) {
  return Trainer(alone(), with).fit(net, AdamW({.lr = 0.05}), Line{}, Line{20}, cross_entropy);
}

TEST(Fit, ModuleHoldersMapDataSetsAndLossesWithAccuracy) {
  const torch::nn::Sequential net = make_net();
  const FitReport report = fit(net, {.epochs = 30, .global_batch_size = 16});
  EXPECT_EQ(report.epochs.size(), 30u);
  EXPECT_EQ(report.steps, 120);
  EXPECT_EQ(report.stopped_because, "30 epochs");
  EXPECT_GT(report.epochs.back().test_accuracy, 0.8);
  ASSERT_TRUE(report.best_epoch.has_value());
  for (const EpochSummary& epoch : report.epochs)
    EXPECT_LE(report.epochs[static_cast<std::size_t>(*report.best_epoch) - 1].test_loss,
              epoch.test_loss);
}

TEST(Fit, WithoutATestSetNothingIsEvaluated) {
  const FitReport report = Trainer(alone(), {.epochs = 1, .global_batch_size = 16})
                               .fit(make_net(), SGD({.lr = 0.1}), Line{}, cross_entropy);
  EXPECT_FALSE(report.epochs.at(0).evaluated);
  EXPECT_FALSE(report.best_epoch.has_value());
}

// Stopped by a callback after every step that there is, in turn.
TEST(Fit, GoesOnFromAnyStepWithTheSameBits) {
  const torch::nn::Sequential whole = make_net();
  TrainerOptions unbroken = options({});
  unbroken.resume = false;
  const FitReport expected = fit(whole, unbroken);
  for (std::int64_t stop = 1; stop < 16; ++stop) {
    const Folder folder;
    TrainerOptions stopping = options(folder.path());
    stopping.callbacks.on_step = [&](const StepSummary& step) { return step.step < stop; };
    const FitReport first = fit(make_net(), stopping);
    EXPECT_EQ(first.steps, stop);
    EXPECT_EQ(first.stopped_because, "a callback");
    TrainerOptions resuming = options(folder.path());
    resuming.virtual_ranks = 0;  // as it was begun
    const torch::nn::Sequential net = make_net();
    const FitReport second = fit(net, resuming);
    EXPECT_EQ(second.resumed_step, stop);
    EXPECT_EQ(values_of(net), values_of(whole)) << "stopped at " << stop;
    ASSERT_EQ(second.epochs.size(), expected.epochs.size());
    for (std::size_t i = 0; i < second.epochs.size(); ++i) {
      EXPECT_EQ(second.epochs[i].train_loss, expected.epochs[i].train_loss) << stop << " " << i;
      EXPECT_EQ(second.epochs[i].test_loss, expected.epochs[i].test_loss);
      EXPECT_EQ(second.epochs[i].samples, expected.epochs[i].samples);
    }
  }
}

TEST(Fit, AFinishedRunStaysAndMoreEpochsGoOn) {
  const Folder folder;
  const torch::nn::Sequential four = make_net(), again = make_net(), longer = make_net();
  fit(four, options(folder.path()));
  EXPECT_EQ(fit(again, options(folder.path())).steps, 16);
  EXPECT_EQ(values_of(again), values_of(four));
  TrainerOptions more = options(folder.path());
  more.epochs = 6;
  EXPECT_EQ(fit(longer, more).steps, 24);
  more.checkpoint_dir.clear();
  more.resume = false;
  const torch::nn::Sequential whole = make_net();
  fit(whole, more);
  EXPECT_EQ(values_of(longer), values_of(whole));
}

TEST(Fit, AnotherJobOrModelIsRefusedByName) {
  const Folder folder;
  fit(make_net(), options(folder.path()));
  const auto message = [&](const torch::nn::Sequential& net, const TrainerOptions& with) {
    try {
      fit(net, with);
    } catch (const ConfigError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  TrainerOptions other = options(folder.path());
  other.seed = 9;
  EXPECT_THAT(message(make_net(), other), HasSubstr("seed is 9, in the checkpoint 1; hint: "));
  other = options(folder.path());
  other.resume = false;
  EXPECT_THAT(message(make_net(), other), HasSubstr("a checkpoint of an earlier run"));
  const torch::nn::Sequential wider(torch::nn::Linear(2, 7), torch::nn::Linear(7, 2));
  EXPECT_THAT(message(wider, options(folder.path())),
              HasSubstr("tensor \"model/0.weight\" is float32 [6, 2], here float32 [7, 2]"));
  fs::remove_all(checkpoint_path(folder.path(), 16));
  write_checkpoint(folder.path(), {.step = 20, .state = R"({"a": 1})", .tensors = {}});
  EXPECT_THAT(message(make_net(), options(folder.path())),
              HasSubstr("no checkpoint of a training run"));
}

TEST(Fit, CallbacksSeeEveryStepEpochAndCheckpoint) {
  const Folder folder;
  std::vector<std::int64_t> steps, epochs, checkpoints;
  TrainerOptions with = options(folder.path());
  with.checkpoint_every_epochs = 0;
  with.checkpoint_every_steps = 3;
  with.checkpoint_keep = 100;
  with.callbacks = {
      .on_step =
          [&](const StepSummary& step) {
            steps.push_back(step.step);
            return true;
          },
      .on_epoch =
          [&](const EpochSummary& epoch) {
            epochs.push_back(epoch.epoch);
            return epoch.epoch < 3;
          },
      .on_checkpoint = [&](const CheckpointSummary& one) { checkpoints.push_back(one.step); }};
  const FitReport report = fit(make_net(), with);
  EXPECT_EQ(report.stopped_because, "a callback");
  EXPECT_EQ(steps.size(), 12u);
  EXPECT_EQ(epochs, (std::vector<std::int64_t>{1, 2, 3}));
  for (const std::int64_t step : {3, 6, 9, 12}) {
    EXPECT_THAT(checkpoints, testing::Contains(step));
    EXPECT_TRUE(fs::exists(checkpoint_path(folder.path(), static_cast<std::uint64_t>(step))));
  }
}

TEST(Fit, PatienceStopsAndNeedsATestSet) {
  TrainerOptions with{.epochs = 50, .global_batch_size = 16, .patience = 2, .min_delta = 10};
  const FitReport report = fit(make_net(), with);
  EXPECT_EQ(report.epochs.size(), 3u);
  EXPECT_THROW(Trainer(alone(), with).fit(make_net(), SGD(), Line{}, cross_entropy), ConfigError);
}

// Pieces add up to the same gradient but for rounding; with batch norm they would see other
// batches.
TEST(Fit, AccumulationIsTheSameStep) {
  std::vector<std::vector<float>> results;
  for (const std::int64_t pieces : {1, 3, 100}) {
    at::manual_seed(5);
    const torch::nn::Sequential net(torch::nn::Linear(2, 200), torch::nn::Linear(200, 200),
                                    torch::nn::Linear(200, 2));
    Trainer(alone(),
            {.epochs = 1, .global_batch_size = 16, .virtual_ranks = 2, .accumulate = pieces})
        .fit(net, SGD({.lr = 0.1}), Line{}, cross_entropy);
    results.push_back(values_of(net));
  }
  for (std::size_t i = 1; i < results.size(); ++i) {
    EXPECT_THAT(results[i], testing::Pointwise(testing::FloatNear(1e-5f), results[0]));
    EXPECT_NE(results[i], results[0]) << "nothing was cut";
  }
}

TEST(Batches, AugmentationFollowsFromSeedEpochAndIndex) {
  Dataset images;
  images.sample_shape = {8, 8};
  images.rows = 200;
  images.classes.assign(200, 0);
  images.class_count = 1;
  for (int i = 0; i < 200 * 64; ++i) images.bytes.push_back(static_cast<std::uint8_t>(i % 64 + 1));
  const DatasetBatches plain(images, {}, TargetForm::classes);
  const DatasetBatches flipped(images, {}, TargetForm::classes, {.flip = true, .seed = 1});
  const DatasetBatches moved(images, {}, TargetForm::classes, {.crop = true, .seed = 1});
  std::vector<std::uint64_t> all(200), one = {17};
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = i;
  const at::Tensor original = plain.batch(all).input;
  EXPECT_TRUE(flipped.batch(all).input.equal(original));
  EXPECT_TRUE(plain.training_batch(all, 3).input.equal(original));

  const at::Tensor flips = flipped.training_batch(all, 3).input;
  EXPECT_TRUE(flipped.training_batch(one, 3).input[0].equal(flips[17]));
  int mirrored = 0, same = 0;
  for (std::int64_t i = 0; i < 200; ++i) {
    same += flips[i].equal(original[i]) ? 1 : 0;
    mirrored += flips[i].equal(original[i].flip({2})) ? 1 : 0;
  }
  EXPECT_EQ(mirrored + same, 200);
  EXPECT_NEAR(mirrored, 100, 40);
  EXPECT_FALSE(flipped.training_batch(all, 4).input.equal(flips));

  const at::Tensor moves = moved.training_batch(all, 0).input;
  std::vector<int> found(9);
  for (std::int64_t i = 0; i < 200; ++i) {
    // The pixel (4, 4), 37, has moved by at most one in each direction.
    for (std::int64_t y = 3; y <= 5; ++y)
      for (std::int64_t x = 3; x <= 5; ++x)
        if (moves[i][0][y][x].item<float>() == 37.0f)
          ++found[static_cast<std::size_t>((y - 3) * 3 + x - 3)];
    EXPECT_EQ(moves[i].count_nonzero().item<std::int64_t>() % 7 == 0 ||
                  moves[i].count_nonzero().item<std::int64_t>() == 64,
              true);
  }
  for (const int times : found) EXPECT_GT(times, 5);
}

}  // namespace
}  // namespace lockstep
