#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include <numeric>

#include "lockstep/data/ledger.h"
#include "lockstep/train/trainer.h"

namespace lockstep {

Evaluation evaluate(const World& world, const Task& task, const BatchSource& data,
                    std::int64_t batch_size) {
  const auto size = static_cast<std::uint64_t>(batch_size);
  const std::uint64_t batches = (data.size() + size - 1) / size;
  // Batch b's loss sum, weight and number of right predictions. Each is computed by one rank and
  // zero at the others, so that adding them up over the ranks is exact.
  std::vector<double> results(3 * batches);
  const bool was_training = task.module->is_training();
  task.module->eval();
  {
    at::NoGradGuard no_grad;
    const PositionRange mine = even_part(batches, static_cast<std::uint64_t>(world.size()),
                                         static_cast<std::uint64_t>(world.rank()));
    std::vector<std::uint64_t> indices;
    for (std::uint64_t b = mine.begin; b < mine.end; ++b) {
      indices.resize(std::min(size, data.size() - b * size));
      std::iota(indices.begin(), indices.end(), b * size);
      const Batch batch = data.batch(indices);
      const at::Tensor output = task.forward(batch.input);
      const LossValue loss = task.loss(output, batch.target);
      results[3 * b] = loss.sum.item<double>();
      results[3 * b + 1] = loss.weight;
      if (task.correct)
        results[3 * b + 2] = static_cast<double>(task.correct(output, batch.target));
      world.made_progress();
    }
  }
  task.module->train(was_training);
  world.group().all_reduce(std::as_writable_bytes(std::span(results)), Dtype::float64,
                           Reduction::sum, {.tag = "evaluation"});
  double loss = 0, weight = 0, correct = 0;
  for (std::size_t i = 0; i < results.size(); i += 3) {
    loss += results[i];
    weight += results[i + 1];
    correct += results[i + 2];
  }
  Evaluation evaluation;
  evaluation.samples = data.size();
  evaluation.loss = weight > 0 ? loss / weight : 0.0;
  evaluation.accuracy = weight > 0 ? correct / weight : 0.0;
  return evaluation;
}

}  // namespace lockstep
