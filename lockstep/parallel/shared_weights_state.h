// What stands behind SharedWeights: where everything lies, and the parts of a step. Private to this
// layer; owned by one SharedWeights and used by its thread.
//
// Files: shared_weights_setup.cc (sorting the module's tensors, placing them), shared_weights.cc
// (the steps), shared_weights_nodes.cc (what several nodes do together).
#pragma once

#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lockstep/bridge/backward_hooks.h"
#include "lockstep/bridge/direct_gradients.h"
#include "lockstep/cluster/fault_injector.h"
#include "lockstep/collective/comm_queue.h"
#include "lockstep/collective/reduce.h"
#include "lockstep/collective/wire_format.h"
#include "lockstep/memory/read_only.h"
#include "lockstep/memory/segment.h"
#include "lockstep/parallel/shared_weights.h"
#include "lockstep/update/recovery.h"
#include "lockstep/update/reduced_gradient.h"
#include "lockstep/update/slice_update.h"

namespace lockstep {

// A module's tensors by what becomes of them.
struct Parts {
  std::vector<NamedTensor> trained;
  std::vector<int> group_of;  // trained
  std::vector<NamedTensor> frozen;
  std::vector<NamedTensor> float_buffers;
  std::vector<NamedTensor> integer_buffers;
};

// What every rank says of itself in a step, by rank.
struct RankNumbers {
  std::span<double> options;     // a digest of its optimizers' options
  std::span<double> integers;    // a digest of its buffers of other types; 0: it had no samples
  std::span<double> magnitudes;  // of its contributions; NaN: what it has carried is not finite
  std::span<double> moves;       // whether it has seen that the next generation is due
  std::span<double> stops;       // whether it has been asked to stop
  explicit RankNumbers(std::span<double> all)
      : options(all.first(all.size() / 5)),
        integers(all.subspan(options.size(), options.size())),
        magnitudes(all.subspan(2 * options.size(), options.size())),
        moves(all.subspan(3 * options.size(), options.size())),
        stops(all.last(options.size())) {}
};

// What an update adds up, as a step's record names it: on one node every rank's contribution; where
// there are several, the one that the nodes have reduced together.
struct Summands {
  std::vector<VirtualRange> runs;
  std::vector<std::uint64_t> places;
  std::vector<std::span<const float>> values;
};

// A rank's part in reducing contributions over several nodes. Buckets of elements travel one after
// the other, on the queue's thread: the last parameters first, as backward finishes them.
struct NodesReduction {
  struct Bucket {
    std::uint64_t begin = 0, end = 0;  // elements
    std::size_t parameters = 0;
    std::size_t missing = 1;  // gradients of this step that are not there yet
  };
  TreeLayout tree;                  // a run a node
  std::vector<CombinePlan> plans;   // what this node's ranks have becomes what the node has
  Summands local;                   // of this node's ranks
  ReducedGradient reduced;          // of all nodes
  std::vector<std::byte> combined;  // a piece of what the node has
  Reducer reducer = {};
  std::vector<Bucket> buckets = {};
  std::vector<std::size_t> bucket_of = {};  // parameters
  std::size_t sent = 0;                     // buckets of this step
  // The backward under way is the step's last one on this rank: its gradients travel at once.
  const AccumulateStep* last_step = nullptr;
  bool streams = false;
  std::vector<bool> arrived = {};  // parameters, in it
  // Gradients travel through it; none: as they are. What it loses is this carrier's to send in the
  // next step: part of the mean gradient, whatever the steps' weights, and of no step that was not
  // committed. It lives and ends with the generation.
  std::unique_ptr<CompressedGroup> wire = {};
  std::uint64_t errors_of = 0;  // the step that left wire's errors
  double weight = 0;            // of that step
  bool is_finite = true;        // what has come through wire in this step
};

inline void copy_bytes(std::span<std::byte> to, std::span<const std::byte> from) {
  LOCKSTEP_CHECK(to.size() == from.size());
  if (!from.empty()) std::memcpy(to.data(), from.data(), from.size());
}

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

  int kept = 0;
  WeightsOrigin origin;
  std::span<std::byte> memory;  // of the node: the shared state, frozen parameters, the log
  std::optional<SharedState> shared;
  std::shared_ptr<ReadOnlyView> view;  // from the weights on
  std::optional<SliceUpdate> updater;
  StepRecord last;     // committed
  StepRecord decided;  // the step under way

  TreeLayout tree;
  AccumulatePlan plan;
  std::span<std::byte> slots;
  Summands summands;
  std::size_t contributed = 0;          // slots that this rank hands in
  std::optional<NodesReduction> nodes;  // where there are several
  std::optional<DirectGradients> direct;
  int direct_slot = -1;
  double integers_digest = 0;  // 0: nothing was computed
  std::vector<VirtualLoss> losses;
  FaultInjector faults;
  std::optional<BackwardHooks> hooks;  // with nodes
  std::optional<CommQueue> queue;      // with nodes; goes first: its calls use what stands above

  State(torch::nn::Module& module, const World& world, std::span<const ParameterGroup> groups,
        const SharedWeightsOptions& options);

  Group& group() const { return world.group(); }
  Group& local() const { return world.local_group(); }
  bool is_leader() const { return world.local_rank() == 0; }  // of its node
  std::size_t local_rank() const { return static_cast<std::size_t>(world.local_rank()); }
  Contributions contributions() const { return {summands.values, spec.elements}; }
  VirtualRange run() const { return tree.runs[static_cast<std::size_t>(world.rank())]; }
  std::span<float> slot(int index) const {
    return {
        reinterpret_cast<float*>(slots.data()) + static_cast<std::size_t>(index) * spec.elements,
        spec.elements};
  }
  std::span<std::byte> frozen_bytes() const {
    return memory.subspan(shared->layout().total_bytes(), frozen.bytes());
  }
  std::string slots_name() const { return "gradients " + std::to_string(kept); }
  // It holds words that are changed at once.
  std::size_t log_offset() const {
    return (shared->layout().total_bytes() + frozen.bytes() + 63) / 64 * 64;
  }
  std::span<std::byte> log() const { return memory.subspan(log_offset()); }
  std::span<std::byte> note(std::uint64_t step) const {
    return shared->buffers(step).last(options.note_bytes);
  }
  // Of integer buffer `i` after `step`.
  std::span<std::byte> integer_home(std::uint64_t step, std::size_t i) const {
    return shared->buffers(step).subspan(integers.entries[i].offset, integers.entries[i].count);
  }
  // Of the view or of the memory itself, from the weights on.
  std::span<std::byte> committed_buffers(std::span<std::byte> weights) const {
    return weights.subspan(parameters.bytes(), buffers.bytes());
  }

  SharedLayout layout() const;
  std::size_t memory_bytes() const;
  int reduced_number() const;  // of keep()
  void take_up(const InitialState* initial);
  void make_weights(const InitialState* initial);
  void attach();
  void point_module();
  void finish_old_step(const NodesPlan& plan);
  std::span<const float> contribution_at(std::uint64_t place, std::size_t slots) const;
  void place_contributions();
  // Across nodes; all collective.
  std::vector<NodeState> node_states();
  void take_record(const NodesPlan& plan);
  void take_weights(const NodesPlan& plan);
  void pass_values(Group& carriers, int source, std::span<const std::span<std::byte>> values);
  std::vector<std::span<std::byte>> values() const;
  void place_reduction();
  void place_buckets();
  void reduce_across(const NodesReduction::Bucket& bucket);
  void begin_reduction();
  void finish_reduction();
  void send_ready();
  void rescale_errors(double weight);
  void merge(const AccumulateStep& step, std::uint64_t begin, std::uint64_t end);
  void stream(std::size_t parameter);
  void stream_rest();
  void settle_integers(std::span<const double> digests);
  void copy_buffers_home(std::uint64_t step);
  void refresh_integers();
  void restore_buffers();
  void keep_integers();
  void bear_gradients_in(int index);
  void collect(int index);
  void accumulate(const Compute& compute);
  SliceUpdate::Hook faults_within(Point point, std::uint64_t step);
  void check_numbers(const RankNumbers& ranks);
  std::vector<StateTensor> state_tensors() const;
};

}  // namespace lockstep
