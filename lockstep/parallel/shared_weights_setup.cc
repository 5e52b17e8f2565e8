#include <ATen/ops/clone.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "lockstep/bridge/dtypes.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/parallel/shared_weights_state.h"
#include "lockstep/parallel/text_of_rank_0.h"
#include "lockstep/update/recovery.h"

namespace lockstep {
namespace {

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

}  // namespace

SharedWeights::State::State(torch::nn::Module& module, const World& w,
                            std::span<const ParameterGroup> given, const SharedWeightsOptions& o)
    : world(w), options(o), parts(parts_of(module, given)), faults(w) {
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
  kept = o.kept ? *o.kept : world.claim_kept();
  segment = world.segment();
}

SharedLayout SharedWeights::State::layout() const {
  return SharedLayout::of(spec, segment->seats(), integers.bytes() + options.note_bytes);
}

std::size_t SharedWeights::State::memory_bytes() const {
  return (layout().total_bytes() + frozen.bytes() + 63) / 64 * 64 + options.log_bytes;
}

// Weights that the job has are taken up, from another node if need be; else rank 0 makes them, with
// its own values.
void SharedWeights::State::take_up(const InitialState* initial) {
  using Action = NodesPlan::Action;
  const std::vector<NodeState> nodes_found = node_states();
  const NodesPlan plan = plan_nodes(nodes_found);
  const Action mine = plan.actions[static_cast<std::size_t>(world.node())];
  origin.found = !plan.any(Action::make);
  if (!origin.found) {
    if (initial == nullptr &&
        std::ranges::any_of(nodes_found, [](auto& one) { return one.edited != 0; }))
      throw Error(
          "the shared weights were being edited when rank 0 died, and there is no checkpoint");
    text_of_rank_0(world, [&]() -> std::string {
      make_weights(initial);
      set_kept_state(*segment, kept, KeptState::whole);
      return "";
    });
  }
  if (mine == Action::make) attach();
  if (origin.found) finish_old_step(plan);
  if (plan.any(Action::take_weights)) take_weights(plan);
}

void SharedWeights::State::attach() {
  const auto found = lockstep::kept(*segment, kept);
  if (!found || found->memory.size() < memory_bytes())
    throw Error(
        fmt::format("the shared weights have {} bytes, this module needs {}: every worker "
                    "needs the same module and optimizer",
                    found ? found->memory.size() : 0, memory_bytes()));
  memory = found->memory;
  shared = SharedState::attach(memory, layout());
  last = shared->record(shared->committed(), spec);
  updater.emplace(spec, *shared);
}

void SharedWeights::State::make_weights(const InitialState* initial) {
  const int virtual_ranks = options.virtual_ranks == 0 ? world.most_size() : options.virtual_ranks;
  last = first_record(spec, virtual_ranks);
  if (initial != nullptr) {
    last.step = initial->step;
    if (initial->group_steps.size() != groups.size())
      throw ConfigError(
          fmt::format("the state to begin with is of {} parameter groups, here are {}",
                      initial->group_steps.size(), groups.size()),
          "go on with the optimizer that it was saved with");
    for (std::size_t i = 0; i < groups.size(); ++i)
      last.groups.items[i].steps = initial->group_steps[i];
  }
  memory = keep(*segment, kept, memory_bytes(), "the shared weights");
  shared = SharedState::create(memory, spec, layout(), last);
  const auto weights = std::as_writable_bytes(shared->weights());
  copy_into(weights.first(parameters.bytes()), parameters, trained);
  copy_into(frozen_bytes(), frozen, tensors_of(parts.frozen));
  copy_buffers_home(last.step);
  if (initial != nullptr) initial->fill(state_tensors(), note(last.step), log());
}

// What the last generation had decided is made whole, by all of this one: on each node by its own.
void SharedWeights::State::finish_old_step(const NodesPlan& plan) {
  using Action = NodesPlan::Action;
  origin.finished_step = plan.any(Action::finish) || plan.any(Action::take_record);
  origin.from_peer = plan.any(Action::take_weights);
  if (plan.any(Action::take_record)) take_record(plan);
  if (plan.actions[static_cast<std::size_t>(world.node())] != Action::take_weights) {
    const RecoveryState found = recovery_state(*shared, spec);
    const RecoveryPlan tasks = plan_recovery(found, static_cast<std::size_t>(world.local_size()));
    origin.reason = tasks.reason;
    if (tasks.action == RecoveryPlan::Action::finish) {
      last = shared->record(found.decided, spec);
      std::vector<std::span<const float>> ranks;
      for (std::size_t rank = 0; rank < last.places.size; ++rank)
        ranks.push_back(
            contribution_at(last.places.items[rank],
                            maximal_subtrees(last.runs.items[rank], int(last.losses.size)).size()));
      recover(*updater, tasks, local_rank(), {ranks, spec.elements},
              faults_within(Point::recovering, last.step));
    }
    faults.at(Point::recovering, found.committed + 1);
  }
  if (!plan.reason.empty()) origin.reason += (origin.reason.empty() ? "" : "; ") + plan.reason;
  group().barrier({.tag = "recovery"});
  if (shared) shared->commit(last);
}

std::span<const float> SharedWeights::State::contribution_at(std::uint64_t place,
                                                             std::size_t slots_there) const {
  const std::size_t count = std::max<std::size_t>(1, slots_there) * spec.elements;
  const auto bytes = segment->at(place, count * sizeof(float));
  if (place % alignof(float) != 0)
    throw Error(fmt::format("a step's record is damaged: a contribution at {}", place));
  return {reinterpret_cast<const float*>(bytes.data()), count};
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
  const int virtual_ranks = static_cast<int>(last.losses.size);
  tree = tree_layout(virtual_ranks, world.size());
  losses.resize(static_cast<std::size_t>(virtual_ranks));
  int most = 1;  // as much as any rank needs in any generation
  // Below the least number, who is left finishes what others have ended.
  for (int size = std::min(world.least_size(), world.size());
       size <= std::min(world.most_size(), virtual_ranks); ++size)
    for (const VirtualRange& one : partition_virtual_ranks(virtual_ranks, size))
      most = std::max(most, plan_accumulation(one, virtual_ranks).slots);
  plan = plan_accumulation(run(), virtual_ranks);
  contributed = maximal_subtrees(run(), virtual_ranks).size();
  const std::size_t count = static_cast<std::size_t>(most) * spec.elements;
  // They outlive the group: whoever finishes the step in the next generation reads them.
  slots = world.lasting(slots_name(), count * sizeof(float));
  const auto mine = static_cast<std::uint64_t>(segment->offset_of(slots.data()));
  const auto first = tree.runs.begin() + (world.rank() - world.local_rank());
  summands.runs.assign(first, first + world.local_size());
  summands.places.resize(summands.runs.size());
  local().all_gather(std::as_bytes(std::span(&mine, 1)),
                     std::as_writable_bytes(std::span(summands.places)), Dtype::int64,
                     {.tag = "gradients"});
  for (const std::uint64_t place : summands.places)
    summands.values.push_back(contribution_at(place, static_cast<std::size_t>(most)));
  if (world.local_sizes().size() > 1) place_reduction();
  direct.emplace(trained);
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
  for (std::size_t i = 0; i < integers.entries.size(); ++i) {
    const at::Tensor& tensor = parts.integer_buffers[i].tensor;
    const std::optional<Dtype> dtype = dtype_from(tensor.scalar_type());
    // What no collective reduces is saved as bytes.
    tensors.push_back({"buffer/" + integers.entries[i].name, dtype.value_or(Dtype::uint8),
                       dtype ? tensor.sizes().vec() : integers.entries[i].shape,
                       integer_home(last.step, i)});
  }
  return tensors;
}

}  // namespace lockstep
