// What slow links cost the result: a small GPT on libtorch's headers, two ranks, trained with exact
// averages, in wire formats and with local steps; the losses on held-out text side by side.
#include <gtest/gtest.h>
#include <torch/optim/adamw.h>

#include <cstdio>
#include <mutex>

#include "lockstep/data/ledger.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/local_sgd.h"
#include "lockstep/parallel/replicas_test.h"
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
  std::mutex seeding;  // the threads share libtorch's generator
  run_ranks(kRanks, [&](const World& world) {
    std::unique_lock one_at_a_time(seeding);
    const Model model =
        make_model({.name = "gpt", .layers = 1, .heads = 2, .width = 48, .context = kContext},
                   {kContext}, kByteValues, /*seed=*/1);
    one_at_a_time.unlock();
    const auto rank = static_cast<std::uint64_t>(world.rank());
    const TextBatches batches(text().train);
    const Permutation order(batches.size(), /*key=*/1);
    const auto after_step = make(model, world);
    torch::optim::AdamW optimizer(model.module->parameters());
    for (std::uint64_t step = 0; step < kSteps; ++step) {
      std::vector<std::uint64_t> indices;
      for (std::uint64_t i = 0; i < kBatch; ++i)
        indices.push_back(order((step * kRanks + rank) * kBatch + i));
      const Batch batch = batches.batch(indices);
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

TEST(SlowLinks, TestLossesStayNearTheExact) {
  const double exact = train_with(WireFormat::fp32);
  const auto expect_near = [&](const char* what, double loss, double most) {
    std::printf("%-40s test loss %.4f, %+.2f %%\n", what, loss, 100 * (loss / exact - 1));
    EXPECT_LT(loss / exact, most) << what;
  };
  expect_near("exact", exact, 1.01);
  EXPECT_LT(exact, 3.2);  // it has learned: an untrained one has ln 256 = 5.5
  for (const WireFormat format : {WireFormat::bf16, WireFormat::int8})
    expect_near(name_of(format).data(), train_with(format), 1.01);
  expect_near("local SGD, every 8 steps",
              train_locally<LocalSgd>(LocalSgdOptions{.sync_every = 8, .warmup_steps = 32}), 1.05);
  expect_near(
      "DiLoCo, every 20 steps, int8",
      train_locally<DiLoCo>(DiLoCoOptions{.sync_every = 20, .wire_format = WireFormat::int8}), 1.2);
}

}  // namespace
}  // namespace lockstep
