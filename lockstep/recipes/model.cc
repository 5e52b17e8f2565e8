#include "lockstep/recipes/model.h"

#include <ATen/Context.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/max_pool2d.h>
#include <ATen/ops/relu.h>
#include <fmt/format.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/conv.h>
#include <torch/nn/modules/linear.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/recipes/gpt.h"
#include "lockstep/recipes/resnet.h"

namespace lockstep {
namespace {

using torch::nn::Linear;
using torch::nn::LinearOptions;

// Linear layers with ReLU between them; optional dropout before the last.
class Mlp : public torch::nn::Module {
 public:
  Mlp(const ModelSettings& settings, std::int64_t inputs, std::int64_t outputs)
      : dropout_(settings.dropout) {
    std::vector<std::int64_t> widths = settings.widths;
    widths.push_back(outputs);
    for (std::size_t i = 0; i < widths.size(); ++i) {
      layers_.push_back(
          register_module(fmt::format("layer{}", i + 1),
                          Linear(LinearOptions(inputs, widths[i]).bias(settings.bias))));
      inputs = widths[i];
    }
  }

  at::Tensor forward(const at::Tensor& input) {
    at::Tensor x = input.flatten(1);
    for (std::size_t i = 0; i + 1 < layers_.size(); ++i) x = at::relu(layers_[i]->forward(x));
    if (dropout_ > 0) x = at::dropout(x, dropout_, is_training());
    return layers_.back()->forward(x);
  }

 private:
  double dropout_;
  std::vector<Linear> layers_;
};

// Two blocks of 3×3 convolution (32, then 64 channels), optional batch norm, ReLU and 2×2
// max-pooling; a dense layer of 128 with ReLU; optional dropout; the output layer.
class Cnn : public torch::nn::Module {
 public:
  Cnn(const ModelSettings& settings, std::int64_t channels, std::int64_t height, std::int64_t width,
      std::int64_t outputs)
      : dropout_(settings.dropout),
        conv1_(register_module("conv1", convolution(channels, 32))),
        conv2_(register_module("conv2", convolution(32, 64))),
        dense_(register_module("dense", Linear(64 * (height / 4) * (width / 4), 128))),
        output_(register_module("output", Linear(128, outputs))) {
    if (settings.batch_norm) {
      norm1_ = register_module("norm1", torch::nn::BatchNorm2d(32));
      norm2_ = register_module("norm2", torch::nn::BatchNorm2d(64));
    }
  }

  at::Tensor forward(const at::Tensor& input) {
    at::Tensor x = block(conv1_, norm1_, input);
    x = block(conv2_, norm2_, x).flatten(1);
    x = at::relu(dense_->forward(x));
    if (dropout_ > 0) x = at::dropout(x, dropout_, is_training());
    return output_->forward(x);
  }

 private:
  static torch::nn::Conv2d convolution(std::int64_t in, std::int64_t out) {
    return torch::nn::Conv2d(torch::nn::Conv2dOptions(in, out, 3).padding(1));
  }
  static at::Tensor block(torch::nn::Conv2d& convolution, torch::nn::BatchNorm2d& norm,
                          const at::Tensor& input) {
    at::Tensor x = convolution->forward(input);
    if (norm) x = norm->forward(x);
    return at::max_pool2d(at::relu(x), 2);
  }

  double dropout_;
  torch::nn::Conv2d conv1_, conv2_;
  torch::nn::BatchNorm2d norm1_{nullptr}, norm2_{nullptr};
  Linear dense_, output_;
};

// Images as [n, channels, height, width]; the sample's shape says where the channels are one.
struct ImageShape {
  std::int64_t channels, height, width;
};
ImageShape image_shape(const std::string& model, const std::vector<std::int64_t>& shape) {
  const std::size_t size = shape.size();
  if (size < 2 || size > 3 || std::min(shape[size - 1], shape[size - 2]) < 4)
    throw ConfigError(fmt::format("model.name: {} needs images of at least 4 x 4 pixels", model),
                      "model.name = \"mlp\" takes any table");
  return {size == 3 ? shape[0] : 1, shape[size - 2], shape[size - 1]};
}

template <typename Net>
Model wrap(std::shared_ptr<Net> net) {
  return {net, [net](const at::Tensor& input) { return net->forward(input); }};
}

}  // namespace

Model make_model(const ModelSettings& settings, const std::vector<std::int64_t>& sample_shape,
                 std::int64_t outputs, std::uint64_t seed) {
  at::manual_seed(mix({seed, 0x696e6974}));  // "init"
  if (settings.name == "gpt") return wrap(std::make_shared<Gpt>(settings, outputs));
  if (settings.name == "cnn" || settings.name == "resnet18") {
    const ImageShape image = image_shape(settings.name, sample_shape);
    if (settings.name == "resnet18")
      return wrap(std::make_shared<ResNet18>(image.channels, outputs, settings.dropout));
    return wrap(
        std::make_shared<Cnn>(settings, image.channels, image.height, image.width, outputs));
  }
  std::int64_t inputs = 1;
  for (std::int64_t extent : sample_shape) inputs *= extent;
  return wrap(std::make_shared<Mlp>(settings, inputs, outputs));
}

}  // namespace lockstep
