#include "lockstep/train/step.h"

#include <ATen/Context.h>
#include <fmt/format.h>

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

StepOutcome StepExecutor::run(const Ledger::Epoch& epoch, std::uint64_t step, std::int64_t number,
                              double lr, bool measure) {
  weights_.compute([&](int virtual_rank) {
    return compute(epoch, ledger_.positions(step, virtual_rank), virtual_rank, number);
  });
  timer_.mark(Phase::backward);
  for (OptimizerOptions& group : weights_.groups()) group.lr = lr;
  StepOutcome outcome;
  try {
    outcome = weights_.decide(measure);
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
  weights_.update();
  timer_.mark(Phase::optimizer);
  return outcome;
}

VirtualLoss StepExecutor::compute(const Ledger::Epoch& epoch, PositionRange range,
                                  int virtual_rank, std::int64_t number) {
  if (range.size() == 0) return {};
  indices_.clear();
  for (std::uint64_t position = range.begin; position < range.end; ++position)
    indices_.push_back(epoch.index(position));
  const Batch batch = data_.batch(indices_);
  at::manual_seed(mix({options_.seed, static_cast<std::uint64_t>(number),
                       static_cast<std::uint64_t>(virtual_rank)}));
  timer_.mark(Phase::data);
  const LossValue loss = [&] {
    const Autocast autocast(options_.precision);
    return task_.loss(task_.forward(batch.input), batch.target);
  }();
  const double loss_sum = loss.sum.item<double>();
  timer_.mark(Phase::forward);
  loss.sum.backward();
  timer_.mark(Phase::backward);
  return {loss_sum, loss.weight};
}

}  // namespace lockstep
