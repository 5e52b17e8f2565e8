// What slow links cost the result: a small GPT on libtorch's headers, two ranks, trained with exact
// averages, in wire formats and with local steps; the losses on held-out text side by side.
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cstdio>
#include <mutex>
#include <string>

#include "lockstep/data/ledger.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/local_sgd.h"
#include "lockstep/parallel/replicas_test.h"
#include "lockstep/parallel/shared_weights.h"
#include "lockstep/recipes/model.h"
#include "lockstep/recipes/text.h"
#include "lockstep/update/optimizer.h"

namespace lockstep {
namespace {

constexpr int kRanks = 2, kSteps = 160;
constexpr std::int64_t kContext = 32;
constexpr std::uint64_t kBatch = 8;  // blocks a rank and step
// Down to zero: what a run ends at is not what its last steps happen to be.
constexpr Schedule kSchedule = {
    .kind = Schedule::Kind::cosine, .lr = 5e-3, .warmup_steps = 10, .total_steps = kSteps};

const TrainTest& text() {
  static const TrainTest sets =
      split_dataset(load_text(libtorch_headers(), kContext + 1), 0.02, /*seed=*/1);
  return sets;
}

Model make_gpt() {
  static std::mutex seeding;  // the ranks' threads share libtorch's generator
  const std::lock_guard one_at_a_time(seeding);
  return make_model({.name = "gpt", .layers = 1, .heads = 2, .width = 48, .context = kContext},
                    {kContext}, kByteValues, /*seed=*/1);
}

Batch batch_of(std::uint64_t step, std::uint64_t rank) {
  static const TextBatches batches(text().train);
  static const Permutation order(batches.size(), /*key=*/1);
  std::vector<std::uint64_t> indices;
  for (std::uint64_t i = 0; i < kBatch; ++i)
    indices.push_back(order((step * kRanks + rank) * kBatch + i));
  return batches.batch(indices);
}

double test_loss(const Model& model) {
  const at::NoGradGuard no_grad;
  constexpr std::uint64_t kBlocks = 32;
  const TextBatches held_out(text().test);
  double sum = 0, weight = 0;
  for (std::uint64_t first = 0; first + kBlocks <= std::min<std::uint64_t>(held_out.size(), 512);
       first += kBlocks) {
    std::vector<std::uint64_t> indices(kBlocks);
    for (std::uint64_t i = 0; i < kBlocks; ++i) indices[i] = first + i;
    const Batch batch = held_out.batch(indices);
    const LossValue loss = text_loss(model.forward(batch.input), batch.target);
    sum += loss.sum.item<double>();
    weight += loss.weight;
  }
  return sum / weight;
}

// Nats a byte of held-out text after kSteps, the same on every rank. make(model, world) returns
// what follows every optimizer.step().
template <typename Make>
double train(const Make& make) {
  std::vector<double> losses(kRanks);
  run_ranks(kRanks, [&](const World& world) {
    const Model model = make_gpt();
    const auto rank = static_cast<std::uint64_t>(world.rank());
    const auto after_step = make(model, world);
    torch::optim::AdamW optimizer(model.module->parameters());
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      const Batch batch = batch_of(step, rank);
      optimizer.zero_grad();
      const LossValue loss = text_loss(model.forward(batch.input), batch.target);
      (loss.sum / loss.weight).backward();
      for (auto& group : optimizer.param_groups())
        group.options().set_lr(learning_rate(kSchedule, static_cast<std::int64_t>(step)));
      optimizer.step();
      after_step();
    }
    losses[rank] = test_loss(model);
  });
  EXPECT_EQ(losses[0], losses[1]);
  return losses[0];
}

double train_with(WireFormat format) {
  return train([&](const Model& model, const World& world) {
    auto replica =
        std::make_shared<Replica>(*model.module, world, DataParallelOptions{.wire_format = format});
    return [replica] {};
  });
}
template <typename Strategy, typename Options>
double train_locally(const Options& options) {
  return train([&](const Model& model, const World& world) {
    auto strategy = std::make_shared<Strategy>(*model.module, world, options);
    return [strategy] { strategy->step(); };
  });
}

// On two nodes with one copy of the weights each; a step is of the same samples.
double train_shared(WireFormat format) {
  double losses[kRanks] = {};
  run_nodes({1, 1}, [&](const World& world) {
    const Model model = make_gpt();
    auto shared = shared_weights(model.module, AdamW{}, world, {.wire_format = format});
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      shared.groups()[0].lr = learning_rate(kSchedule, static_cast<std::int64_t>(step));
      shared.step([&](int virtual_rank) -> VirtualLoss {
        const Batch batch = batch_of(step, static_cast<std::uint64_t>(virtual_rank));
        const LossValue loss = text_loss(model.forward(batch.input), batch.target);
        shared.weights().last_backward(loss.weight);
        loss.sum.backward();
        return {loss.sum.item<double>(), loss.weight};
      });
    }
    losses[world.rank()] = test_loss(model);
  });
  EXPECT_EQ(losses[0], losses[1]);
  return losses[0];
}

TEST(SlowLinks, TestLossesStayNearTheExact) {
  const double exact = train_with(WireFormat::fp32);
  const auto expect_near = [&](const std::string& what, double loss, double most) {
    std::printf("%-40s test loss %.4f, %+.2f %%\n", what.c_str(), loss, 100 * (loss / exact - 1));
    EXPECT_LT(loss / exact, most) << what;
  };
  expect_near("exact", exact, 1.01);
  EXPECT_LT(exact, 3.2);  // it has learned: an untrained one has ln 256 = 5.5
  for (const WireFormat format : {WireFormat::bf16, WireFormat::int8})
    expect_near(std::string(name_of(format)), train_with(format), 1.01);
  for (const WireFormat format : {WireFormat::fp32, WireFormat::bf16, WireFormat::int8})
    expect_near(fmt::format("{}, shared weights on two nodes", name_of(format)),
                train_shared(format), 1.01);
  expect_near("local SGD, every 8 steps",
              train_locally<LocalSgd>(LocalSgdOptions{.sync_every = 8, .warmup_steps = 32}), 1.05);
  expect_near(
      "DiLoCo, every 20 steps, int8",
      train_locally<DiLoCo>(DiLoCoOptions{.sync_every = 20, .wire_format = WireFormat::int8}), 1.2);
}

}  // namespace
}  // namespace lockstep
