#include "lockstep/parallel/shared_weights.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/clone.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "lockstep/base/hash.h"
#include "lockstep/bridge/direct_gradients.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/collective/kernels.h"
#include "lockstep/memory/read_only.h"
#include "lockstep/memory/segment.h"
#include "lockstep/parallel/same_module.h"
#include "lockstep/update/slice_update.h"

namespace lockstep {
namespace {

// A module's tensors by what becomes of them.
struct Parts {
  std::vector<NamedTensor> trained;
  std::vector<int> group_of;  // trained
  std::vector<NamedTensor> frozen;
  std::vector<NamedTensor> float_buffers;
  std::vector<NamedTensor> integer_buffers;
};

Parts parts_of(const torch::nn::Module& module, std::span<const ParameterGroup> groups) {
  Parts parts;
  for (const NamedTensor& one : named_parameters(module)) {
    std::vector<int> found;
    for (std::size_t group = 0; group < groups.size(); ++group)
      for (const at::Tensor& parameter : groups[group].parameters)
        if (parameter.unsafeGetTensorImpl() == one.tensor.unsafeGetTensorImpl())
          found.push_back(static_cast<int>(group));
    if (found.size() > 1)
      throw ConfigError(
          fmt::format("shared_weights: parameter '{}' is in {} groups", one.name, found.size()),
          "a parameter belongs to one group, once");
    if (!one.tensor.requires_grad()) {
      parts.frozen.push_back(one);
      continue;
    }
    if (found.empty())
      throw ConfigError(fmt::format("shared_weights: parameter '{}' is in no group", one.name),
                        "add it to one, or switch its requires_grad off");
    parts.trained.push_back(one);
    parts.group_of.push_back(found.front());
  }
  if (parts.trained.empty())
    throw ConfigError("shared_weights: no parameter of the module requires a gradient");
  for (const NamedTensor& one : named_buffers(module))
    (one.tensor.is_floating_point() ? parts.float_buffers : parts.integer_buffers).push_back(one);
  return parts;
}

// Neighbours of one group are one range, padding included: it is zero and stays so.
UpdateSpec spec_of(const Parts& parts, const ParameterLayout& parameters,
                   const ParameterLayout& buffers, std::span<const ParameterGroup> groups) {
  UpdateSpec spec{.elements = parameters.total + buffers.total, .groups = {}, .ranges = {}};
  for (const ParameterGroup& group : groups) spec.groups.push_back(group.options);
  for (std::size_t i = 0; i < parameters.entries.size(); ++i) {
    const std::uint64_t begin = parameters.entries[i].offset;
    const std::uint64_t end =
        i + 1 < parameters.entries.size() ? parameters.entries[i + 1].offset : parameters.total;
    if (!spec.ranges.empty() && spec.ranges.back().group == parts.group_of[i])
      spec.ranges.back().end = end;
    else
      spec.ranges.push_back({begin, end, parts.group_of[i]});
  }
  if (buffers.total != 0)
    spec.ranges.push_back({parameters.total, spec.elements, UpdateRange::kAverage});
  return spec;
}

TreeLayout tree_layout(int virtual_ranks, int ranks) {
  if (virtual_ranks < ranks)
    throw ConfigError(
        fmt::format("shared_weights: {} virtual ranks for {} ranks", virtual_ranks, ranks),
        "at least one a rank");
  return {partition_virtual_ranks(virtual_ranks, ranks), virtual_ranks};
}

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

void copy_bytes(std::span<std::byte> to, std::span<const std::byte> from) {
  LOCKSTEP_CHECK(to.size() == from.size());
  if (!from.empty()) std::memcpy(to.data(), from.data(), from.size());
}

// What every rank says of itself in a step, by rank.
struct RankNumbers {
  std::span<double> options;     // a digest of its optimizers' options
  std::span<double> integers;    // a digest of its buffers of other types; 0: it had no samples
  std::span<double> magnitudes;  // of its contributions
  explicit RankNumbers(std::span<double> all)
      : options(all.first(all.size() / 3)),
        integers(all.subspan(options.size(), options.size())),
        magnitudes(all.last(options.size())) {}
};

}  // namespace

NonFiniteError::NonFiniteError(std::uint64_t step, const std::string& what)
    : Error(fmt::format("step {}: {}", step, what)) {}

struct SharedWeights::State {
  World world;
  SharedWeightsOptions options;
  std::shared_ptr<Segment> segment;
  Parts parts;
  ParameterLayout parameters, buffers, frozen, integers;
  std::vector<at::Tensor> trained;  // as in parts
  std::vector<at::Tensor> float_buffers;
  std::vector<at::Tensor> committed_integers;
  UpdateSpec spec;
  std::vector<OptimizerOptions> groups;

  std::span<std::byte> memory;  // of the node: the shared state, then the frozen parameters
  std::optional<SharedState> shared;
  std::shared_ptr<ReadOnlyView> view;  // from the weights on
  std::optional<SliceUpdate> updater;
  StepRecord last;     // committed
  StepRecord decided;  // the step under way

  TreeLayout tree;
  AccumulatePlan plan;
  std::span<std::byte> slots;
  std::vector<std::span<const float>> contributions;  // by rank
  std::size_t contributed = 0;                        // slots that this rank hands in
  std::optional<DirectGradients> direct;
  int direct_slot = -1;
  double integers_digest = 0;  // 0: nothing was computed
  std::vector<VirtualLoss> losses;

  State(torch::nn::Module& module, const World& w, std::span<const ParameterGroup> given,
        const SharedWeightsOptions& o)
      : world(w), options(o), parts(parts_of(module, given)) {
    for (const ParameterGroup& group : given) groups.push_back(group.options);
    parameters = make_layout(parts.trained);
    buffers = make_layout(parts.float_buffers);
    frozen = make_layout(parts.frozen);
    integers.dtype = Dtype::uint8;
    for (const NamedTensor& one : parts.integer_buffers) {
      integers.add(one.name, {static_cast<std::int64_t>(one.tensor.nbytes())});
      committed_integers.push_back(one.tensor.clone());
    }
    trained = tensors_of(parts.trained);
    float_buffers = tensors_of(parts.float_buffers);
    spec = spec_of(parts, parameters, buffers, given);
    check(spec);
    const int virtual_ranks = o.virtual_ranks == 0 ? world.size() : o.virtual_ranks;
    tree = tree_layout(virtual_ranks, world.size());
    losses.resize(static_cast<std::size_t>(virtual_ranks));
  }

  Group& group() const { return world.group(); }
  VirtualRange run() const { return tree.runs[static_cast<std::size_t>(world.rank())]; }
  std::span<float> slot(int index) const {
    return {
        reinterpret_cast<float*>(slots.data()) + static_cast<std::size_t>(index) * spec.elements,
        spec.elements};
  }
  std::span<std::byte> frozen_bytes() const {
    return memory.subspan(shared->layout().total_bytes(), frozen.bytes());
  }
  // Of the view or of the memory itself, from the weights on.
  std::span<std::byte> committed_buffers(std::span<std::byte> weights) const {
    return weights.subspan(parameters.bytes(), buffers.bytes());
  }

  void place_weights(Group& ranks);
  void point_module();
  void place_contributions();
  void copy_buffers_home(std::uint64_t step);
  void refresh_integers();
  void restore_buffers();
  void keep_integers();
  void collect(int index);
  void accumulate(const Compute& compute);
  void check_numbers(const RankNumbers& ranks);
  std::vector<StateTensor> state_tensors() const;
};

// One rank makes the memory, with its own values; the others find it.
void SharedWeights::State::place_weights(Group& ranks) {
  segment = world.segment();
  if (!segment) segment = Segment::create({.ranks = 1});
  const SharedLayout layout = SharedLayout::of(spec, world.size(), integers.bytes());
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const std::size_t bytes = layout.total_bytes() + frozen.bytes();
  std::uint64_t place = 0;
  if (world.rank() == 0) {
    const auto room = segment->allocate(0, bytes + page, "the shared weights");
    const auto offset = static_cast<std::size_t>(segment->offset_of(room.data()));
    memory = room.subspan((offset + page - 1) / page * page - offset, bytes);
    shared = SharedState::create(memory, spec, layout, first_record(spec));
    const auto weights = std::as_writable_bytes(shared->weights());
    copy_into(weights.first(parameters.bytes()), parameters, trained);
    copy_into(frozen_bytes(), frozen, tensors_of(parts.frozen));
    copy_buffers_home(0);
    place = static_cast<std::uint64_t>(segment->offset_of(memory.data()));
  }
  ranks.broadcast(std::as_writable_bytes(std::span(&place, 1)), Dtype::int64, 0,
                  {.tag = "shared weights"});
  if (world.rank() != 0) {
    memory = segment->at(0, place, bytes);
    shared = SharedState::attach(memory, layout);
  }
  last = shared->record(0, spec);
  updater.emplace(spec, *shared);
}

void SharedWeights::State::point_module() {
  const std::size_t begin = shared->layout().weights_offset();
  const std::size_t behind = shared->layout().total_bytes();
  std::vector<NamedBytes> names;
  for (const auto& entry : parameters.entries)
    names.push_back({"parameter '" + entry.name + "'", entry.offset * sizeof(float)});
  for (const auto& entry : buffers.entries)
    names.push_back(
        {"buffer '" + entry.name + "'", (parameters.total + entry.offset) * sizeof(float)});
  if (shared->layout().states != 0)
    names.push_back({"the optimizer's state", shared->layout().state_offset(0) - begin});
  for (const auto& entry : frozen.entries)
    names.push_back(
        {"parameter '" + entry.name + "'", behind - begin + entry.offset * sizeof(float)});
  view = std::make_shared<ReadOnlyView>(segment, memory.subspan(begin), std::move(names),
                                        fmt::format("rank {}: shared weights", world.rank()),
                                        "write in lockstep::edit_weights");
  live_in(view->bytes().first(parameters.bytes()), parameters, trained, view);
  live_in(view->bytes().subspan(behind - begin, frozen.bytes()), frozen, tensors_of(parts.frozen),
          view);
}

void SharedWeights::State::place_contributions() {
  int most = 1;  // symmetric memory: as much as any rank needs
  for (const VirtualRange& one : tree.runs)
    most = std::max(most, plan_accumulation(one, tree.virtual_ranks).slots);
  plan = plan_accumulation(run(), tree.virtual_ranks);
  contributed = maximal_subtrees(run(), tree.virtual_ranks).size();
  const std::size_t count = static_cast<std::size_t>(most) * spec.elements;
  slots = group().allocate(count * sizeof(float), "gradients");
  const auto ranks = static_cast<std::size_t>(world.size());
  std::vector<std::int64_t> places(ranks);
  const std::int64_t mine = segment->offset_of(slots.data());
  group().all_gather(std::as_bytes(std::span(&mine, 1)), std::as_writable_bytes(std::span(places)),
                     Dtype::int64, {.tag = "gradients"});
  for (std::size_t rank = 0; rank < ranks; ++rank) {
    const std::byte* theirs = slots.data();
    if (rank != static_cast<std::size_t>(world.rank()))
      theirs =
          segment
              ->at(static_cast<int>(rank), static_cast<std::uint64_t>(places[rank]), slots.size())
              .data();
    contributions.push_back({reinterpret_cast<const float*>(theirs), count});
  }
  direct.emplace(trained);
}

// Rank 0: the module's buffers become the committed ones of `step`.
void SharedWeights::State::copy_buffers_home(std::uint64_t step) {
  const auto weights = std::as_writable_bytes(shared->weights());
  copy_into(committed_buffers(weights), buffers, float_buffers);
  const auto home = shared->buffers(step);
  for (std::size_t i = 0; i < integers.entries.size(); ++i)
    copy_bytes(home.subspan(integers.entries[i].offset, integers.entries[i].count),
               bytes_of(parts.integer_buffers[i].tensor));
}

void SharedWeights::State::refresh_integers() {
  const auto home = shared->buffers(last.step);
  for (std::size_t i = 0; i < integers.entries.size(); ++i)
    copy_bytes(bytes_of(committed_integers[i]),
               home.subspan(integers.entries[i].offset, integers.entries[i].count));
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
  const auto home = shared->buffers(last.step + 1);
  std::uint64_t digest = 0;
  for (std::size_t i = 0; i < integers.entries.size(); ++i) {
    const auto live = bytes_of(parts.integer_buffers[i].tensor);
    digest = digest_of(live, digest);
    if (world.rank() == 0)
      copy_bytes(home.subspan(integers.entries[i].offset, integers.entries[i].count), live);
  }
  integers_digest = static_cast<double>(digest >> 12 | 1);
}

// The gradients of a backward, and the buffers after it, into a slot.
void SharedWeights::State::collect(int index) {
  gather_gradients(trained, parameters, slot(index).first(parameters.total));
  copy_into(std::as_writable_bytes(slot(index).subspan(parameters.total)), buffers, float_buffers);
}

void SharedWeights::State::accumulate(const Compute& compute) {
  const BinaryKernel add = kernels().binary(Dtype::float32, Reduction::sum);
  std::ranges::fill(losses, VirtualLoss{});
  integers_digest = 0;
  for (const AccumulateStep& step : plan.steps) {
    if (direct_slot != step.slot)
      direct->set_places(std::as_writable_bytes(slot(step.slot)).first(parameters.bytes()),
                         parameters);
    direct_slot = step.slot;
    restore_buffers();
    const VirtualLoss loss = compute(step.virtual_rank);
    losses[static_cast<std::size_t>(step.virtual_rank)] = loss;
    if (loss.weight > 0) keep_integers();
    collect(step.slot);
    if (loss.weight == 0) std::ranges::fill(slot(step.slot), 0.0f);
    for (int top = step.slot; top > step.slot - step.merges; --top)
      add(slot(top - 1).data(), slot(top - 1).data(), slot(top).data(), spec.elements);
  }
}

// Throws the same on every rank.
void SharedWeights::State::check_numbers(const RankNumbers& ranks) {
  const auto [options_of, integers_of, magnitudes] = ranks;
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
    if (!std::isfinite(magnitudes[rank]))
      what = fmt::format("the gradient or a buffer of rank {} is not finite", rank);
  if (!what.empty()) throw NonFiniteError(last.step + 1, what);
}

std::vector<StateTensor> SharedWeights::State::state_tensors() const {
  std::vector<StateTensor> tensors;
  const auto add = [&](std::string name, const ParameterLayout::Entry& entry,
                       std::span<std::byte> from) {
    tensors.push_back({std::move(name), Dtype::float32, entry.shape,
                       from.subspan(entry.offset * sizeof(float), entry.count * sizeof(float))});
  };
  const auto weights = std::as_writable_bytes(shared->weights());
  for (std::size_t i = 0; i < parameters.entries.size(); ++i) {
    const auto& entry = parameters.entries[i];
    add("model/" + entry.name, entry, weights);
    const auto names = state_names(spec.groups[static_cast<std::size_t>(parts.group_of[i])]);
    for (std::size_t state = 0; state < names.size(); ++state)
      add(fmt::format("optimizer/{}/{}", entry.name, names[state]), entry,
          std::as_writable_bytes(shared->state(static_cast<int>(state))));
  }
  for (const auto& entry : frozen.entries) add("model/" + entry.name, entry, frozen_bytes());
  for (const auto& entry : buffers.entries)
    add("buffer/" + entry.name, entry, committed_buffers(weights));
  const auto home = shared->buffers(last.step);
  for (std::size_t i = 0; i < integers.entries.size(); ++i) {
    const at::Tensor& tensor = parts.integer_buffers[i].tensor;
    const std::optional<Dtype> dtype = dtype_from(tensor.scalar_type());
    // What no collective reduces is saved as bytes.
    tensors.push_back({"buffer/" + integers.entries[i].name, dtype.value_or(Dtype::uint8),
                       dtype ? tensor.sizes().vec() : integers.entries[i].shape,
                       home.subspan(integers.entries[i].offset, integers.entries[i].count)});
  }
  return tensors;
}

SharedWeights::SharedWeights(torch::nn::Module& module, const World& world,
                             std::vector<ParameterGroup> groups,
                             const SharedWeightsOptions& options)
    : state_(std::make_unique<State>(module, world, groups, options)) {
  State& s = *state_;
  if (world.size() > 1)
    check_same_module(world.group(), named_parameters(module), named_buffers(module));
  s.place_weights(world.group());
  s.point_module();
  s.place_contributions();
  s.refresh_integers();
  s.restore_buffers();
  if (s.run().size() == 1 && s.plan.steps.size() == 1) {
    s.direct->set_places(std::as_writable_bytes(s.slot(0)).first(s.parameters.bytes()),
                         s.parameters);
    s.direct_slot = 0;
  }
}

SharedWeights::SharedWeights(torch::nn::Module& module, const World& world,
                             const OptimizerOptions& optimizer, const SharedWeightsOptions& options)
    : SharedWeights(module, world,
                    std::vector{ParameterGroup{tensors_of(named_parameters(module)), optimizer}},
                    options) {}

// The module goes on as one of its own.
SharedWeights::~SharedWeights() {
  try {
    state_->view->make_private();
  } catch (const Error&) {  // it stays read-only
  }
}

void SharedWeights::compute(const Compute& compute) { state_->accumulate(compute); }

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
  if (rank == 0 && s.integers_digest == 0)  // no samples: they stay
    for (std::size_t i = 0; i < s.integers.entries.size(); ++i)
      copy_bytes(s.shared->buffers(next).subspan(s.integers.entries[i].offset,
                                                 s.integers.entries[i].count),
                 bytes_of(s.committed_integers[i]));
  double magnitude = 0;
  for (std::size_t i = 0; i < s.contributed; ++i)
    magnitude += max_magnitude(s.slot(static_cast<int>(i)));
  s.shared->seal(s.world.rank(), next);

  // Every number stands at one rank and is zero at the others: adding them up is exact.
  std::vector<double> numbers(2 * s.losses.size() + 3 * ranks);
  for (std::size_t v = 0; v < s.losses.size(); ++v) {
    numbers[2 * v] = s.losses[v].sum;
    numbers[2 * v + 1] = s.losses[v].weight;
  }
  const RankNumbers of_ranks{std::span<double>(numbers).last(3 * ranks)};
  of_ranks.options[rank] = digest_of(s.groups);
  of_ranks.integers[rank] = s.integers_digest;
  of_ranks.magnitudes[rank] = magnitude;
  s.group().all_reduce(std::as_writable_bytes(std::span(numbers)), Dtype::float64, Reduction::sum,
                       {.tag = "losses"});
  for (std::size_t v = 0; v < s.losses.size(); ++v)
    s.losses[v] = {numbers[2 * v], numbers[2 * v + 1]};
  s.check_numbers(of_ranks);
  s.decided = plan_step(
      s.spec, s.last,
      {.groups = s.groups, .runs = s.tree.runs, .losses = s.losses, .slices = s.world.size()});

  double sum = 0;
  for (const double one : of_ranks.magnitudes) sum += one;
  StepOutcome outcome{.step = next, .weight = s.decided.total_weight};
  for (const VirtualLoss& loss : s.losses) outcome.loss_sum += loss.sum;
  if (measure || s.options.clip_grad_norm > 0 || !sum_is_finite(sum)) {
    s.updater->measure(s.decided, {s.contributions, s.spec.elements}, rank);
    s.group().barrier({.tag = "gradient norm"});
    const double squares = s.updater->squares();
    if (!std::isfinite(squares))
      throw NonFiniteError(next, "the sum of all ranks' gradients and buffers is not finite");
    clip(s.decided, squares, s.options.clip_grad_norm);
    outcome.gradient_norm = s.decided.gradient_norm;
  }
  return outcome;
}

void SharedWeights::update() {
  State& s = *state_;
  if (s.world.rank() == 0) s.shared->decide(s.decided);
  s.group().barrier({.tag = "decided"});
  s.updater->run(s.decided, {s.contributions, s.spec.elements},
                 static_cast<std::size_t>(s.world.rank()));
  s.group().barrier({.tag = "updated"});
  s.shared->commit(s.decided);
  s.last = s.decided;
  s.refresh_integers();
  s.restore_buffers();
}

std::span<OptimizerOptions> SharedWeights::groups() const { return state_->groups; }
std::uint64_t SharedWeights::committed_step() const { return state_->last.step; }
std::size_t SharedWeights::shared_bytes() const { return state_->memory.size(); }
VirtualRange SharedWeights::run() const { return state_->run(); }
void SharedWeights::restore_buffers() { state_->restore_buffers(); }

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

void SharedWeights::restore(std::uint64_t step, std::span<const std::uint64_t> group_steps,
                            const std::function<void(std::span<const StateTensor>)>& fill) {
  State& s = *state_;
  LOCKSTEP_CHECK(s.last.step == 0 && group_steps.size() == s.groups.size(),
                 "a state is restored before the first step");
  s.group().barrier({.tag = "restore"});
  s.last.step = step;
  if (s.world.rank() == 0) {
    for (std::size_t i = 0; i < group_steps.size(); ++i)
      s.last.groups.items[i].steps = group_steps[i];
    s.shared = SharedState::create(s.memory, s.spec, s.shared->layout(), s.last);
    fill(s.state_tensors());
  }
  s.group().barrier({.tag = "restored"});
  s.last = s.shared->record(step, s.spec);
  s.refresh_integers();
  s.restore_buffers();
}

void SharedWeights::edit(const std::function<void()>& edit) {
  State& s = *state_;
  s.group().barrier({.tag = "edit_weights"});
  if (s.world.rank() == 0) {
    s.view->set_writable(true);
    try {
      const at::NoGradGuard no_grad;
      edit();
      s.copy_buffers_home(s.last.step);
    } catch (...) {
      s.view->set_writable(false);
      throw;
    }
    s.view->set_writable(false);
  }
  s.group().barrier({.tag = "weights edited"});
  s.refresh_integers();
  s.restore_buffers();
}

}  // namespace lockstep
