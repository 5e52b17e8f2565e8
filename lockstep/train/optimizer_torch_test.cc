// The torch-free optimizers against torch::optim, over 100 steps.
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>
#include <torch/optim/adagrad.h>
#include <torch/optim/adam.h>
#include <torch/optim/adamw.h>
#include <torch/optim/rmsprop.h>
#include <torch/optim/sgd.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "lockstep/update/naive_test.h"

namespace lockstep {
namespace {

namespace optim = torch::optim;
using MakeTorch = std::function<std::unique_ptr<optim::Optimizer>(std::vector<at::Tensor>)>;

// Takes the options of a torch::optim optimizer, whose types are named alike.
template <typename Torch, typename Options>
MakeTorch make(const Options& options) {
  return [options](std::vector<at::Tensor> parameters) {
    return std::make_unique<Torch>(std::move(parameters), options);
  };
}

struct Pair {
  const char* name;
  OptimizerOptions ours;
  MakeTorch torch;
};

std::vector<Pair> make_pairs() {
  using optim::AdagradOptions;
  using optim::AdamOptions;
  using optim::AdamWOptions;
  using optim::RMSpropOptions;
  using optim::SGDOptions;
  return {
      {"sgd", SGD{.lr = 0.05, .weight_decay = 0.01},
       make<optim::SGD>(SGDOptions(0.05).weight_decay(0.01))},
      {"sgd, momentum, dampening", SGD{.lr = 0.05, .momentum = 0.9, .dampening = 0.3},
       make<optim::SGD>(SGDOptions(0.05).momentum(0.9).dampening(0.3))},
      {"sgd, nesterov", SGD{.lr = 0.05, .momentum = 0.9, .weight_decay = 0.01, .nesterov = true},
       make<optim::SGD>(SGDOptions(0.05).momentum(0.9).weight_decay(0.01).nesterov(true))},
      {"adam", Adam{.lr = 0.01, .betas = {0.8, 0.99}, .weight_decay = 0.1},
       make<optim::Adam>(AdamOptions(0.01).betas({0.8, 0.99}).weight_decay(0.1))},
      {"adam, amsgrad", Adam{.lr = 0.01, .eps = 1e-6, .amsgrad = true},
       make<optim::Adam>(AdamOptions(0.01).eps(1e-6).amsgrad(true))},
      {"adamw", AdamW{.lr = 0.01}, make<optim::AdamW>(AdamWOptions(0.01))},
      {"adagrad", Adagrad{}, make<optim::Adagrad>(AdagradOptions())},
      {"adagrad, everything",
       Adagrad{.lr = 0.1, .lr_decay = 0.05, .weight_decay = 0.01, .initial_accumulator_value = 0.2},
       make<optim::Adagrad>(
           AdagradOptions(0.1).lr_decay(0.05).weight_decay(0.01).initial_accumulator_value(0.2))},
      {"rmsprop", RMSprop{}, make<optim::RMSprop>(RMSpropOptions())},
      {"rmsprop, momentum", RMSprop{.lr = 0.005, .weight_decay = 0.01, .momentum = 0.9},
       make<optim::RMSprop>(RMSpropOptions(0.005).weight_decay(0.01).momentum(0.9))},
      {"rmsprop, centered", RMSprop{.alpha = 0.9, .eps = 1e-6, .centered = true},
       make<optim::RMSprop>(RMSpropOptions().alpha(0.9).eps(1e-6).centered(true))},
      {"rmsprop, momentum, centered", RMSprop{.lr = 0.005, .momentum = 0.5, .centered = true},
       make<optim::RMSprop>(RMSpropOptions(0.005).momentum(0.5).centered(true))},
  };
}

TEST(Optimizers, AgreeWithTorchOptimOver100Steps) {
  constexpr std::int64_t kCount = 1000;
  for (const Pair& pair : make_pairs()) {
    SCOPED_TRACE(pair.name);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<float> weights(kCount);
    for (float& weight : weights) weight = normal(random);
    at::Tensor theirs = at::empty({kCount}, at::kFloat);
    std::copy(weights.begin(), weights.end(), theirs.mutable_data_ptr<float>());
    theirs.set_requires_grad(true);
    const auto torch = pair.torch({theirs});
    Optimizer ours(pair.ours, kCount);
    for (int step = 0; step < 100; ++step) {
      const at::Tensor gradient = at::empty({kCount}, at::kFloat);
      for (std::int64_t i = 0; i < kCount; ++i) {
        const float value = normal(random) + 0.2f * weights[static_cast<std::size_t>(i)];
        gradient.mutable_data_ptr<float>()[i] = value;
      }
      theirs.mutable_grad() = gradient;
      torch->step();
      ours.step(weights, {gradient.const_data_ptr<float>(), kCount}, 1.0f, pair.ours.lr);
    }
    // PyTorch fuses multiply-adds where the machine can and orders a product otherwise: a few units
    // in the last place of a weight (1e-7) a step, which momentum multiplies.
    float worst = 0;
    for (std::int64_t i = 0; i < kCount; ++i)
      worst = std::max(worst, std::abs(weights[static_cast<std::size_t>(i)] -
                                       theirs.const_data_ptr<float>()[i]));
    EXPECT_LT(worst, 1e-5f);
    RecordProperty(pair.name, std::to_string(worst));
  }
}

}  // namespace
}  // namespace lockstep
