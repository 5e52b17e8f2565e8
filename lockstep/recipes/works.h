// The five works that training is measured by: models, made-up data, batches and optimizers, the
// same as in bench/training/ddp.py. Nothing is learned; a step costs what it would on real data.
// One thread.
//
//   W1  MLP 784-1024-1024-10, Adam, 64 samples a worker
//   W2  CNN conv32-conv64-fc128-10 on 28×28, momentum, 64
//   W3  ResNet-18 on 32×32 with 3 channels, momentum, 16
//   W4  GPT, 6 layers, width 384, 6 heads, context 128, vocabulary 65, AdamW, 4
//   W5  MLP 4096-4096-4096-4096-10, 50 M parameters, Adam, 16
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/job/job.h"
#include "lockstep/recipes/model.h"
#include "lockstep/train/task.h"

namespace lockstep {

struct Work {
  std::string name;  // "W1"
  ModelSettings model;
  std::vector<std::int64_t> sample_shape;  // W4: one block
  std::int64_t outputs = 10;               // classes, or the vocabulary
  std::int64_t batch_size = 64;            // of a worker
  OptimizerSettings optimizer;             // adam, adamw or momentum
};
const std::vector<Work>& works();
const Work& work_named(std::string_view name);  // throws ConfigError

Model make_model(const Work& work, std::uint64_t seed);
// A few batches, of which step s takes the s-th in turn.
std::vector<Batch> make_batches(const Work& work, std::uint64_t seed);
at::Tensor mean_loss(const at::Tensor& output, const at::Tensor& target);  // cross-entropy

}  // namespace lockstep
