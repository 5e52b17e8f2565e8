#include "lockstep/train/step.h"

#include <ATen/Context.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {
StepExecutor::StepExecutor(const World& world, const Task& task, FlatModule& module,
                           Optimizer& optimizer, const BatchSource& data, const Ledger& ledger,
                           const TrainerOptions& options, PhaseTimer& timer)
    : world_(world),
      task_(task),
      module_(module),
      optimizer_(optimizer),
      data_(data),
      ledger_(ledger),
      options_(options),
      timer_(timer),
      sum_(world, options.virtual_ranks, module.contribution_size(), "gradients"),
      losses_(2 * static_cast<std::size_t>(options.virtual_ranks)) {}

StepResult StepExecutor::run(const Ledger::Epoch& epoch, std::uint64_t step, std::int64_t number,
                             double lr) {
  std::fill(losses_.begin(), losses_.end(), 0.0);
  compute(epoch, step, number);

  const std::span<float> sum = sum_.reduce("gradients");
  share_losses();
  timer_.mark(Phase::communication);

  StepResult result;
  int computed = 0;  // virtual ranks that had samples
  for (std::size_t v = 0; v < losses_.size(); v += 2) {
    result.loss_sum += losses_[v];
    result.weight += losses_[v + 1];
    computed += losses_[v + 1] > 0 ? 1 : 0;
  }
  const std::span<float> gradient = sum.first(module_.gradient_size());
  const std::span<float> buffers = sum.subspan(module_.gradient_size());
  const double squares = sum_of_squares(gradient);
  if (!std::isfinite(result.loss_sum + squares + sum_of_squares(buffers)))
    refuse_non_finite(epoch, step, number);
  result.gradient_norm = result.weight > 0 ? std::sqrt(squares) / result.weight : 0.0;

  agree_on_integer_buffers(step);

  // Decided. From here on nothing can fail.
  double scale = result.weight > 0 ? 1.0 / result.weight : 0.0;
  if (options_.clip_grad_norm > 0 && result.gradient_norm > options_.clip_grad_norm)
    scale *= options_.clip_grad_norm / result.gradient_norm;
  optimizer_.step(module_.weights(), gradient, static_cast<float>(scale), lr);
  module_.commit_buffers(buffers, computed);
  timer_.mark(Phase::optimizer);
  return result;
}

void StepExecutor::compute(const Ledger::Epoch& epoch, std::uint64_t step, std::int64_t number) {
  sum_.accumulate([&](int virtual_rank, std::span<float> slot) {
    compute_virtual_rank(epoch, ledger_.positions(step, virtual_rank), virtual_rank, number, slot);
  });
}

void StepExecutor::compute_virtual_rank(const Ledger::Epoch& epoch, PositionRange range,
                                        int virtual_rank, std::int64_t number,
                                        std::span<float> slot) {
  if (range.size() == 0) {
    std::fill(slot.begin(), slot.end(), 0.0f);
    return;
  }
  indices_.clear();
  for (std::uint64_t position = range.begin; position < range.end; ++position)
    indices_.push_back(epoch.index(position));
  const Batch batch = data_.batch(indices_);
  module_.restore_buffers();
  at::manual_seed(mix({options_.seed, static_cast<std::uint64_t>(number),
                       static_cast<std::uint64_t>(virtual_rank)}));
  timer_.mark(Phase::data);

  const LossValue loss = task_.loss(task_.forward(batch.input), batch.target);
  const double loss_sum = loss.sum.item<double>();
  timer_.mark(Phase::forward);

  loss.sum.backward();
  module_.collect(slot);
  losses_[2 * static_cast<std::size_t>(virtual_rank)] = loss_sum;
  losses_[2 * static_cast<std::size_t>(virtual_rank) + 1] = loss.weight;
  timer_.mark(Phase::backward);
}

// Every virtual rank's numbers stand at one rank and are zero at the others: any order of adding
// gives the same bits.
void StepExecutor::share_losses() {
  world_.group().all_reduce(std::as_writable_bytes(std::span(losses_)), Dtype::float64,
                            Reduction::sum, {.tag = "losses"});
}

// Names the culprit. Nothing has been updated, so this step's contributions can be computed once
// more to see whose is bad: the reduction has overwritten them.
void StepExecutor::refuse_non_finite(const Ledger::Epoch& epoch, std::uint64_t step,
                                     std::int64_t number) {
  compute(epoch, step, number);
  const std::vector<VirtualRange>& runs = sum_.layout().runs;
  std::vector<double> bad(runs.size());
  for (int i = 0; i < sum_.contributions(); ++i)
    if (!std::isfinite(sum_of_squares(sum_.slot(i))))
      bad[static_cast<std::size_t>(world_.rank())] = 1;
  world_.group().all_reduce(std::as_writable_bytes(std::span(bad)), Dtype::float64, Reduction::sum,
                            {.tag = "non-finite gradients"});
  std::string what = "the sum of all ranks' gradients and buffers is not finite";
  for (std::size_t rank = bad.size(); rank-- > 0;)
    if (bad[rank] > 0)
      what = fmt::format("the gradient or a buffer of rank {} is not finite", rank);
  for (std::size_t rank = runs.size(); rank-- > 0;)
    for (int v = runs[rank].lo; v < runs[rank].hi; ++v)
      if (const double loss = losses_[2 * static_cast<std::size_t>(v)]; !std::isfinite(loss))
        what = fmt::format("the loss of rank {} is {}", rank, loss);
  const char* const kept =
      module_.is_finite()
          ? "training stopped before this step was applied, and the last good weights are kept"
          : "an earlier step's update overflowed; kept are the weights of the last whole epoch, if "
            "any";
  throw Error(fmt::format("step {}: {}; {}; hint: a smaller optimizer.lr, or train.clip_grad_norm",
                          number + 1, what, kept));
}

// A short last batch can leave virtual ranks without samples, and a worker that computed nothing
// has integer buffers (batch norm's counter) that are one step behind. Virtual rank 0, on rank 0,
// never goes without.
void StepExecutor::agree_on_integer_buffers(std::uint64_t step) {
  if (ledger_.positions(step, options_.virtual_ranks - 1).size() > 0) return;
  for (std::span<std::byte> buffer : module_.integer_buffers())
    world_.group().broadcast(buffer, Dtype::uint8, 0, {.tag = "integer buffers"});
}

}  // namespace lockstep
