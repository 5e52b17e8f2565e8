#include "lockstep/recipes/works.h"

#include <ATen/Context.h>
#include <ATen/ops/cross_entropy_loss.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

constexpr int kBatches = 8;

const OptimizerSettings kAdam = {.name = "adam", .lr = 1e-3};
const OptimizerSettings kMomentum = {.name = "momentum", .lr = 0.01, .momentum = 0.9};
const OptimizerSettings kAdamW = {.name = "adamw", .lr = 3e-4, .weight_decay = 0.1};

}  // namespace

const std::vector<Work>& works() {
  static const std::vector<Work> all = {
      {"W1", {.name = "mlp", .widths = {1024, 1024}}, {784}, 10, 64, kAdam},
      {"W2", {.name = "cnn"}, {28, 28}, 10, 64, kMomentum},
      {"W3", {.name = "resnet18"}, {3, 32, 32}, 10, 16, kMomentum},
      {"W4",
       {.name = "gpt", .layers = 6, .heads = 6, .width = 384, .context = 128},
       {128},
       65,
       4,
       kAdamW},
      {"W5", {.name = "mlp", .widths = {4096, 4096, 4096}}, {4096}, 10, 16, kAdam},
  };
  return all;
}

const Work& work_named(std::string_view name) {
  const auto found = std::ranges::find(works(), name, &Work::name);
  if (found == works().end())
    throw ConfigError(fmt::format("there is no work {}", name), "W1, W2, W3, W4 or W5");
  return *found;
}

Model make_model(const Work& work, std::uint64_t seed) {
  return make_model(work.model, work.sample_shape, work.outputs, seed);
}

std::vector<Batch> make_batches(const Work& work, std::uint64_t seed) {
  at::manual_seed(mix({seed, 0x64617461}));  // "data"
  std::vector<std::int64_t> shape = work.sample_shape;
  if (shape.size() == 2) shape.insert(shape.begin(), 1);
  shape.insert(shape.begin(), work.batch_size);
  std::vector<Batch> batches(kBatches);
  for (Batch& batch : batches) {
    const bool text = work.model.name == "gpt";
    batch.input = text ? at::randint(work.outputs, shape, at::kLong) : at::randn(shape);
    batch.target =
        at::randint(work.outputs,
                    text ? at::IntArrayRef(shape) : at::IntArrayRef(shape).slice(0, 1), at::kLong);
  }
  return batches;
}

at::Tensor mean_loss(const at::Tensor& output, const at::Tensor& target) {
  return at::cross_entropy_loss(output.flatten(0, -2), target.flatten());
}

}  // namespace lockstep
