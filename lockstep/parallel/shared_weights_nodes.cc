#include <ATen/core/grad_mode.h>
// Shared weights on several nodes: a copy on each. What a node's ranks have contributed is added up
// there, slice by slice, and then between the nodes; a node that has no weights, or older ones,
// takes another's.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <future>
#include <numeric>
#include <utility>

#include "lockstep/base/hash.h"
#include "lockstep/bridge/dtypes.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/parallel/gradient_buckets.h"
#include "lockstep/parallel/shared_weights_state.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kPieceElements = 1 << 20;           // that are added up, then exchanged
constexpr std::size_t kPieceBytes = std::size_t{16} << 20;  // of weights on their way to a peer
constexpr std::uint64_t kNoStep = ~std::uint64_t{0};
constexpr CallOptions kWeights{.tag = "weights from a peer"};

// Part i of [0, size), at whole cache lines where `unit` is a line's.
std::uint64_t bound(std::uint64_t size, int i, int parts, std::uint64_t unit) {
  if (i == parts) return size;
  return size / static_cast<std::uint64_t>(parts) * static_cast<std::uint64_t>(i) / unit * unit;
}

std::size_t first_rank(const World& world, int node) {
  const auto& sizes = world.local_sizes();
  return std::accumulate(sizes.begin(), sizes.begin() + node, std::size_t{0});
}

int carriers_of(const World& world) { return *std::ranges::min_element(world.local_sizes()); }

// One plan for the sum of what these make.
CombinePlan sum_of(const std::vector<CombinePlan>& plans) {
  CombinePlan sum;
  for (std::size_t i = 0; i < plans.size(); ++i) {
    sum.steps.insert(sum.steps.end(), plans[i].steps.begin(), plans[i].steps.end());
    if (i > 0) sum.steps.push_back({.kind = CombineStep::Kind::add});
    sum.stack_depth = std::max(sum.stack_depth, plans[i].stack_depth + (i > 0 ? 1 : 0));
  }
  return sum;
}

}  // namespace

bool SharedWeights::are_kept(const World& world, int kept) {
  const auto found = lockstep::kept(*world.segment(), kept);
  std::int32_t whole = found && found->state == KeptState::whole ? 1 : 0;
  if (world.size() > 1)
    world.group().all_reduce(std::as_writable_bytes(std::span(&whole, 1)), Dtype::int32,
                             Reduction::max, {.tag = "whether there are weights"});
  return whole != 0;
}

int SharedWeights::State::reduced_number() const { return kMaxKept - 1 - kept; }

// What every node has, before anybody changes it.
std::vector<NodeState> SharedWeights::State::node_states() {
  NodeState mine;
  if (const auto found = lockstep::kept(*segment, kept)) {
    mine.edited = found->state == KeptState::edited ? 1 : 0;
    if (found->state == KeptState::whole) {
      attach();
      mine.whole = 1;
      mine.committed = shared->committed();
      mine.decided = shared->decided();
    }
  }
  if (const auto found = lockstep::kept(*segment, reduced_number()))
    if (found->state == KeptState::whole)
      mine.reduced = ReducedGradient(found->memory, spec.elements).step();
  std::vector<NodeState> of_ranks(static_cast<std::size_t>(world.size())), states;
  group().all_gather(std::as_bytes(std::span(&mine, 1)),
                     std::as_writable_bytes(std::span(of_ranks)), Dtype::int64,
                     {.tag = "what every node has"});
  for (int node = 0; node < static_cast<int>(world.local_sizes().size()); ++node)
    states.push_back(of_ranks[first_rank(world, node)]);
  return states;
}

// Nodes that have not heard of a decision get its record, and the buffers that go with it. Where
// the slices are cut and the gradient lies is each node's own.
void SharedWeights::State::take_record(const NodesPlan& plan) {
  using Action = NodesPlan::Action;
  const int source = static_cast<int>(first_rank(world, plan.source));
  StepRecord record;
  std::vector<std::byte> area(integers.bytes() + options.note_bytes);
  if (world.rank() == source) {
    record = shared->record(shared->decided(), spec);
    copy_bytes(area, shared->buffers(record.step));
  }
  group().broadcast(std::as_writable_bytes(std::span(&record, 1)), Dtype::uint8, source,
                    {.tag = "a step's record"});
  group().broadcast(area, Dtype::uint8, source, {.tag = "a step's record"});
  if (plan.actions[static_cast<std::size_t>(world.node())] == Action::take_record && is_leader()) {
    const auto reduced = lockstep::kept(*segment, reduced_number());
    record.runs.assign(std::vector{VirtualRange{0, static_cast<int>(record.losses.size)}});
    record.places.assign(std::vector{static_cast<std::uint64_t>(
        segment->offset_of(ReducedGradient(reduced->memory, spec.elements).values().data()))});
    record.tiles.assign(partition_tiles(spec.elements, world.local_size()));
    if (const std::string fault = fault_of(record, spec); !fault.empty())
      throw CommError("the step's record from another node is damaged: " + fault);
    copy_bytes(shared->buffers(record.step), area);
    shared->decide(record);
  }
  local().barrier({.tag = "a step's record"});
}

// All that a step has made of the weights, and the log.
std::vector<std::span<std::byte>> SharedWeights::State::values() const {
  std::vector<std::span<std::byte>> all{std::as_writable_bytes(shared->weights())};
  for (std::uint64_t i = 0; i < shared->layout().states; ++i)
    all.push_back(std::as_writable_bytes(shared->state(static_cast<int>(i))));
  all.push_back(shared->buffers(last.step));
  all.push_back(frozen_bytes());
  all.push_back(log().first(options.log_bytes));
  return all;
}

// This carrier's part of the source's bytes, proved by its digests: of a piece while the next one
// travels.
void SharedWeights::State::pass_values(Group& carriers, int source,
                                       std::span<const std::span<std::byte>> all) {
  const int parts = carriers_of(world);
  std::string found;
  std::future<std::string> digest;  // of the last piece
  for (const std::span<std::byte> whole : all) {
    const std::size_t end = bound(whole.size(), world.local_rank() + 1, parts, 64);
    for (std::size_t at = bound(whole.size(), world.local_rank(), parts, 64); at < end;
         at += kPieceBytes) {
      const auto piece = whole.subspan(at, std::min(kPieceBytes, end - at));
      carriers.broadcast(piece, Dtype::uint8, source, kWeights);
      if (digest.valid()) found += digest.get();
      digest = std::async(std::launch::async, [piece] { return sha256_hex(piece); });
      world.made_progress();
    }
  }
  if (digest.valid()) found += digest.get();
  std::string expected = found;
  carriers.broadcast(std::as_writable_bytes(std::span(expected)), Dtype::uint8, source, kWeights);
  if (found != expected)
    throw CommError(fmt::format(
        "rank {}: the weights from another node did not arrive as they were sent", world.rank()));
}

// Who dies meanwhile leaves weights that are not finished, which nobody takes for whole.
void SharedWeights::State::take_weights(const NodesPlan& plan) {
  const bool takes =
      plan.actions[static_cast<std::size_t>(world.node())] == NodesPlan::Action::take_weights;
  const bool gives = world.node() == plan.source;
  std::unique_ptr<Group> carriers;
  if (Group* const across = world.across_group())
    carriers = across->split(takes || gives ? 0 : -1, gives ? 0 : 1 + world.node(), kWeights);
  if (is_leader() && carriers) {
    StepRecord record = last;
    carriers->broadcast(std::as_writable_bytes(std::span(&record, 1)), Dtype::uint8, 0, kWeights);
    if (takes) {
      record.tiles.assign(partition_tiles(spec.elements, 1));
      if (const std::string fault = fault_of(record, spec); !fault.empty())
        throw CommError("the weights' record from another node is damaged: " + fault);
      set_kept_state(*segment, kept, KeptState::unfinished);
      SharedState::create(keep(*segment, kept, memory_bytes(), "the shared weights"), spec,
                          layout(), record);
    }
  }
  if (takes) {
    local().barrier(kWeights);
    attach();
  }
  if (carriers) pass_values(*carriers, 0, values());
  if (takes) {
    local().barrier(kWeights);
    if (is_leader()) set_kept_state(*segment, kept, KeptState::whole);
    local().barrier(kWeights);
  }
}

// The node's gradient, and what this rank does for it.
void SharedWeights::State::place_reduction() {
  if (is_leader()) {
    const std::size_t bytes = ReducedGradient::bytes(spec.elements);
    if (const auto found = lockstep::kept(*segment, reduced_number());
        !found || found->state != KeptState::whole || found->memory.size() != bytes)
      keep(*segment, reduced_number(), bytes, "the nodes' gradient");
    set_kept_state(*segment, reduced_number(), KeptState::whole);
  }
  local().barrier({.tag = "the nodes' gradient"});
  const ReducedGradient reduced(lockstep::kept(*segment, reduced_number()).value().memory,
                                spec.elements);
  TreeLayout of_nodes{.runs = {}, .virtual_ranks = tree.virtual_ranks};
  std::size_t rank = 0;
  for (const int size : world.local_sizes()) {
    const std::size_t end = rank + static_cast<std::size_t>(size);
    of_nodes.runs.push_back({tree.runs[rank].lo, tree.runs[end - 1].hi});
    rank = end;
  }
  nodes.emplace(NodesReduction{.tree = std::move(of_nodes),
                               .plans = plan_partial_combination(summands.runs, tree.virtual_ranks),
                               .local = std::move(summands),
                               .reduced = reduced,
                               .combined = {}});
  if (options.wire_format != WireFormat::fp32) {  // of each node its sum travels
    nodes->plans = {sum_of(nodes->plans)};
    if (Group* const across = world.across_group())
      nodes->wire = make_compressed_group({std::shared_ptr<void>(), across}, options.wire_format);
  }
  if (world.across_group() != nullptr)
    nodes->combined.resize(nodes->plans.size() * kPieceElements * sizeof(float));
  place_buckets();
  const std::span<float> values = reduced.values();
  summands = {.runs = {{0, tree.virtual_ranks}},
              .places = {static_cast<std::uint64_t>(segment->offset_of(values.data()))},
              .values = {values}};
}

void SharedWeights::State::place_buckets() {
  std::vector<BucketItem> items;
  for (const auto& entry : parameters.entries)
    items.push_back({.bytes = entry.count * sizeof(float)});
  nodes->bucket_of.resize(items.size());
  std::uint64_t end = parameters.total;
  for (const std::vector<std::size_t>& bucket :
       plan_buckets(items, kPieceElements * sizeof(float))) {
    const std::size_t first = std::ranges::min(bucket);
    for (const std::size_t parameter : bucket) nodes->bucket_of[parameter] = nodes->buckets.size();
    nodes->buckets.push_back({parameters.entries[first].offset, end, bucket.size()});
    end = parameters.entries[first].offset;
  }
  if (buffers.total != 0)
    nodes->buckets.push_back({parameters.total, spec.elements, 1});  // they are there at the end
  hooks.emplace(parts.trained,
                BackwardHooks::Calls{.gradient = [this](std::size_t i) { stream(i); }});
  queue.emplace(local(), &segment->recorder(world.seat()));
}

void SharedWeights::State::begin_reduction() {
  if (nodes->sent != 0) queue->wait();  // of a step that was given up
  nodes->sent = 0;
  nodes->streams = false;
  nodes->last_step = nullptr;
  nodes->is_finite = true;
  // Else they are of a step that was given up.
  if (std::exchange(nodes->errors_of, kNoStep) != last.step && nodes->wire)
    nodes->wire->errors().clear();
  for (NodesReduction::Bucket& bucket : nodes->buckets) bucket.missing = bucket.parameters;
}

// In one order on every rank, as far as everything is there.
void SharedWeights::State::send_ready() {
  if (options.wire_format != WireFormat::fp32 && nodes->sent == 0 &&
      nodes->buckets[0].missing == 0) {
    double weight = 0;  // so far, `losses` are this rank's alone
    for (const VirtualLoss& loss : losses) weight += loss.weight;
    queue->submit([this, weight](Group&) { rescale_errors(weight); });
  }
  while (nodes->sent < nodes->buckets.size() && nodes->buckets[nodes->sent].missing == 0)
    queue->submit(
        [this, &bucket = nodes->buckets[nodes->sent++]](Group&) { reduce_across(bucket); });
}

// On the queue's thread. An update divides by the step's weight.
void SharedWeights::State::rescale_errors(double weight) {
  for (Group* group : {&local(), world.across_group()})
    if (group != nullptr)
      group->all_reduce(std::as_writable_bytes(std::span(&weight, 1)), Dtype::float64,
                        Reduction::sum, {.tag = "weight"});
  if (!nodes->wire || weight == 0) return;
  const double before = std::exchange(nodes->weight, weight);
  if (before == weight || before == 0) return;
  for (auto& [tag, errors] : nodes->wire->errors())
    for (float& error : errors) error = static_cast<float>(error * (weight / before));
}

void SharedWeights::State::finish_reduction() {
  for (NodesReduction::Bucket& bucket : nodes->buckets) bucket.missing = 0;
  send_ready();
  queue->wait();
  nodes->sent = 0;
  nodes->last_step = nullptr;
  nodes->errors_of = last.step + 1;
  if (world.across_group() != nullptr)
    nodes->reduced.complete(local_rank(), static_cast<std::size_t>(carriers_of(world)),
                            last.step + 1);
}

// In backward: a gradient of this step is there.
void SharedWeights::State::stream(std::size_t parameter) {
  if (!nodes->streams) return;
  if (nodes->arrived[parameter])
    throw Error(
        fmt::format("shared_weights: parameter '{}' has got a gradient after the backward() "
                    "that was said to be the last",
                    parts.trained[parameter].name));
  nodes->arrived[parameter] = true;
  const AccumulateStep& step = *nodes->last_step;
  const at::NoGradGuard no_grad;
  copy_into(std::as_writable_bytes(slot(step.slot)).first(parameters.bytes()), parameters,
            parameter, trained[parameter].grad());
  const auto& entries = parameters.entries;
  merge(step, entries[parameter].offset,
        parameter + 1 < entries.size() ? entries[parameter + 1].offset : parameters.total);
  --nodes->buckets[nodes->bucket_of[parameter]].missing;
  send_ready();
}

// After it: what got no gradient, and the buffers.
void SharedWeights::State::stream_rest() {
  for (std::size_t i = 0; i < trained.size(); ++i)
    if (!nodes->arrived[i]) stream(i);
  for (const at::Tensor& parameter : trained) parameter.mutable_grad() = at::Tensor();
  nodes->streams = false;
  if (buffers.total == 0) return;
  const AccumulateStep& step = *nodes->last_step;
  copy_into(std::as_writable_bytes(slot(step.slot).subspan(parameters.total)), buffers,
            float_buffers);
  merge(step, parameters.total, spec.elements);
  nodes->buckets.back().missing = 0;
  send_ready();
}

// On the queue's thread. All of the node's ranks have contributed to this bucket: this carrier's
// part of it becomes that of all nodes.
void SharedWeights::State::reduce_across(const NodesReduction::Bucket& bucket) {
  if (world.local_size() > 1) local().barrier({.tag = "gradients"});
  Group* const across = world.across_group();
  if (across == nullptr) return;
  const int carriers = carriers_of(world);
  const std::uint64_t size = bucket.end - bucket.begin;
  const std::uint64_t end = bucket.begin + bound(size, world.local_rank() + 1, carriers, 16);
  std::vector<const std::byte*> from(nodes->local.values.size());
  for (std::uint64_t begin = bucket.begin + bound(size, world.local_rank(), carriers, 16);
       begin < end; begin += kPieceElements) {
    const std::uint64_t count = std::min(kPieceElements, end - begin);
    const std::span<std::byte> result =
        std::as_writable_bytes(nodes->reduced.values().subspan(begin, count));
    // What the node has in one is added up where the sum goes.
    const std::span<std::byte> combined =
        nodes->plans.size() == 1
            ? result
            : std::span(nodes->combined).first(nodes->plans.size() * result.size());
    for (std::size_t i = 0; i < from.size(); ++i)
      from[i] = std::as_bytes(nodes->local.values[i].subspan(begin)).data();
    for (std::size_t i = 0; i < nodes->plans.size(); ++i)
      nodes->reducer.run({.plan = nodes->plans[i],
                          .dtype = Dtype::float32,
                          .reduction = Reduction::sum,
                          .round_once = false,
                          .slot_bytes = spec.elements * sizeof(float)},
                         from, std::array{combined.subspan(i * result.size()).data()}, 0, count);
    if (!nodes->wire) {
      across->tree_all_reduce(combined, result, Dtype::float32, nodes->tree, {.tag = "gradients"});
    } else {  // buffers are no gradients: what they lose is not made up for by the next ones
      Group& carriers = begin < parameters.total ? *nodes->wire : *across;
      carriers.all_reduce(result, Dtype::float32, Reduction::sum,
                          {.tag = fmt::format("gradients from {}", begin)});
      // A sum that is finite may come to be no number in it.
      nodes->is_finite &=
          std::isfinite(max_magnitude(nodes->reduced.values().subspan(begin, count)));
    }
    world.made_progress();
  }
}

// Buffers that are no numbers to average are rank 0's on every node. A node whose first rank had
// samples has the same; `digests` by rank, 0: it had none.
void SharedWeights::State::settle_integers(std::span<const double> digests) {
  if (!is_leader() || integers.entries.empty()) return;
  const std::uint64_t next = last.step + 1;
  if (digests[0] == 0) {  // no samples: they stay
    for (std::size_t i = 0; i < integers.entries.size(); ++i)
      copy_bytes(integer_home(next, i), bytes_of(committed_integers[i]));
    return;
  }
  bool all = true;
  for (int node = 0; node < static_cast<int>(world.local_sizes().size()); ++node)
    all = all && digests[first_rank(world, node)] != 0;
  if (!all)
    world.across_group()->broadcast(shared->buffers(next).first(integers.bytes()), Dtype::uint8, 0,
                                    {.tag = "buffers"});
}

}  // namespace lockstep
