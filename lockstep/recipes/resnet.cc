#include "lockstep/recipes/resnet.h"

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/relu.h>
#include <fmt/format.h>
#include <torch/nn/init.h>

namespace lockstep {
namespace {

constexpr std::int64_t kSmallest = 32;  // pixels a side

torch::nn::Conv2d convolution(std::int64_t in, std::int64_t out, std::int64_t extent,
                              std::int64_t stride) {
  torch::nn::Conv2d made(
      torch::nn::Conv2dOptions(in, out, extent).stride(stride).padding(extent / 2).bias(false));
  torch::nn::init::kaiming_normal_(made->weight, 0, torch::kFanOut, torch::kReLU);
  return made;
}

at::Tensor padded(const at::Tensor& images) {
  const std::int64_t rows = std::max<std::int64_t>(0, kSmallest - images.size(2));
  const std::int64_t columns = std::max<std::int64_t>(0, kSmallest - images.size(3));
  if (rows == 0 && columns == 0) return images;
  return at::constant_pad_nd(images,
                             {columns / 2, columns - columns / 2, rows / 2, rows - rows / 2});
}

}  // namespace

ResidualBlock::ResidualBlock(std::int64_t in, std::int64_t out, std::int64_t stride)
    : conv1_(register_module("conv1", convolution(in, out, 3, stride))),
      conv2_(register_module("conv2", convolution(out, out, 3, 1))),
      norm1_(register_module("norm1", torch::nn::BatchNorm2d(out))),
      norm2_(register_module("norm2", torch::nn::BatchNorm2d(out))) {
  if (stride == 1 && in == out) return;
  shortcut_ = register_module("shortcut", convolution(in, out, 1, stride));
  shortcut_norm_ = register_module("shortcut_norm", torch::nn::BatchNorm2d(out));
}

at::Tensor ResidualBlock::forward(const at::Tensor& input) {
  at::Tensor x = at::relu(norm1_->forward(conv1_->forward(input)));
  x = norm2_->forward(conv2_->forward(x));
  return at::relu(x + (shortcut_ ? shortcut_norm_->forward(shortcut_->forward(input)) : input));
}

ResNet18::ResNet18(std::int64_t channels, std::int64_t outputs, double dropout)
    : dropout_(dropout),
      stem_(register_module("stem", convolution(channels, 64, 3, 1))),
      norm_(register_module("norm", torch::nn::BatchNorm2d(64))),
      output_(nullptr) {
  std::int64_t in = 64;
  for (const std::int64_t out : {64, 128, 256, 512})
    for (const std::int64_t stride : {out == 64 ? 1 : 2, 1}) {
      blocks_.push_back(register_module(fmt::format("block{}", blocks_.size() + 1),
                                        std::make_shared<ResidualBlock>(in, out, stride)));
      in = out;
    }
  output_ = register_module("output", torch::nn::Linear(512, outputs));
}

at::Tensor ResNet18::forward(const at::Tensor& input) {
  at::Tensor x = at::relu(norm_->forward(stem_->forward(padded(input))));
  for (const auto& block : blocks_) x = block->forward(x);
  x = x.mean({2, 3});
  if (dropout_ > 0) x = at::dropout(x, dropout_, is_training());
  return output_->forward(x);
}

}  // namespace lockstep
