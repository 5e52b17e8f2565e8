// data_parallel with gradients that travel in fewer bytes. Convergence on a real task:
// recipes/slow_links_test.cc.
#include <gtest/gtest.h>
#include <torch/optim/sgd.h>

#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using Tensors = std::vector<at::Tensor>;

struct WideImpl : torch::nn::Module {
  WideImpl() {
    first = register_module("first", torch::nn::Linear(64, 64));
    second = register_module("second", torch::nn::Linear(64, 3));
    const at::NoGradGuard no_grad;
    for (auto& parameter : parameters()) parameter.copy_(numbers(parameter.sizes(), 5) * 0.2);
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::tanh(first(x))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Wide);

void run_steps(Wide& net, DataParallel<Wide>& model, const World& world, int first, int last) {
  torch::optim::SGD optimizer(net->parameters(), 0.1);
  for (int step = first; step < last; ++step) {
    // Weights as numbers of samples in some steps: what was lost before must not be scaled by them.
    model.set_weight(step % 3 == 1 ? 500.0 * (1 + world.rank()) : 1);
    optimizer.zero_grad();
    loss_of(model->forward(numbers({6, 64}, 100 * step + world.rank())), step).backward();
    optimizer.step();
  }
}

Tensors train(WireFormat format, std::optional<double> bucket_cap_mb = {}) {
  Results results;
  Tensors of_rank_0;
  run_ranks(2, [&](const World& world) {
    Wide net;
    auto model = data_parallel(net, world, {.bucket_cap_mb = bucket_cap_mb, .wire_format = format});
    run_steps(net, model, world, 0, 8);
    EXPECT_EQ(model.wire_errors().empty(), format == WireFormat::fp32);
    if (world.rank() == 0) of_rank_0 = values_of(*net);
    world.group().barrier();
    results.put(world.rank(), values_of(*net));
  });
  results.expect_all(2, of_rank_0);
  return of_rank_0;
}

TEST(DataParallelWire, TheSameOnEveryRankAndNearTheExact) {
  const Tensors exact = train(WireFormat::fp32);
  for (const auto& [format, tolerance] :
       {std::pair(WireFormat::bf16, 5e-4), std::pair(WireFormat::int8, 2e-3)})
    for (const std::optional<double> cap : {std::optional<double>(), std::optional(1e-4)}) {
      const Tensors values = train(format, cap);
      for (std::size_t i = 0; i < exact.size(); ++i)
        EXPECT_TRUE(at::allclose(values[i], exact[i], 0, tolerance))
            << name_of(format) << ", tensor " << i << ": "
            << (values[i] - exact[i]).abs().max().item<float>();
      EXPECT_FALSE(at::equal(values[0], exact[0])) << "nothing was rounded";
    }
}

TEST(DataParallelWire, WithTheErrorsOfBeforeTheSameBits) {
  run_ranks(2, [](const World& world) {
    Wide whole, net;
    const DataParallelOptions options{.wire_format = WireFormat::int8};
    auto unbroken = data_parallel(whole, world, options);
    run_steps(whole, unbroken, world, 0, 6);
    CompressedGroup::Errors errors;
    {
      auto model = data_parallel(net, world, options);
      run_steps(net, model, world, 0, 3);
      errors = model.wire_errors();
    }
    auto model = data_parallel(net, world, options);
    model.wire_errors() = errors;
    run_steps(net, model, world, 3, 6);
    expect_equal(values_of(*net), values_of(*whole));
  });
}

}  // namespace
}  // namespace lockstep
