// A decoder-only transformer as GPT-2 (Radford et al., 2019): token and learned position
// embeddings, blocks of causal attention and a dense layer, each after a layer norm and added to
// its input. One thread.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/module.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/modules/normalization.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "lockstep/job/job.h"

namespace lockstep {

class GptBlock : public torch::nn::Module {
 public:
  explicit GptBlock(const ModelSettings& settings);
  at::Tensor forward(const at::Tensor& input);

 private:
  at::Tensor attend(const at::Tensor& input);

  std::int64_t heads_;
  double dropout_;
  torch::nn::LayerNorm norm1_, norm2_;
  torch::nn::Linear qkv_, joined_, wide_, narrow_;
};

class Gpt : public torch::nn::Module {
 public:
  // layers, heads, width, context, tied, bias and dropout of the settings count.
  Gpt(const ModelSettings& settings, std::int64_t vocabulary);
  // [n, length] int64, length up to the context -> [n, length, vocabulary]
  at::Tensor forward(const at::Tensor& tokens);

 private:
  double dropout_;
  torch::nn::Embedding tokens_, positions_;
  std::vector<std::shared_ptr<GptBlock>> blocks_;
  torch::nn::LayerNorm norm_;
  torch::nn::Linear output_{nullptr};  // none: tied
};

}  // namespace lockstep
