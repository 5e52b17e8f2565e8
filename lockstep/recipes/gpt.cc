#include "lockstep/recipes/gpt.h"

#include <ATen/ops/dropout.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/scaled_dot_product_attention.h>
#include <fmt/format.h>
#include <torch/nn/init.h>

#include <cmath>

namespace lockstep {
namespace {

torch::nn::LayerNorm layer_norm(std::int64_t width) {
  return torch::nn::LayerNorm(torch::nn::LayerNormOptions({width}));
}

torch::nn::Linear linear(std::int64_t in, std::int64_t out, bool bias, double deviation = 0.02) {
  torch::nn::Linear made(torch::nn::LinearOptions(in, out).bias(bias));
  torch::nn::init::normal_(made->weight, 0, deviation);
  if (bias) torch::nn::init::zeros_(made->bias);
  return made;
}

torch::nn::Embedding embedding(std::int64_t count, std::int64_t width) {
  torch::nn::Embedding made(count, width);
  torch::nn::init::normal_(made->weight, 0, 0.02);
  return made;
}

// What is added to the residual path starts smaller the more blocks add to it.
double residual_deviation(const ModelSettings& settings) {
  return 0.02 / std::sqrt(2.0 * static_cast<double>(settings.layers));
}

}  // namespace

GptBlock::GptBlock(const ModelSettings& settings)
    : heads_(settings.heads),
      dropout_(settings.dropout),
      norm1_(register_module("norm1", layer_norm(settings.width))),
      norm2_(register_module("norm2", layer_norm(settings.width))),
      qkv_(register_module("qkv", linear(settings.width, 3 * settings.width, settings.bias))),
      joined_(register_module("joined", linear(settings.width, settings.width, settings.bias,
                                               residual_deviation(settings)))),
      wide_(register_module("wide", linear(settings.width, 4 * settings.width, settings.bias))),
      narrow_(register_module("narrow", linear(4 * settings.width, settings.width, settings.bias,
                                               residual_deviation(settings)))) {}

at::Tensor GptBlock::attend(const at::Tensor& input) {
  const std::int64_t n = input.size(0), length = input.size(1), width = input.size(2);
  const std::vector<at::Tensor> parts = qkv_->forward(input).split(width, 2);
  const auto by_head = [&](const at::Tensor& part) {
    return part.reshape({n, length, heads_, width / heads_}).transpose(1, 2);
  };
  const at::Tensor mixed =
      at::scaled_dot_product_attention(by_head(parts[0]), by_head(parts[1]), by_head(parts[2]), {},
                                       is_training() ? dropout_ : 0.0, /*is_causal=*/true);
  return joined_->forward(mixed.transpose(1, 2).reshape({n, length, width}));
}

at::Tensor GptBlock::forward(const at::Tensor& input) {
  const auto dropped = [&](const at::Tensor& x) {
    return dropout_ > 0 ? at::dropout(x, dropout_, is_training()) : x;
  };
  const at::Tensor x = input + dropped(attend(norm1_->forward(input)));
  const at::Tensor wide = at::gelu(wide_->forward(norm2_->forward(x)), "tanh");
  return x + dropped(narrow_->forward(wide));
}

Gpt::Gpt(const ModelSettings& settings, std::int64_t vocabulary)
    : dropout_(settings.dropout),
      tokens_(register_module("tokens", embedding(vocabulary, settings.width))),
      positions_(register_module("positions", embedding(settings.context, settings.width))),
      norm_(nullptr) {
  for (std::int64_t i = 0; i < settings.layers; ++i)
    blocks_.push_back(
        register_module(fmt::format("block{}", i + 1), std::make_shared<GptBlock>(settings)));
  norm_ = register_module("norm", layer_norm(settings.width));
  if (!settings.tied)
    output_ = register_module("output", linear(settings.width, vocabulary, /*bias=*/false));
}

at::Tensor Gpt::forward(const at::Tensor& tokens) {
  at::Tensor x = tokens_->forward(tokens) + positions_->weight.slice(0, 0, tokens.size(1));
  if (dropout_ > 0) x = at::dropout(x, dropout_, is_training());
  for (const auto& block : blocks_) x = block->forward(x);
  x = norm_->forward(x);
  return output_ ? output_->forward(x) : at::linear(x, tokens_->weight);
}

}  // namespace lockstep
