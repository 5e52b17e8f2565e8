#include "lockstep/parallel/shared_weights.h"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <utility>

#include "lockstep/base/hash.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/collective/kernels.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/parallel/same_module.h"
#include "lockstep/parallel/shared_weights_state.h"

namespace lockstep {
namespace {

constexpr const char* kSumNotFinite = "the sum of all ranks' gradients and buffers is not finite";

// Equal numbers, equal digest; a double holds it exactly.
double digest_of(std::span<const OptimizerOptions> groups) {
  std::uint64_t digest = groups.size();
  for (const OptimizerOptions& group : groups)
    for (const double number :
         {group.lr, group.momentum, group.dampening, group.betas.first, group.betas.second,
          group.eps, group.weight_decay, group.lr_decay, group.alpha})
      digest = mix({digest, std::bit_cast<std::uint64_t>(number)});
  return static_cast<double>(digest >> 12);
}

std::uint64_t digest_of(std::span<const std::byte> bytes, std::uint64_t digest) {
  for (; !bytes.empty(); bytes = bytes.subspan(std::min<std::size_t>(8, bytes.size()))) {
    std::uint64_t word = 0;
    std::memcpy(&word, bytes.data(), std::min<std::size_t>(8, bytes.size()));
    digest = mix({digest, word});
  }
  return digest;
}

}  // namespace

NonFiniteError::NonFiniteError(std::uint64_t step, const std::string& what)
    : Error(fmt::format("step {}: {}", step, what)) {}

// Rank 0: the module's buffers become the committed ones of `step`.
void SharedWeights::State::copy_buffers_home(std::uint64_t step) {
  const auto weights = std::as_writable_bytes(shared->weights());
  copy_into(committed_buffers(weights), buffers, float_buffers);
  for (std::size_t i = 0; i < integers.entries.size(); ++i)
    copy_bytes(integer_home(step, i), bytes_of(parts.integer_buffers[i].tensor));
}

void SharedWeights::State::refresh_integers() {
  for (std::size_t i = 0; i < integers.entries.size(); ++i)
    copy_bytes(bytes_of(committed_integers[i]), integer_home(last.step, i));
}

void SharedWeights::State::restore_buffers() {
  const auto committed = committed_buffers(view->bytes());
  for (std::size_t i = 0; i < buffers.entries.size(); ++i)
    copy_bytes(bytes_of(float_buffers[i]),
               committed.subspan(buffers.entries[i].offset * sizeof(float),
                                 buffers.entries[i].count * sizeof(float)));
  for (std::size_t i = 0; i < committed_integers.size(); ++i)
    copy_bytes(bytes_of(parts.integer_buffers[i].tensor), bytes_of(committed_integers[i]));
}

// After a forward: buffers that are no numbers to average, a counter of batches, have the same
// values on all virtual ranks. Those of rank 0 are the step's.
void SharedWeights::State::keep_integers() {
  std::uint64_t digest = 0;
  for (std::size_t i = 0; i < integers.entries.size(); ++i) {
    const auto live = bytes_of(parts.integer_buffers[i].tensor);
    digest = digest_of(live, digest);
    if (is_leader()) copy_bytes(integer_home(last.step + 1, i), live);
  }
  integers_digest = static_cast<double>(digest >> 12 | 1);
}

// The next backward writes what it can straight into this slot.
void SharedWeights::State::bear_gradients_in(int index) {
  if (direct_slot == index) return;
  direct->set_places(std::as_writable_bytes(slot(index)).first(parameters.bytes()), parameters);
  direct_slot = index;
}

// The gradients of a backward, and the buffers after it, into a slot.
void SharedWeights::State::collect(int index) {
  gather_gradients(trained, parameters, slot(index).first(parameters.total));
  copy_into(std::as_writable_bytes(slot(index).subspan(parameters.total)), buffers, float_buffers);
}

void SharedWeights::State::accumulate(const Compute& compute) {
  std::ranges::fill(losses, VirtualLoss{});
  integers_digest = 0;
  if (nodes) begin_reduction();
  for (const AccumulateStep& step : plan.steps) {
    bear_gradients_in(step.slot);
    restore_buffers();
    if (nodes && &step == &plan.steps.back()) nodes->last_step = &step;
    const VirtualLoss loss = compute(step.virtual_rank);
    world.made_progress();
    const double told =
        std::exchange(losses[static_cast<std::size_t>(step.virtual_rank)], loss).weight;
    if (loss.weight > 0) keep_integers();
    if (nodes && nodes->streams) {
      if (loss.weight != told)
        throw Error(
            fmt::format("shared_weights: last_backward() was told a weight of {}, and it "
                        "is {}",
                        told, loss.weight));
      stream_rest();
      continue;
    }
    collect(step.slot);
    if (loss.weight == 0) std::ranges::fill(slot(step.slot), 0.0f);
    merge(step, 0, spec.elements);
  }
}

void SharedWeights::State::merge(const AccumulateStep& step, std::uint64_t begin,
                                 std::uint64_t end) {
  const BinaryKernel add = kernels().binary(Dtype::float32, Reduction::sum);
  for (int top = step.slot; top > step.slot - step.merges; --top) {
    float* const sum = slot(top - 1).data() + begin;
    add(sum, sum, slot(top).data() + begin, end - begin);
  }
}

// Where a block is half written.
SliceUpdate::Hook SharedWeights::State::faults_within(Point point, std::uint64_t step) {
  if (faults.empty()) return {};
  return [this, point, step](SliceUpdate::Moment moment, std::uint64_t) {
    if (moment == SliceUpdate::Moment::half_home) faults.at(point, step);
  };
}

// Throws the same on every rank.
void SharedWeights::State::check_numbers(const RankNumbers& ranks) {
  const auto& [options_of, integers_of, magnitudes, moves, stops] = ranks;
  double computed = 0;  // the first digest of a rank that computed something
  for (std::size_t rank = 0; rank < options_of.size(); ++rank) {
    if (options_of[rank] != options_of[0])
      throw Error(
          fmt::format("step {}: rank {} has other learning rates or other options of the "
                      "optimizer than rank 0",
                      last.step + 1, rank));
    if (computed == 0) computed = integers_of[rank];
    if (integers_of[rank] != 0 && integers_of[rank] != computed)
      throw Error(
          fmt::format("step {}: buffers of rank {} that are not floating point (the first "
                      "is '{}') differ from those of the ranks before it",
                      last.step + 1, rank, integers.entries.front().name));
  }
  std::string what;
  for (std::size_t rank = 0; rank < magnitudes.size(); ++rank) {
    const VirtualRange theirs = tree.runs[rank];
    for (int v = theirs.lo; v < theirs.hi && what.empty(); ++v)
      if (const double loss = losses[static_cast<std::size_t>(v)].sum; !std::isfinite(loss))
        what = fmt::format("the loss of rank {} is {}", rank, loss);
  }
  for (std::size_t rank = 0; rank < magnitudes.size() && what.empty(); ++rank)
    if (std::isinf(magnitudes[rank]))
      what = fmt::format("the gradient or a buffer of rank {} is not finite", rank);
  const auto is_nan = [](double one) { return std::isnan(one); };
  if (what.empty() && std::ranges::any_of(magnitudes, is_nan)) what = kSumNotFinite;
  if (!what.empty()) throw NonFiniteError(last.step + 1, what);
}

SharedWeights::SharedWeights(torch::nn::Module& module, const World& world,
                             std::vector<ParameterGroup> groups,
                             const SharedWeightsOptions& options, const InitialState* initial)
    : state_(std::make_unique<State>(module, world, groups, options)) {
  State& s = *state_;
  if (world.size() > 1)
    check_same_module(world.group(), named_parameters(module), named_buffers(module));
  s.take_up(initial);
  s.point_module();
  s.place_contributions();
  s.refresh_integers();
  s.restore_buffers();
  if (s.run().size() == 1) s.bear_gradients_in(0);  // for contribute()
}

SharedWeights::SharedWeights(torch::nn::Module& module, const World& world,
                             const OptimizerOptions& optimizer, const SharedWeightsOptions& options,
                             const InitialState* initial)
    : SharedWeights(module, world,
                    std::vector{ParameterGroup{tensors_of(named_parameters(module)), optimizer}},
                    options, initial) {}

// The module goes on as one of its own. What this rank has contributed stays for the next
// generation, if there can be one.
SharedWeights::~SharedWeights() {
  state_->queue.reset();  // its calls use the module's contributions
  try {
    state_->view->make_private();
    if (!state_->world.is_elastic()) state_->world.release(state_->slots_name());
  } catch (const Error&) {  // it stays read-only
  }
}

void SharedWeights::compute(const Compute& compute) {
  state_->faults.at(Point::start, committed_step() + 1);
  state_->accumulate(compute);
}

void SharedWeights::last_backward(double weight) {
  State& s = *state_;
  if (!s.nodes || s.nodes->last_step == nullptr || weight == 0) return;
  s.losses[static_cast<std::size_t>(s.nodes->last_step->virtual_rank)].weight = weight;
  s.nodes->streams = true;
  s.nodes->arrived.assign(s.trained.size(), false);
}

void SharedWeights::contribute(double weight) {
  State& s = *state_;
  if (s.run().size() != 1)
    throw ConfigError(fmt::format("shared_weights: a rank computes {} virtual ranks here: their "
                                  "gradients are collected one after the other",
                                  s.run().size()),
                      "use compute(), or as many virtual ranks as ranks");
  if (!std::isfinite(weight) || weight < 0)
    throw ConfigError(fmt::format("shared_weights: weight {} is out of range", weight),
                      "a weight is finite and not negative, such as the number of samples");
  std::ranges::fill(s.losses, VirtualLoss{});
  if (s.nodes) s.begin_reduction();
  s.losses[static_cast<std::size_t>(s.run().lo)].weight = weight;
  s.integers_digest = 0;
  if (weight > 0) s.keep_integers();
  s.collect(0);
  if (weight == 0) std::ranges::fill(s.slot(0), 0.0f);
  if (weight != 1)
    for (float& value : s.slot(0).first(s.parameters.total)) value *= static_cast<float>(weight);
}

StepOutcome SharedWeights::decide(bool measure) {
  State& s = *state_;
  const auto ranks = static_cast<std::size_t>(s.world.size());
  const auto rank = static_cast<std::size_t>(s.world.rank());
  const std::uint64_t next = s.last.step + 1;
  double magnitude = 0;
  for (std::size_t i = 0; i < s.contributed; ++i)
    magnitude += max_magnitude(s.slot(static_cast<int>(i)));
  s.faults.at(Point::computed, next);
  s.shared->seal(s.world.local_rank(), next);
  s.faults.at(Point::sealed, next);
  if (s.nodes) s.finish_reduction();
  if (s.nodes && !s.nodes->is_finite && std::isfinite(magnitude))
    magnitude = std::numeric_limits<double>::quiet_NaN();

  // Every number stands at one rank and is zero at the others: adding them up is exact.
  std::vector<double> numbers(2 * s.losses.size() + 5 * ranks);
  for (std::size_t v = 0; v < s.losses.size(); ++v) {
    numbers[2 * v] = s.losses[v].sum;
    numbers[2 * v + 1] = s.losses[v].weight;
  }
  const RankNumbers of_ranks{std::span<double>(numbers).last(5 * ranks)};
  of_ranks.options[rank] = digest_of(s.groups);
  of_ranks.integers[rank] = s.integers_digest;
  of_ranks.magnitudes[rank] = magnitude;
  of_ranks.moves[rank] = s.world.next_generation_is_due() ? 1 : 0;
  of_ranks.stops[rank] = s.world.stop_requested() ? 1 : 0;
  // Whoever comes here has its part of the reduced gradient: from here on every node can make the
  // step, whichever decides it.
  s.group().all_reduce(std::as_writable_bytes(std::span(numbers)), Dtype::float64, Reduction::sum,
                       {.tag = "losses"});
  for (std::size_t v = 0; v < s.losses.size(); ++v)
    s.losses[v] = {numbers[2 * v], numbers[2 * v + 1]};
  s.check_numbers(of_ranks);
  s.settle_integers(of_ranks.integers);
  s.decided = plan_step(s.spec, s.last,
                        {.groups = s.groups,
                         .runs = s.summands.runs,
                         .places = s.summands.places,
                         .losses = s.losses,
                         .slices = s.world.local_size()});

  double sum = 0;
  for (const double one : of_ranks.magnitudes) sum += one;
  const auto is_set = [](double one) { return one != 0; };
  // A node hears of the next generation before or after another: all of them take it up together.
  StepOutcome outcome{.step = next,
                      .weight = s.decided.total_weight,
                      .next_generation = std::ranges::all_of(of_ranks.moves, is_set),
                      .stop = std::ranges::any_of(of_ranks.stops, is_set)};
  for (const VirtualLoss& loss : s.losses) outcome.loss_sum += loss.sum;
  if (measure || s.options.clip_grad_norm > 0 || !sum_is_finite(sum)) {
    s.updater->measure(s.decided, s.contributions(), s.local_rank());
    s.local().barrier({.tag = "gradient norm"});
    const double squares = s.updater->squares();
    if (!std::isfinite(squares)) throw NonFiniteError(next, kSumNotFinite);
    clip(s.decided, squares, s.options.clip_grad_norm);
    outcome.gradient_norm = s.decided.gradient_norm;
  }
  return outcome;
}

void SharedWeights::update(std::span<const std::byte> note) {
  State& s = *state_;
  const std::uint64_t step = s.decided.step;
  if (s.is_leader()) {
    if (!note.empty()) copy_bytes(s.note(step), note);
    s.shared->decide(s.decided);
    s.faults.at(Point::decided, step);  // the others do not know yet
  }
  s.local().barrier({.tag = "decided"});
  s.faults.at(Point::decided, step);
  s.updater->run(s.decided, s.contributions(), s.local_rank(),
                 s.faults_within(Point::updating, step));
  s.local().barrier({.tag = "updated"});
  s.shared->commit(s.decided);
  s.last = s.decided;
  s.refresh_integers();
  s.restore_buffers();
  s.faults.at(Point::committed, step);
}

std::span<OptimizerOptions> SharedWeights::groups() const { return state_->groups; }
std::uint64_t SharedWeights::committed_step() const { return state_->last.step; }
int SharedWeights::virtual_ranks() const { return state_->tree.virtual_ranks; }
const WeightsOrigin& SharedWeights::origin() const { return state_->origin; }
std::span<std::byte> SharedWeights::log() const { return state_->log(); }
std::span<const std::byte> SharedWeights::note() const { return state_->note(state_->last.step); }
std::size_t SharedWeights::shared_bytes() const { return state_->memory.size(); }
VirtualRange SharedWeights::run() const { return state_->run(); }
void SharedWeights::restore_buffers() { state_->restore_buffers(); }
CommQueue::Statistics SharedWeights::communication() const {
  return state_->queue ? state_->queue->statistics() : CommQueue::Statistics{};
}

std::size_t SharedWeights::parameter_count() const {
  std::size_t count = 0;
  for (const ParameterLayout* layout : {&state_->parameters, &state_->frozen})
    for (const ParameterLayout::Entry& entry : layout->entries) count += entry.count;
  return count;
}

std::vector<NamedTensor> SharedWeights::state() const {
  const State& s = *state_;
  std::vector<NamedTensor> all = s.parts.trained;
  all.insert(all.end(), s.parts.frozen.begin(), s.parts.frozen.end());
  for (std::size_t i = 0; i < s.buffers.entries.size(); ++i)
    all.push_back({s.buffers.entries[i].name,
                   view_of(s.committed_buffers(s.view->bytes()), s.buffers, i, s.view)});
  for (std::size_t i = 0; i < s.committed_integers.size(); ++i)
    all.push_back({s.integers.entries[i].name, s.committed_integers[i]});
  return all;
}

bool SharedWeights::is_finite() const {
  return std::isfinite(max_magnitude(state_->shared->weights()));
}

std::vector<StateTensor> SharedWeights::state_tensors() const { return state_->state_tensors(); }

std::vector<std::uint64_t> SharedWeights::group_steps() const {
  std::vector<std::uint64_t> steps;
  for (const GroupStep& group : state_->last.groups.span()) steps.push_back(group.steps);
  return steps;
}

void SharedWeights::edit(const std::function<void()>& edit) {
  State& s = *state_;
  const bool several = s.world.local_sizes().size() > 1;
  const auto set_state = [&](KeptState state) {
    if (s.is_leader()) set_kept_state(*s.segment, s.kept, state);
  };
  s.group().barrier({.tag = "edit_weights"});
  set_state(KeptState::edited);
  // While values differ between nodes, none of them is whole that has the old ones.
  if (several) s.group().barrier({.tag = "edit_weights"});
  if (s.world.rank() == 0) {
    s.view->set_writable(true);
    try {
      const at::NoGradGuard no_grad;
      edit();
      s.copy_buffers_home(s.last.step);
    } catch (...) {
      s.view->set_writable(false);
      set_state(KeptState::whole);
      throw;
    }
    s.view->set_writable(false);
  }
  if (several && s.world.across_group() != nullptr)
    s.pass_values(*s.world.across_group(), 0, s.values());
  if (several) s.local().barrier({.tag = "weights edited"});
  set_state(KeptState::whole);
  s.group().barrier({.tag = "weights edited"});
  s.refresh_integers();
  s.restore_buffers();
}

}  // namespace lockstep
