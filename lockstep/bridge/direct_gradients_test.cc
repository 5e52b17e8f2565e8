#include "lockstep/bridge/direct_gradients.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <functional>

#include "lockstep/bridge/autocast.h"
#include "lockstep/bridge/dtypes.h"

namespace lockstep {
namespace {

// Numbers that depend on seed and position alone.
at::Tensor numbers(at::IntArrayRef shape, int seed) {
  const at::Tensor positions = at::arange(1, c10::multiply_integers(shape) + 1, at::kDouble);
  return (positions * (12.9898 + seed)).sin().mul(43758.5453).frac().to(at::kFloat).reshape(shape);
}

// 160 x 128 pays, 4 x 160 does not.
struct NetImpl : torch::nn::Module {
  explicit NetImpl(bool bias = true) {
    using torch::nn::LinearOptions;
    first = register_module("first", torch::nn::Linear(LinearOptions(128, 160).bias(bias)));
    second = register_module("second", torch::nn::Linear(LinearOptions(160, 4).bias(bias)));
    const at::NoGradGuard no_grad;
    int seed = 0;
    for (auto& parameter : parameters()) parameter.copy_(numbers(parameter.sizes(), ++seed) * 0.1);
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::tanh(first(x))); }
  torch::nn::Linear first{nullptr}, second{nullptr};
};
TORCH_MODULE(Net);

// Places for a module's gradients, filled with what no gradient has.
struct Places {
  explicit Places(torch::nn::Module& module)
      : named(named_parameters(module)),
        parameters(tensors_of(named)),
        layout(make_layout(named)),
        memory(at::full({static_cast<std::int64_t>(layout.total)}, 77.0)),
        direct(parameters) {
    direct.set_places(bytes_of(memory), layout);
  }
  bool holds(std::size_t parameter) const {
    return parameters[parameter].grad().const_data_ptr() ==
           memory.data_ptr<float>() + layout.entries[parameter].offset;
  }
  std::vector<NamedTensor> named;
  std::vector<at::Tensor> parameters;
  ParameterLayout layout;
  at::Tensor memory;
  DirectGradients direct;
};

using Run = std::function<void(Net&)>;
// The same with places and without: equal bits. Returns whether first.weight's lies in its place.
bool equal_bits(const Run& run, bool bias = true) {
  Net plain(bias), net(bias);
  run(plain);
  Places places(*net);
  run(net);
  for (std::size_t i = 0; i < places.parameters.size(); ++i)
    EXPECT_TRUE(at::equal(places.parameters[i].grad(), plain->parameters()[i].grad()))
        << places.named[i].name;
  EXPECT_FALSE(places.holds(places.parameters.size() - 1));
  return places.holds(0);
}

TEST(DirectGradients, LieInTheirPlaceBitForBit) {
  for (const bool bias : {true, false}) {
    EXPECT_TRUE(equal_bits([](Net& net) { net(numbers({6, 128}, 7)).sum().backward(); }, bias));
    EXPECT_TRUE(equal_bits([](Net& net) { net(numbers({2, 3, 128}, 7)).sum().backward(); }, bias));
    EXPECT_TRUE(equal_bits(
        [](Net& net) {
          net(numbers({128, 6}, 7).t()).square().sum().backward();
        },
        bias));
  }
  // The gradient of the input, and of a batch without samples.
  at::Tensor inputs[2];
  int runs = 0;
  EXPECT_TRUE(equal_bits([&](Net& net) {
    inputs[runs] = numbers({2, 3, 128}, 7).requires_grad_();
    net(inputs[runs++]).sum().backward();
  }));
  EXPECT_TRUE(at::equal(inputs[0].grad(), inputs[1].grad()));
  EXPECT_TRUE(equal_bits([](Net& net) { net(numbers({0, 128}, 7)).sum().backward(); }));
}

// What is no product with a transposed parameter alone goes libtorch's way.
TEST(DirectGradients, OtherProductsAreAsBefore) {
  const at::Tensor a = numbers({3, 4}, 1).requires_grad_(), b = numbers({4, 5}, 2).requires_grad_();
  const at::Tensor g = numbers({3, 5}, 3);
  a.mm(b).backward(g);
  EXPECT_TRUE(at::equal(a.grad(), g.mm(b.detach().t())));
  EXPECT_TRUE(at::equal(b.grad(), a.detach().t().mm(g)));
  EXPECT_FALSE(equal_bits([](Net& net) {
    const at::Tensor x = numbers({6, 128}, 7);
    at::addmm(net->first->bias, x, net->first->weight.t(), 2, 3).square().sum().backward();
    net->second(numbers({6, 160}, 8)).sum().backward();
  }));
  EXPECT_FALSE(equal_bits([](Net& net) {
    const at::Tensor square = net->first->weight.narrow(0, 0, 128);
    (net->first(square.mm(square.t())).sum() + net(square).sum()).backward();
  }));
}

TEST(DirectGradients, AccumulateWhereAGradientIs) {
  EXPECT_TRUE(equal_bits([](Net& net) {
    net(numbers({6, 128}, 7)).sum().backward();
    net(numbers({6, 128}, 8)).sum().backward();  // += in the place
  }));
  EXPECT_TRUE(equal_bits([](Net& net) {
    const at::Tensor loss = net(numbers({6, 128}, 7)).sum();
    loss.backward({}, /*retain_graph=*/true);
    loss.backward();
  }));
  EXPECT_TRUE(equal_bits([](Net& net) {
    net(numbers({6, 128}, 7)).sum().backward();
    net->zero_grad(/*set_to_none=*/false);
    net(numbers({6, 128}, 8)).sum().backward();
  }));
}

TEST(DirectGradients, ATiedWeightIsWrittenOnce) {
  equal_bits([](Net& net) {
    const at::Tensor x = numbers({6, 128}, 7);
    (net(x).sum() + net(x * 2).square().sum() + net->first(x * 3).sum()).backward();
  });
  equal_bits([](Net& net) {  // also used by something else than a Linear
    const at::Tensor x = numbers({6, 128}, 7);
    (net(x).sum() + net->first->weight.square().sum()).backward();
  });
  equal_bits([](Net& net) {
    const at::Tensor rows = at::embedding(net->first->weight, at::arange(6));
    net(rows).sum().backward();
  });
}

TEST(DirectGradients, MovedBetweenBackwardsFollowThePlace) {
  Net net;
  Places places(*net);
  const at::Tensor other = at::full_like(places.memory, 55.0);
  net(numbers({6, 128}, 7)).sum().backward();
  ASSERT_TRUE(places.holds(0));
  const at::Tensor first = net->first->weight.grad().clone();
  net->zero_grad();
  places.direct.set_places(bytes_of(other), places.layout);
  net(numbers({6, 128}, 8)).sum().backward();
  EXPECT_EQ(net->first->weight.grad().data_ptr(), other.data_ptr());
  EXPECT_TRUE(at::equal(view_of(bytes_of(places.memory), places.layout, 0), first));
}

TEST(DirectGradients, SpareWhatSomebodyKeeps) {
  Net net;
  Places places(*net);
  net(numbers({6, 128}, 7)).sum().backward();
  const at::Tensor kept = net->first->weight.grad();
  const at::Tensor values = kept.clone();
  net->zero_grad();
  net(numbers({6, 128}, 8)).sum().backward();
  EXPECT_TRUE(at::equal(kept, values));
  EXPECT_FALSE(places.holds(0));

  net->zero_grad();
  at::Tensor seen;
  net->first->weight.register_hook([&](const at::Tensor& gradient) { seen = gradient; });
  net(numbers({6, 128}, 7)).sum().backward();
  EXPECT_TRUE(at::equal(seen, values));
  EXPECT_NE(seen.data_ptr(), kept.data_ptr());
  EXPECT_TRUE(at::equal(net->first->weight.grad(), values));
}

TEST(DirectGradients, DerivativesAskedForByValueAreNotPutInPlace) {
  Net net;
  Places places(*net);
  const at::Tensor before = places.memory.clone();
  const auto gradient =
      torch::autograd::grad({net(numbers({6, 128}, 7)).sum()}, {net->first->weight})[0];
  EXPECT_TRUE(at::equal(places.memory, before));
  Net plain;
  plain(numbers({6, 128}, 7)).sum().backward();
  EXPECT_TRUE(at::equal(gradient, plain->first->weight.grad()));
}

TEST(DirectGradients, SecondDerivativesAreRight) {
  const auto penalty = [](Net& net) {
    const at::Tensor x = numbers({6, 128}, 7);
    const auto first = torch::autograd::grad({net(x).square().sum()}, {net->first->weight}, {},
                                             /*retain_graph=*/true, /*create_graph=*/true)[0];
    first.square().sum().backward();
  };
  Net plain, net;
  penalty(plain);
  Places places(*net);
  penalty(net);
  EXPECT_TRUE(at::allclose(net->first->weight.grad(), plain->first->weight.grad(), 1e-5, 1e-6));
}

TEST(DirectGradients, AutocastTakesTheUsualWay) {
  EXPECT_FALSE(equal_bits([](Net& net) {
    at::Tensor loss;
    {
      const Autocast autocast(Precision::bf16);
      loss = net(numbers({6, 128}, 7)).sum();
    }
    loss.backward();
    EXPECT_EQ(net->first->weight.grad().scalar_type(), at::kFloat);
  }));
}

TEST(DirectGradients, EndWithTheirObject) {
  Net net;
  { const Places places(*net); }
  net(numbers({6, 128}, 7)).sum().backward();
  Net frozen;
  frozen->first->weight.set_requires_grad(false);
  const Places places(*frozen);
  frozen(numbers({6, 128}, 7)).sum().backward();
  EXPECT_FALSE(frozen->first->weight.grad().defined());
  EXPECT_TRUE(at::equal(frozen->second->weight.grad(), net->second->weight.grad()));
}

// --- Autocast ---

TEST(Autocast, ComputesInBf16AndKeepsFp32) {
  Net net;
  at::Tensor hidden;
  {
    const Autocast autocast(Precision::bf16);
    {
      const Autocast inner(Precision::bf16);
      hidden = net->first(numbers({6, 128}, 7));
    }
    EXPECT_EQ(net->first(numbers({6, 128}, 7)).scalar_type(), at::kBFloat16);
  }
  EXPECT_EQ(hidden.scalar_type(), at::kBFloat16);
  hidden.sum().backward();
  EXPECT_EQ(net->first->weight.grad().scalar_type(), at::kFloat);
  EXPECT_EQ(net->first(numbers({6, 128}, 7)).scalar_type(), at::kFloat);
  const Autocast nothing(Precision::fp32);
  EXPECT_EQ(net->first(numbers({6, 128}, 7)).scalar_type(), at::kFloat);
}

TEST(Autocast, SeesWeightsThatChangedSince) {
  Net net;
  const auto run = [&] {
    const Autocast autocast(Precision::bf16);
    return net->first(numbers({6, 128}, 7)).to(at::kFloat).detach();
  };
  const at::Tensor before = run();
  EXPECT_TRUE(at::equal(run(), before));
  {
    const at::NoGradGuard no_grad;
    net->first->weight.zero_();
    net->first->bias.zero_();
  }
  EXPECT_EQ(run().abs().sum().item<float>(), 0.0f);
}

}  // namespace
}  // namespace lockstep
