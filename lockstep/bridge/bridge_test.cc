#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/sgd.h>

#include <cstring>

#include "lockstep/base/error.h"
#include "lockstep/bridge/backward_hooks.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/bridge/flat_parameters.h"

namespace lockstep {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;

struct NetImpl : torch::nn::Module {
  NetImpl() {
    first = register_module("first", torch::nn::Linear(3, 5));
    second = register_module("second", torch::nn::Linear(5, 2));
    scale = register_parameter("scale", at::ones({}));
    calls = register_buffer("calls", at::zeros({1}, at::kLong));
  }
  at::Tensor forward(const at::Tensor& x) { return second(at::relu(first(x))) * scale; }
  torch::nn::Linear first{nullptr}, second{nullptr};
  at::Tensor scale, calls;
};
TORCH_MODULE(Net);

// Aligned memory of its own, filled with something that is not zero.
struct FlatMemory {
  explicit FlatMemory(std::size_t count)
      : tensor(at::full({static_cast<std::int64_t>(count)}, 7.0)) {}
  std::span<float> span() {
    return {tensor.data_ptr<float>(), static_cast<std::size_t>(tensor.numel())};
  }
  at::Tensor tensor;
};

at::Tensor input() { return at::arange(12, at::kFloat).reshape({4, 3}) / 12; }

std::vector<std::string> names_of(const std::vector<NamedTensor>& named) {
  std::vector<std::string> names;
  for (const NamedTensor& one : named) names.push_back(one.name);
  return names;
}

TEST(Dtypes, RoundTrip) {
  for (int i = 0; i < kDtypeCount; ++i) {
    const auto dtype = static_cast<Dtype>(i);
    EXPECT_EQ(dtype_from(scalar_type_from(dtype)), dtype);
    EXPECT_EQ(c10::elementSize(scalar_type_from(dtype)), size_of(dtype));
  }
  EXPECT_EQ(dtype_from(at::kBool), std::nullopt);
  EXPECT_EQ(dtype_from(at::kComplexFloat), std::nullopt);
  const at::Tensor tensor = at::zeros({3, 5}, at::kDouble);
  EXPECT_EQ(bytes_of(tensor).size(), 120u);
  EXPECT_EQ(static_cast<void*>(bytes_of(tensor).data()), tensor.data_ptr());
}

TEST(FlatParameters, ListsTiedTensorsOnce) {
  Net net;
  EXPECT_THAT(names_of(named_parameters(*net)),
              ElementsAre("scale", "first.weight", "first.bias", "second.weight", "second.bias"));
  EXPECT_THAT(names_of(named_buffers(*net)), ElementsAre("calls"));
  net->register_parameter("again", net->first->weight);
  EXPECT_EQ(named_parameters(*net).size(), 5u);
}

TEST(FlatParameters, LayoutStartsEveryTensorOn64Bytes) {
  ParameterLayout layout;
  layout.add("a", {3, 5});
  layout.add("scalar", {});
  layout.add("full", {16});
  layout.add("empty", {0, 4});
  layout.add("b", {17});
  EXPECT_EQ(layout.entries[0].count, 15u);
  EXPECT_EQ(layout.entries[1].offset, 16u);
  EXPECT_EQ(layout.entries[1].count, 1u);
  EXPECT_EQ(layout.entries[2].offset, 32u);
  EXPECT_EQ(layout.entries[3].offset, 48u);
  EXPECT_EQ(layout.entries[4].offset, 48u);
  EXPECT_EQ(layout.total, 80u);
  EXPECT_EQ(layout.bytes(), 320u);

  ParameterLayout wide{.dtype = Dtype::float64};
  wide.add("a", {9});
  EXPECT_EQ(wide.total, 16u);
}

TEST(FlatParameters, RefusesOtherDtypesByName) {
  Net net;
  net->second->to(at::kDouble);
  try {
    make_layout(named_parameters(*net));
    FAIL() << "made a float32 layout of doubles";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("'second.weight' is Double, not float32"));
    EXPECT_THAT(error.what(), HasSubstr("hint:"));
  }
}

TEST(FlatParameters, MovedParametersLiveInTheMemory) {
  Net net;
  torch::optim::SGD optimizer(net->parameters(), 0.5);  // holds the tensors from before the move
  const at::Tensor before = net->forward(input()).detach().clone();
  const auto named = named_parameters(*net);
  const ParameterLayout layout = make_layout(named);
  FlatMemory memory(layout.total);
  const auto bytes = std::as_writable_bytes(memory.span());
  copy_into(bytes, layout, tensors_of(named));
  live_in(bytes, layout, tensors_of(named));

  EXPECT_TRUE(at::equal(net->forward(input()), before));
  for (std::size_t i = 0; i < named.size(); ++i) {
    EXPECT_EQ(named[i].tensor.data_ptr(), memory.span().data() + layout.entries[i].offset);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(named[i].tensor.data_ptr()) % 64, 0u);
    EXPECT_TRUE(named[i].tensor.requires_grad());
  }
  EXPECT_EQ(memory.span()[1], 0.0f);  // padding after the scalar

  const at::Tensor flat_before = memory.tensor.clone();
  net->forward(input()).sum().backward();
  optimizer.step();
  EXPECT_FALSE(at::equal(memory.tensor, flat_before));
  std::memset(memory.span().data(), 0, memory.span().size_bytes());
  EXPECT_EQ(net->forward(input()).abs().sum().item<float>(), 0.0f);
}

TEST(FlatParameters, GathersGradientsAndLeavesThemUndefined) {
  Net net;
  net->forward(input()).sum().backward();
  const auto named = named_parameters(*net);
  const auto parameters = tensors_of(named);
  std::vector<at::Tensor> expected;
  for (const at::Tensor& one : parameters) expected.push_back(one.grad().clone());
  // A gradient in another order of dimensions, and one that is missing.
  parameters[1].mutable_grad() = expected[1].t().contiguous().t();
  ASSERT_FALSE(parameters[1].grad().is_contiguous());
  parameters[4].mutable_grad().reset();
  expected[4].zero_();

  const ParameterLayout layout = make_layout(named);
  FlatMemory slot(layout.total);
  gather_gradients(parameters, layout, slot.span());
  double total = 0;
  for (std::size_t i = 0; i < named.size(); ++i) {
    EXPECT_FALSE(parameters[i].grad().defined()) << named[i].name;
    EXPECT_TRUE(at::equal(view_of(std::as_writable_bytes(slot.span()), layout, i), expected[i]))
        << named[i].name;
    total += expected[i].abs().sum(at::kDouble).item<double>();
  }
  EXPECT_DOUBLE_EQ(slot.tensor.abs().sum(at::kDouble).item<double>(), total);  // padding is zero
}

TEST(FlatParameters, GathersSparseGradientsDense) {
  torch::nn::Embedding table(torch::nn::EmbeddingOptions(6, 3).sparse(true));
  table->forward(at::tensor({1, 4, 1}, at::kLong)).sum().backward();
  ASSERT_TRUE(table->weight.grad().is_sparse());
  const auto named = named_parameters(*table);
  const ParameterLayout layout = make_layout(named);
  FlatMemory slot(layout.total);
  gather_gradients(tensors_of(named), layout, slot.span());
  EXPECT_EQ(slot.span()[3], 2.0f);
  EXPECT_EQ(slot.span()[12], 1.0f);
  EXPECT_EQ(slot.tensor.sum().item<float>(), 9.0f);
}

TEST(BackwardHooks, CallsOnceAPassWhenAllGradientsAreThere) {
  Net net;
  const auto named = named_parameters(*net);
  int calls = 0;
  const BackwardHooks hooks(named, {.end = [&] {
                              ++calls;
                              for (const NamedTensor& one : named)
                                EXPECT_TRUE(one.tensor.grad().defined()) << one.name;
                            }});
  net->forward(input()).sum().backward();
  EXPECT_EQ(calls, 1);
  (net->forward(input()).sum() + net->forward(input()).sum()).backward();
  EXPECT_EQ(calls, 2);
  // Asking for gradients without accumulating them is no backward().
  torch::autograd::grad({net->forward(input()).sum()}, {net->first->weight});
  EXPECT_EQ(calls, 2);
}

TEST(BackwardHooks, WhatTheCallThrowsLeavesBackward) {
  Net net;
  bool fail = true;
  const BackwardHooks hooks(named_parameters(*net), {.end = [&] {
                              if (fail) throw CommError("rank 1 is gone");
                            }});
  EXPECT_THROW(net->forward(input()).sum().backward(), CommError);
  fail = false;
  EXPECT_NO_THROW(net->forward(input()).sum().backward());
}

TEST(BackwardHooks, APassThatFailsDoesNotSilenceTheNext) {
  Net net;
  int calls = 0;
  const BackwardHooks hooks(named_parameters(*net), {.end = [&] { ++calls; }});
  at::Tensor hidden = net->first(input());
  hidden.register_hook([](const at::Tensor&) { throw Error("a hook of the user's fails"); });
  EXPECT_ANY_THROW(net->second(hidden).sum().backward());
  EXPECT_EQ(calls, 0);
  net->forward(input()).sum().backward();
  EXPECT_EQ(calls, 1);
}

TEST(BackwardHooks, WatchesFrozenParametersFromTheStart) {
  Net net;
  for (auto& parameter : net->parameters()) parameter.set_requires_grad(false);
  int calls = 0;
  const BackwardHooks hooks(named_parameters(*net), {.end = [&] { ++calls; }});
  net->scale.set_requires_grad(true);
  net->forward(input()).sum().backward();
  EXPECT_EQ(calls, 1);
}

TEST(BackwardHooks, TellsEachGradientInBetween) {
  Net net;
  std::vector<std::string> calls;
  const auto named = named_parameters(*net);
  const BackwardHooks hooks(named, {.begin = [&] { calls.push_back("begin"); },
                                    .gradient =
                                        [&](std::size_t i) {
                                          EXPECT_TRUE(named[i].tensor.grad().defined());
                                          calls.push_back(named[i].name);
                                        },
                                    .end = [&] { calls.push_back("end"); }});
  net->second(input().matmul(at::ones({3, 5}))).sum().backward();
  ASSERT_EQ(calls.size(), 4u);
  EXPECT_EQ(calls.front(), "begin");
  EXPECT_EQ(calls.back(), "end");
  EXPECT_THAT(calls, testing::IsSupersetOf({"second.weight", "second.bias"}));
}

// A node whose backward runs a backward() of its own.
struct Nested : torch::autograd::Function<Nested> {
  static inline std::function<void()> inner;
  static at::Tensor forward(torch::autograd::AutogradContext*, const at::Tensor& x) {
    return x.clone();
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext*,
                                                 torch::autograd::variable_list gradients) {
    inner();
    return gradients;
  }
};

TEST(BackwardHooks, RefusesABackwardInsideAnother) {
  Net net;
  const BackwardHooks hooks(named_parameters(*net), {});
  at::Tensor hidden = net->first(input());
  Nested::inner = [&] {
    const at::AutoGradMode enable(true);
    net->first(input()).sum().backward();
  };
  hidden = Nested::apply(hidden);
  try {
    net->second(hidden).sum().backward();
    FAIL() << "took nested gradients";
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), HasSubstr("'first."));
  }
  net->zero_grad();
  EXPECT_NO_THROW(net->forward(input()).sum().backward());
}

TEST(BackwardHooks, OneOwnerAtATime) {
  Net net;
  int calls = 0;
  {
    const BackwardHooks hooks(named_parameters(*net), {.end = [&] { ++calls; }});
    try {
      const BackwardHooks again(named_parameters(*net), {.end = [] {}});
      FAIL() << "two owners";
    } catch (const ConfigError& error) {
      EXPECT_THAT(error.what(), HasSubstr("'scale'"));
    }
  }
  net->forward(input()).sum().backward();
  EXPECT_EQ(calls, 0);
  const BackwardHooks next(named_parameters(*net), {.end = [&] { ++calls; }});
  net->forward(input()).sum().backward();
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace lockstep
