#include "lockstep/parallel/data_parallel.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/from_blob.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <exception>
#include <string>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/bridge/backward_hooks.h"
#include "lockstep/bridge/direct_gradients.h"
#include "lockstep/bridge/flat_parameters.h"
#include "lockstep/collective/comm_queue.h"
#include "lockstep/parallel/gradient_buckets.h"
#include "lockstep/parallel/pass_record.h"
#include "lockstep/parallel/same_module.h"
#include "lockstep/parallel/wire_group.h"

namespace lockstep {
namespace {

// A module's buffers, of any types, as one message.
class BufferBroadcast {
 public:
  BufferBroadcast(Group& group, std::span<const NamedTensor> buffers) {
    ParameterLayout layout{.dtype = Dtype::uint8};
    for (const NamedTensor& one : buffers)
      layout.add(one.name, {static_cast<std::int64_t>(one.tensor.nbytes())});
    if (layout.total == 0) return;
    memory_ = group.allocate(layout.bytes(), "buffers");
    for (std::size_t i = 0; i < buffers.size(); ++i) {
      buffers_.push_back(buffers[i].tensor);
      staged_.push_back(at::from_blob(memory_.data() + layout.entries[i].offset,
                                      buffers[i].tensor.sizes(), buffers[i].tensor.options()));
    }
  }
  void run(Group& group, int root) {
    if (memory_.empty()) return;
    // .data(): a graph that is kept for a second backward must not see its buffers as changed.
    for (std::size_t i = 0; group.rank() == root && i < buffers_.size(); ++i)
      staged_[i].copy_(buffers_[i].data());
    group.broadcast(memory_, Dtype::uint8, root, {.tag = "buffers"});
    for (std::size_t i = 0; group.rank() != root && i < buffers_.size(); ++i)
      buffers_[i].data().copy_(staged_[i]);
  }

 private:
  std::span<std::byte> memory_;
  std::vector<at::Tensor> buffers_;
  std::vector<at::Tensor> staged_;
};

// The first rank that still has batches; the world's size where none has.
int first_active(std::span<const PassRecord> records) {
  const auto first = std::find_if(records.begin(), records.end(),
                                  [](const PassRecord& one) { return one.active; });
  return static_cast<int>(first - records.begin());
}

}  // namespace

// --- A backward pass ---
//
// Every rank makes the same calls on the group in every pass, whatever its own backward did and in
// whatever order its gradients came:
//   records, bucket 0, bucket 1, …, records again if there are several buckets, last bucket,
//   buffers
// The records before bucket 0 say what each rank's gradients count for. Those before the last
// bucket say what each rank used: then all its gradients have come, or its backward is over.
//
// With a queue its thread makes the calls from the first records to the last bucket, and has what
// they need to itself: `records` and what follows from them, and the buckets that it was given.
// The caller's thread has all the rest, and that too after settle().

struct Replica::State {
  World world;
  DataParallelOptions options;
  double weight = 1;
  int no_sync = 0;                  // guards that live
  std::optional<JoinOptions> join;  // while a guard lives
  int authority = -1;               // in a join: whose parameters all get in the end, if any

  std::vector<NamedTensor> parameters, buffers;
  std::vector<bool> trained;                                   // by parameter
  std::vector<std::pair<std::size_t, std::size_t>> bucket_of;  // by parameter: bucket, place in it
  std::vector<GradientBucket> buckets;
  std::unique_ptr<CompressedGroup> averages;  // the world's group, in the wire format
  std::optional<BufferBroadcast> broadcast;

  PassRecord mine;                  // `used` since the last average
  bool announced = false;           // the pass's first records are under way
  std::vector<PassRecord> records;  // the latest of all ranks
  bool equal_weights = true;
  double total_weight = 0;
  std::vector<bool> arrived;      // by parameter: lies in its bucket
  std::vector<at::Tensor> prior;  // by parameter: what .grad was, if this pass didn't touch it
  std::size_t next = 0;           // bucket to reduce
  std::optional<DirectGradients> direct;
  std::optional<BackwardHooks> hooks;
  std::unique_ptr<CommQueue> queue;  // last: ends before what its calls use

  State(const World& w, const DataParallelOptions& o)
      : world(w), options(o), averages(make_wire_group(w, o.wire_format)) {}

  GradientPlace& place(std::size_t parameter) {
    const auto [bucket, index] = bucket_of[parameter];
    return buckets[bucket].places[index];
  }

  // Calls on the group; with a queue they are made until settle().
  void run(CommQueue::Call call) {
    if (queue) return queue->submit(std::move(call));
    forget_if_it_fails([&] { call(world.group()); });
  }
  void settle() {
    if (queue) forget_if_it_fails([&] { queue->wait(); });
  }
  // A pass that ranks found wrong is over with.
  void forget_if_it_fails(const std::function<void()>& attempt) {
    try {
      attempt();
    } catch (...) {
      mine.problem = GradientProblem::none;
      mine.used.assign(parameters.size(), false);
      throw;
    }
  }

  void begin() {
    try {
      settle();  // a pass that was interrupted: other ranks made the same calls
    } catch (const CommError&) {
      throw;
    } catch (const std::exception&) {  // was wrong with that one
    }
    arrived.assign(parameters.size(), false);
    prior.assign(parameters.size(), {});
    for (GradientBucket& bucket : buckets) bucket.missing = bucket.places.size();
    next = 0;
    announced = false;
  }

  void gradient(std::size_t parameter) {
    mine.used[parameter] = true;
    if (!trained[parameter])
      note(GradientProblem::frozen, parameter);
    else if (no_sync == 0)
      collect(parameter, /*in_hook=*/true);
  }

  void end() {
    if (no_sync > 0) return;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (!trained[i] || arrived[i]) continue;
      const bool keep = !mine.used[i] && parameters[i].tensor.grad().defined();
      if (keep) prior[i] = parameters[i].tensor.grad().detach().clone();
      collect(i, /*in_hook=*/false);
    }
    finish();
  }

  void note(GradientProblem problem, std::size_t parameter) {
    mine.problem = problem;
    mine.parameter = static_cast<std::uint32_t>(parameter);
  }

  void collect(std::size_t parameter, bool in_hook) {
    if (const at::Tensor& gradient = parameters[parameter].tensor.grad();
        gradient.defined() && gradient.requires_grad()) {
      note(GradientProblem::has_graph, parameter);
      place(parameter).clear();
    } else {
      place(parameter).collect(in_hook);
    }
    arrive(parameter);
  }

  void arrive(std::size_t parameter) {
    arrived[parameter] = true;
    --buckets[bucket_of[parameter].first].missing;
    while (next < buckets.size() && buckets[next].missing == 0) reduce(next++);
  }

  void reduce(std::size_t index) {
    if (!announced) announce();
    if (index + 1 == buckets.size())
      run([this, index, mine = mine](Group& group) {
        if (index > 0) meet(group, mine);
        if (!options.find_unused_parameters) check_all_used(records, parameters, trained);
      });
    GradientBucket& bucket = buckets[index];
    std::vector<at::Tensor> shown;
    // Show the memory while the call lasts: a backward after an interrupted one writes elsewhere.
    for (std::size_t i = 0; queue && i < bucket.places.size(); ++i)
      shown.push_back(bucket.places[i].view().detach());
    // What a wire format loses is sent in a later step, whose weights may be others: it is of parts
    // of the average, and of nothing that the weights scale.
    const bool parts = options.wire_format != WireFormat::fp32;
    run([this, &bucket, parts, weight = mine.weight, shown = std::move(shown)](Group& group) {
      const at::NoGradGuard no_grad;
      const double factor = parts ? weight * group.size() / total_weight : weight;
      if (!equal_weights && weight == 0)
        bucket.flat.zero_();  // not times 0, which keeps what is not finite
      else if (!equal_weights && factor != 1)
        bucket.flat.mul_(factor);
      averages->all_reduce(bucket.memory, bucket.dtype,
                           equal_weights || parts ? Reduction::mean : Reduction::sum,
                           {.tag = bucket.label});
      if (!equal_weights && !parts) bucket.flat.div_(total_weight);
    });
  }

  // The pass's first records: who takes part, with what weight.
  void announce() {
    announced = true;
    mine.weight = mine.active || join->divide_by_initial_world_size ? weight : 0;
    run([this, mine = mine, all_or_none = join && join->throw_on_early_termination](Group& group) {
      meet(group, mine);
      const auto active =
          std::count_if(records.begin(), records.end(), [](const auto& one) { return one.active; });
      if (active == 0) return;
      if (all_or_none && active < group.size())
        throw Error(
            "data_parallel: a rank ran out of batches before the others (join with "
            "throw_on_early_termination)");
      total_weight = 0;
      equal_weights = true;
      for (const PassRecord& one : records) {
        total_weight += one.weight;
        equal_weights = equal_weights && one.weight == records.front().weight;
      }
      if (total_weight == 0)
        throw ConfigError("data_parallel: the weight is 0 on every rank: no average exists",
                          "leave out a step that no rank has samples for");
    });
  }

  void meet(Group& group, const PassRecord& own) {
    records = exchange(group, own);
    check_problems(records, parameters);
  }

  void finish() {
    settle();
    const at::NoGradGuard no_grad;
    std::vector<at::Tensor> places;
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      if (!trained[i]) continue;
      if (std::any_of(records.begin(), records.end(), [i](const auto& one) { return one.used[i]; }))
        place(i).hand_out();
      else if (prior[i].defined())
        parameters[i].tensor.mutable_grad().copy_(prior[i]);
      places.push_back(place(i).view());
    }
    direct->set_places(places);
    prior.clear();
    mine.used.assign(parameters.size(), false);
    const int first = first_active(records);
    if (join)
      authority = std::all_of(records.begin(), records.end(), [](auto& one) { return one.active; })
                      ? -1
                      : first;
    if (broadcast) broadcast->run(world.group(), first);
  }

  // Zeros for the others' passes until nobody has any more.
  void shadow() {
    for (std::size_t i = 0; i < parameters.size(); ++i)
      if (const at::Tensor& gradient = parameters[i].tensor.grad();
          mine.used[i] && gradient.defined() && gradient.any().item<bool>())
        note(GradientProblem::left_over, i);
    mine.used.assign(parameters.size(), false);
    mine.active = false;
    while (true) {
      begin();
      announce();
      settle();
      if (first_active(records) == world.size()) break;
      for (std::size_t i = 0; i < parameters.size(); ++i) {
        if (!trained[i]) continue;
        place(i).clear();
        arrive(i);
      }
      finish();
      if (join->after_shadow_backward) join->after_shadow_backward();
    }
    if (authority < 0) return;
    broadcast_values(world.group(), parameters, authority);
    broadcast_values(world.group(), buffers, authority);
  }
};

Replica::Replica(torch::nn::Module& module, const World& world, const DataParallelOptions& options)
    : state_(std::make_unique<State>(world, options)) {
  if (options.bucket_cap_mb && !(*options.bucket_cap_mb > 0))
    throw ConfigError(
        fmt::format("data_parallel: bucket_cap_mb {} is out of range", *options.bucket_cap_mb),
        "a size in MiB such as 25, or unset for one bucket");
  if (world.size() == 1) return;  // its gradients are the average
  State& state = *state_;
  state.parameters = named_parameters(module);
  state.buffers = named_buffers(module);
  Group& group = world.group();
  check_same_module(group, state.parameters, state.buffers);
  broadcast_values(group, state.parameters);
  broadcast_values(group, state.buffers);

  std::vector<NamedTensor> trained;
  std::vector<std::size_t> index;  // of each among all parameters
  std::size_t trained_bytes = 0;
  for (std::size_t i = 0; i < state.parameters.size(); ++i) {
    state.trained.push_back(state.parameters[i].tensor.requires_grad());
    if (!state.trained[i]) continue;
    trained.push_back(state.parameters[i]);
    trained_bytes += trained.back().tensor.nbytes();
    index.push_back(i);
  }
  state.hooks.emplace(state.parameters,
                      BackwardHooks::Calls{[&state] { state.begin(); },
                                           [&state](std::size_t i) { state.gradient(i); },
                                           [&state] { state.end(); }});
  const bool overlap = options.overlap.value_or(world.local_sizes().size() > 1);
  std::optional<std::size_t> cap_bytes;
  if (overlap) cap_bytes = overlapped_bucket_bytes(trained_bytes);
  if (options.bucket_cap_mb)
    cap_bytes = static_cast<std::size_t>(std::ceil(*options.bucket_cap_mb * (1 << 20)));
  // .grad may outlive the caller's world.
  state.buckets = make_buckets(group, std::make_shared<World>(world), trained, cap_bytes);
  state.bucket_of.resize(state.parameters.size());
  std::vector<at::Tensor> places(trained.size());
  for (std::size_t b = 0; b < state.buckets.size(); ++b)
    for (std::size_t i = 0; i < state.buckets[b].parameters.size(); ++i) {
      const std::size_t one = state.buckets[b].parameters[i];
      state.bucket_of[index[one]] = {b, i};
      places[one] = state.buckets[b].places[i].view();
    }
  state.direct.emplace(tensors_of(trained));
  state.direct->set_places(places);
  if (options.broadcast_buffers) state.broadcast.emplace(group, state.buffers);
  state.mine.used.assign(state.parameters.size(), false);
  if (overlap)
    state.queue = std::make_unique<CommQueue>(group, &world.segment()->recorder(world.seat()));
}

Replica::~Replica() = default;

void Replica::set_weight(double weight) {
  if (!std::isfinite(weight) || weight < 0)
    throw ConfigError(fmt::format("data_parallel: weight {} is out of range", weight),
                      "a weight is finite and not negative, such as the number of samples");
  state_->weight = weight;
}

CommQueue::Statistics Replica::communication() const {
  return state_->queue ? state_->queue->statistics() : CommQueue::Statistics{};
}

CompressedGroup::Errors& Replica::wire_errors() { return state_->averages->errors(); }

NoSync::NoSync(std::shared_ptr<Replica> replica) : replica_(std::move(replica)) {
  ++replica_->state_->no_sync;
}

NoSync::~NoSync() { --replica_->state_->no_sync; }

Join::Join(std::shared_ptr<Replica> replica, JoinOptions options)
    : replica_(std::move(replica)), exceptions_(std::uncaught_exceptions()) {
  Replica::State& state = *replica_->state_;
  if (state.join)
    throw ConfigError("data_parallel: join() while another guard lives",
                      "one guard around the whole loop");
  state.join = std::move(options);
  state.authority = -1;
}

Join::~Join() noexcept(false) {
  if (std::uncaught_exceptions() == exceptions_)
    finish();
  else
    replica_->state_->join.reset();
}

void Join::finish() {
  Replica::State& state = *replica_->state_;
  if (!state.join) return;
  const struct End {
    Replica::State& state;
    ~End() {
      state.mine.active = true;
      state.join.reset();
    }
  } end{state};
  if (state.world.size() > 1) state.shadow();
}

}  // namespace lockstep
