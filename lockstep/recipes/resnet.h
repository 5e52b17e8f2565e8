// ResNet-18 (He et al., "Deep Residual Learning for Image Recognition", 2015) for small images: a
// stem of one 3×3 convolution without pooling, as it is used on CIFAR; smaller images are padded to
// 32×32. One thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace lockstep {

// Two 3×3 convolutions, each with batch norm; the input is added, through a 1×1 convolution where
// the extents differ.
class ResidualBlock : public torch::nn::Module {
 public:
  ResidualBlock(std::int64_t in, std::int64_t out, std::int64_t stride);
  at::Tensor forward(const at::Tensor& input);

 private:
  torch::nn::Conv2d conv1_, conv2_, shortcut_{nullptr};
  torch::nn::BatchNorm2d norm1_, norm2_, shortcut_norm_{nullptr};
};

class ResNet18 : public torch::nn::Module {
 public:
  ResNet18(std::int64_t channels, std::int64_t outputs, double dropout = 0);
  at::Tensor forward(const at::Tensor& input);  // [n, channels, height, width] -> [n, outputs]

 private:
  double dropout_;
  torch::nn::Conv2d stem_;
  torch::nn::BatchNorm2d norm_;
  std::vector<std::shared_ptr<ResidualBlock>> blocks_;
  torch::nn::Linear output_;
};

}  // namespace lockstep
