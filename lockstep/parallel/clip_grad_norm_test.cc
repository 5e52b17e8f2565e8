#include "lockstep/parallel/clip_grad_norm.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/nn/utils/clip_grad.h>

#include <limits>

#include "lockstep/parallel/data_parallel.h"
#include "lockstep/parallel/replicas_test.h"

namespace lockstep {
namespace {

using testing::HasSubstr;

std::vector<at::Tensor> with_gradients() {
  std::vector<at::Tensor> parameters;
  for (const std::vector<std::int64_t>& shape : {std::vector<std::int64_t>{70, 33}, {}, {1025}}) {
    parameters.push_back(at::zeros(shape).requires_grad_());
    parameters.back().mutable_grad() = numbers(shape, static_cast<int>(parameters.size()));
  }
  parameters[0].mutable_grad() = parameters[0].grad().t().contiguous().t();
  parameters.push_back(at::zeros({5}, at::kDouble).requires_grad_());
  parameters.back().mutable_grad() = numbers({5}, 9).to(at::kDouble);
  parameters.push_back(at::zeros({2}).requires_grad_());  // without a gradient
  return parameters;
}

TEST(ClipGradNorm, IsTorchs) {
  for (const double type : {2.0, 1.0, 3.0, std::numeric_limits<double>::infinity()})
    for (const double max_norm : {0.5, 1e9}) {
      const auto ours = with_gradients(), theirs = with_gradients();
      const double norm = clip_grad_norm_(ours, max_norm, type);
      EXPECT_NEAR(norm, torch::nn::utils::clip_grad_norm_(theirs, max_norm, type), 1e-5 * norm);
      for (std::size_t i = 0; i + 1 < ours.size(); ++i)
        EXPECT_TRUE(at::allclose(ours[i].grad(), theirs[i].grad(), 1e-5, 1e-7)) << type;
      EXPECT_FALSE(ours.back().grad().defined());
    }
}

TEST(ClipGradNorm, OfNothingIsZero) {
  const at::Tensor empty = at::zeros({0, 3}).requires_grad_();
  empty.mutable_grad() = at::zeros({0, 3});
  for (const double type : {2.0, std::numeric_limits<double>::infinity()})
    EXPECT_EQ(clip_grad_norm_({empty, at::zeros({2}).requires_grad_()}, 1, type), 0);
}

TEST(ClipGradNorm, NamesWhatIsNotFinite) {
  const auto parameters = with_gradients();
  parameters[2].mutable_grad()[7] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor before = parameters[0].grad().clone();
  EXPECT_THAT(message_of<Error>([&] { clip_grad_norm_(parameters, 1, 2, true); }),
              HasSubstr("parameter 3 of 5, [1025]"));
  EXPECT_TRUE(at::equal(parameters[0].grad(), before));
  EXPECT_TRUE(std::isnan(clip_grad_norm_(parameters, 1)));
  EXPECT_TRUE(std::isnan(clip_grad_norm_(parameters, 1, std::numeric_limits<double>::infinity())));
  EXPECT_THAT(message_of<ConfigError>([&] { clip_grad_norm_(parameters, 1, 0); }),
              HasSubstr("norm_type 0"));
}

TEST(ClipGradNorm, IsTheSameOnAllRanks) {
  Results results;
  run_ranks(3, [&](const World& world) {
    Net net(1);
    auto model = data_parallel(net, world);
    loss_of(model->forward(inputs(world.rank(), 0)), 0).backward();
    const double norm = clip_grad_norm_(net->parameters(), 0.01);
    std::vector<at::Tensor> gradients = {at::full({}, norm, at::kDouble)};
    for (const auto& parameter : net->parameters()) gradients.push_back(parameter.grad().clone());
    results.put(world.rank(), gradients);
  });
  Net plain(1);
  std::vector<std::vector<at::Tensor>> parts(4);
  for (int rank = 0; rank < 3; ++rank) {
    plain->zero_grad();
    loss_of(plain->forward(inputs(rank, 0)), 0).backward();
    for (std::size_t i = 0; i < 4; ++i) parts[i].push_back(plain->parameters()[i].grad());
  }
  for (std::size_t i = 0; i < 4; ++i)
    plain->parameters()[i].mutable_grad() = tree_sum(parts[i]) / 3;
  const double norm = clip_grad_norm_(plain->parameters(), 0.01);
  EXPECT_GT(norm, 0.01);
  std::vector<at::Tensor> expected = {at::full({}, norm, at::kDouble)};
  for (const auto& parameter : plain->parameters()) expected.push_back(parameter.grad());
  results.expect_all(3, expected);
}

}  // namespace
}  // namespace lockstep
