#include "lockstep/train/step.h"

#include <ATen/Context.h>
#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {

StepExecutor::StepExecutor(const Task& task, SharedWeights& weights, const BatchSource& data,
                           const Ledger& ledger, const TrainerOptions& options, PhaseTimer& timer)
    : task_(task),
      weights_(weights),
      data_(data),
      ledger_(ledger),
      options_(options),
      timer_(timer) {}

StepOutcome StepExecutor::decide(const Step& step, const Ledger::Epoch& order) {
  const std::uint64_t count = pieces(step);
  weights_.compute([&](int virtual_rank) { return compute(step, order, virtual_rank, count); });
  timer_.mark(Phase::backward);
  for (OptimizerOptions& group : weights_.groups()) group.lr = step.lr;
  StepOutcome outcome;
  try {
    outcome = weights_.decide(step.measure);
  } catch (const NonFiniteError& error) {
    const char* const kept =
        weights_.is_finite()
            ? "training stopped before this step was applied, and the last good weights are kept"
            : "an earlier step's update overflowed; kept are the weights of the last whole epoch, "
              "if any";
    throw Error(fmt::format("{}; {}; hint: a smaller optimizer.lr, or train.clip_grad_norm",
                            error.what(), kept));
  }
  timer_.mark(Phase::communication);
  timer_.queue(weights_.communication());
  return outcome;
}

void StepExecutor::update(std::span<const std::byte> note) {
  weights_.update(note);
  timer_.mark(Phase::optimizer);
}

// As many on every virtual rank that has samples, so that what counts batches (batch norm) agrees.
std::uint64_t StepExecutor::pieces(const Step& step) const {
  auto count = static_cast<std::uint64_t>(options_.accumulate);
  for (int v = 0; v < options_.virtual_ranks && count > 1; ++v)
    if (const std::uint64_t size = ledger_.positions(step.of_epoch, v).size(); size > 0)
      count = std::min(count, size);
  return count;
}

// Autograd adds the pieces' gradients up in .grad, one after the other. Whether the first lies in
// its place or not, sums are of whole gradients: no product accumulates into another's result.
VirtualLoss StepExecutor::compute(const Step& step, const Ledger::Epoch& order, int virtual_rank,
                                  std::uint64_t pieces) {
  const PositionRange range = ledger_.positions(step.of_epoch, virtual_rank);
  VirtualLoss sum;
  if (range.size() == 0) return sum;
  at::manual_seed(mix({options_.seed, static_cast<std::uint64_t>(step.number),
                       static_cast<std::uint64_t>(virtual_rank)}));
  for (std::uint64_t piece = 0; piece < pieces; ++piece) {
    const PositionRange part = even_part(range.size(), pieces, piece);
    compute_piece(step, order, {range.begin + part.begin, range.begin + part.end},
                  /*last=*/piece + 1 == pieces, sum);
  }
  return sum;
}

void StepExecutor::compute_piece(const Step& step, const Ledger::Epoch& order, PositionRange range,
                                 bool last, VirtualLoss& sum) {
  indices_.clear();
  for (std::uint64_t position = range.begin; position < range.end; ++position)
    indices_.push_back(order.index(position));
  const Batch batch = data_.training_batch(indices_, step.epoch);
  timer_.mark(Phase::data);
  const LossValue loss = [&] {
    const Autocast autocast(options_.precision);
    return task_.loss(task_.forward(batch.input), batch.target);
  }();
  sum.sum += loss.sum.item<double>();
  sum.weight += loss.weight;
  timer_.mark(Phase::forward);
  if (last) weights_.last_backward(sum.weight);
  loss.sum.backward();
  timer_.mark(Phase::backward);
}

}  // namespace lockstep
