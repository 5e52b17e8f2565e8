#include "lockstep/recipes/training_bench.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <torch/nn/module.h>
#include <torch/optim/optimizer.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/observe/event.h"
#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/shared_weights.h"
#include "lockstep/recipes/optimizer.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kSeed = 1;
constexpr int kWarmUpSteps = 5;
constexpr double kChunkSeconds = 0.5;  // between looks at the clock that all ranks share

using Step = std::function<void(const Batch&)>;

at::Tensor loss_of(const Model& model, const Batch& batch, Precision precision) {
  const Autocast autocast(precision);
  return mean_loss(model.forward(batch.input), batch.target);
}

Step torch_step(const World& world, const Work& work, const Model& model, Precision precision) {
  const auto replica = std::make_shared<Replica>(*model.module, world, DataParallelOptions{});
  std::shared_ptr optimizer = torch_optimizer(work.optimizer, model.module->parameters());
  return [=](const Batch& batch) {
    optimizer->zero_grad();
    loss_of(model, batch, precision).backward();
    optimizer->step();
    (void)replica;  // lives as long as the step
  };
}

// One copy of the weights on the node, or one for each worker that trains alone.
Step shared_step(const World& world, const Work& work, const Model& model, Precision precision) {
  const auto weights =
      std::make_shared<SharedWeights>(*model.module, world, optimizer_options(work.optimizer));
  return [=](const Batch& batch) {
    weights->compute([&](int) {
      const at::Tensor loss = loss_of(model, batch, precision);
      loss.backward();
      return VirtualLoss{loss.item<double>(), 1.0};
    });
    weights->decide();
    weights->update();
  };
}

Step make_step(const World& world, const Work& work, const Model& model,
               const TrainingBench& bench) {
  if (bench.mode == "shared_weights") return shared_step(world, work, model, bench.precision);
  if (bench.mode == "independent")
    return shared_step(init_from({}, {}), work, model, bench.precision);
  if (bench.mode == "data_parallel") return torch_step(world, work, model, bench.precision);
  throw ConfigError(fmt::format("there is no mode {}", bench.mode),
                    "shared_weights, data_parallel or independent");
}

// The most of all ranks' values.
double largest(const World& world, double value) {
  world.group().all_reduce(std::as_writable_bytes(std::span(&value, 1)), Dtype::float64,
                           Reduction::max, {.tag = "the bench's clock"});
  return value;
}

std::int64_t page_faults() {
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt + usage.ru_majflt;
}

}  // namespace

void run_training_bench(const World& world, const TrainingBench& bench) {
  const Work& work = work_named(bench.work);
  const Model model = make_model(work, kSeed);
  model.module->train();
  const Step step = make_step(world, work, model, bench);
  const std::vector<Batch> batches =
      make_batches(work, kSeed + static_cast<std::uint64_t>(world.rank()));
  std::uint64_t done = 0;
  const auto run = [&](std::uint64_t steps) {  // the seconds that they took
    const auto start = Clock::now();
    for (const std::uint64_t end = done + steps; done < end; ++done)
      step(batches[done % batches.size()]);
    return seconds(Clock::now() - start);
  };

  // All ranks run equally many steps: chunks whose length follows from the slowest one's warm-up.
  run(kWarmUpSteps);
  const double each = largest(world, run(kWarmUpSteps) / kWarmUpSteps);
  const auto chunk = static_cast<std::uint64_t>(std::max(1.0, kChunkSeconds / each));
  const std::int64_t faults_before = page_faults();
  const std::uint64_t done_before = done;
  double own = 0;
  for (double slowest = 0; slowest < bench.seconds; slowest = largest(world, own))
    own += run(chunk);

  std::int64_t parameters = 0;
  for (const at::Tensor& parameter : model.module->parameters()) parameters += parameter.numel();
  rusage usage{};
  ::getrusage(RUSAGE_SELF, &usage);
  world.events().emit({{"event", "solution"},
                       {"values",
                        {{"rank", world.rank()},
                         {"batch_size", work.batch_size},
                         {"parameters", parameters},
                         {"steps", done - done_before},
                         {"seconds", own},
                         {"page_faults", page_faults() - faults_before},
                         {"peak_memory_bytes", std::int64_t{1024} * usage.ru_maxrss}}}});
}

}  // namespace lockstep
