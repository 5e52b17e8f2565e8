#include "lockstep/bridge/gradient_place.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "lockstep/bridge/backward_hooks.h"
#include "lockstep/bridge/dtypes.h"

namespace lockstep {
namespace {

// A parameter of six elements and its place, second of two.
struct Fixture {
  Fixture() {
    layout.add("other", {3});
    layout.add("weight", {2, 3});
    memory = at::full({static_cast<std::int64_t>(layout.total)}, 7.0);
    place.emplace(parameter, bytes_of(memory), layout, 1, nullptr);
  }
  // As a backward that hands over its own buffer.
  void backward(double value) { (parameter * value).sum().backward(); }
  at::Tensor held() { return memory.narrow(0, 16, 6).reshape({2, 3}); }
  // As a reduction in place.
  void reduce() { held().mul_(0.5); }
  bool shows() { return parameter.grad().data_ptr() == held().data_ptr(); }

  at::Tensor parameter = at::ones({2, 3}).requires_grad_();
  ParameterLayout layout;
  at::Tensor memory;
  std::optional<GradientPlace> place;
};

at::Tensor all(double value) { return at::full({2, 3}, value); }

TEST(GradientPlace, TakesOverTheBufferOfABackward) {
  Fixture f;
  f.backward(4);
  f.place->collect();
  EXPECT_TRUE(f.shows());
  EXPECT_TRUE(at::equal(f.held(), all(4)));
  f.reduce();
  f.place->hand_out();
  EXPECT_TRUE(at::equal(f.parameter.grad(), all(2)));
  f.backward(1);  // accumulates in the place
  f.place->collect();
  EXPECT_TRUE(f.shows());
  EXPECT_TRUE(at::equal(f.held(), all(3)));
}

TEST(GradientPlace, AnUndefinedGradientIsZeros) {
  Fixture f;
  f.place->collect();
  EXPECT_TRUE(at::equal(f.held(), all(0)));
  EXPECT_FALSE(f.parameter.grad().defined());
  f.place->hand_out();
  EXPECT_TRUE(f.shows());
}

TEST(GradientPlace, WhoKeepsAGradientKeepsItsValues) {
  Fixture f;
  f.backward(4);
  f.place->collect();
  const at::Tensor kept = f.parameter.grad(), view = kept[1];
  f.parameter.mutable_grad().reset();
  f.backward(9);
  f.place->collect();
  EXPECT_TRUE(f.shows());
  EXPECT_TRUE(at::equal(f.held(), all(9)));
  EXPECT_TRUE(at::equal(kept, all(4)));
  EXPECT_EQ(view.data_ptr(), kept[1].data_ptr());
  EXPECT_NE(kept.data_ptr(), f.held().data_ptr());

  const at::Tensor again = f.parameter.grad();
  f.parameter.mutable_grad().reset();
  f.place->clear();
  EXPECT_TRUE(at::equal(again, all(9)));
}

TEST(GradientPlace, AGradientOfTheUsersStaysTheSameTensor) {
  Fixture f;
  const at::Tensor flat = at::zeros({6});
  f.parameter.mutable_grad() = flat.view({2, 3});
  f.backward(4);
  f.place->collect();
  f.reduce();
  f.place->hand_out();
  EXPECT_TRUE(at::equal(flat, at::full({6}, 2.0)));
  EXPECT_EQ(f.parameter.grad().data_ptr(), flat.data_ptr());
}

TEST(GradientPlace, TakesOverBuffersWhileBackwardRuns) {
  Fixture f;
  const BackwardHooks hooks(std::vector<NamedTensor>{{"weight", f.parameter}},
                            {.gradient =
                                 [&](std::size_t) {
                                   f.place->collect(/*in_hook=*/true);
                                   EXPECT_TRUE(f.shows());
                                 },
                             .end = [&] { f.place->hand_out(); }});
  (f.parameter * f.parameter.detach()).square().sum().backward();
  EXPECT_TRUE(f.shows());
  EXPECT_TRUE(at::equal(f.held(), all(2)));
}

TEST(GradientPlace, DecidesInTheEndWhereOthersMayRefer) {
  Fixture f;
  const at::Tensor users = at::zeros({6});
  const BackwardHooks hooks(std::vector<NamedTensor>{{"weight", f.parameter}},
                            {.gradient = [&](std::size_t) { f.place->collect(/*in_hook=*/true); },
                             .end = [&] { f.place->hand_out(); }});
  f.parameter.mutable_grad() = users.view({2, 3});
  f.backward(4);
  EXPECT_TRUE(at::equal(users, at::full({6}, 4.0)));
  EXPECT_EQ(f.parameter.grad().data_ptr(), users.data_ptr());
  f.parameter.mutable_grad() = all(1);  // nobody else's
  f.backward(4);
  EXPECT_TRUE(f.shows());
  EXPECT_TRUE(at::equal(f.held(), all(5)));
}

TEST(GradientPlace, TakesOtherLayouts) {
  Fixture f;
  f.parameter.mutable_grad() = at::arange(6, at::kFloat).reshape({3, 2}).t();
  f.place->collect();
  EXPECT_TRUE(at::equal(f.held(), at::arange(6, at::kFloat).reshape({3, 2}).t()));
  f.parameter.mutable_grad() = all(3).to_sparse();
  f.place->collect();
  EXPECT_TRUE(at::equal(f.held(), all(3)));
  EXPECT_TRUE(f.shows());
}

TEST(GradientPlace, OutlivesItself) {
  const auto keep = std::make_shared<int>(1);
  at::Tensor gradient;
  {
    Fixture f;
    f.place.emplace(f.parameter, bytes_of(f.memory), f.layout, 1, keep);
    f.place->collect();
    f.place->hand_out();
    gradient = f.parameter.grad();
    f.place.reset();
  }
  EXPECT_GT(keep.use_count(), 1);
  gradient.reset();
  EXPECT_EQ(keep.use_count(), 1);
}

}  // namespace
}  // namespace lockstep
