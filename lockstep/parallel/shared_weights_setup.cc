#include <ATen/ops/clone.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "lockstep/bridge/dtypes.h"
#include "lockstep/parallel/shared_weights_state.h"

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

// One rank makes the memory, with its own values; the others find it.
void SharedWeights::State::place_weights(Group& ranks) {
  segment = world.segment();
  if (!segment) segment = Segment::create({.seats = 1});
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
