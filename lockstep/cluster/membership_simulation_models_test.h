// For tests alone: what the workers of a simulated job compute.
//
// OneNode: shared weights in one memory with the real records, journals, slice updates and
// recovery, the real ledger and the canonical tree. ManyNodes: a number per node in place of the
// weights, exchanged in meetings.
#pragma once

#include <cstring>
#include <set>

#include "lockstep/cluster/membership_simulation_test.h"
#include "lockstep/data/ledger.h"
#include "lockstep/update/naive_test.h"
#include "lockstep/update/recovery.h"

namespace lockstep::simulation {

// What does not change from one history to the next: the job, and what an undisturbed run gives.
struct Work {
  static constexpr std::uint64_t kElements = 2 * 1024 + 300;
  static constexpr std::uint64_t kMost = 12;  // steps

  explicit Work(int virtual_ranks)
      : virtual_ranks(virtual_ranks),
        ledger({.samples = 50, .global_batch_size = 12, .virtual_ranks = virtual_ranks}),
        spec{.elements = kElements,
             .groups = {Adam{.lr = 0.01}, SGD{.lr = 0.01, .momentum = 0.9}},
             .ranges = {{0, 1100, 0}, {1100, 1110, UpdateRange::kAverage}, {1120, kElements, 1}}} {
    naive::Weights twin(spec);
    for (std::size_t i = 0; i < kElements; ++i) twin.weights[i] = first_weight(i);
    for (std::uint64_t step = 1; step <= kMost; ++step) {
      std::vector<std::vector<float>> contributions;
      double weight = 0;
      int had_samples = 0;
      for (int v = 0; v < virtual_ranks; ++v) {
        contribute(step, v, twin.weights, contributions.emplace_back(kElements));
        weight += loss(step, v).weight;
        had_samples += loss(step, v).weight > 0 ? 1 : 0;
      }
      twin.step(contributions, weight, had_samples, spec.groups, 0);
      weights.push_back(twin.weights);
    }
  }

  std::uint64_t epoch(std::uint64_t step) const { return (step - 1) / ledger.steps_per_epoch(); }
  std::uint64_t step_of_epoch(std::uint64_t step) const {
    return (step - 1) % ledger.steps_per_epoch();
  }
  std::vector<std::uint64_t> samples(std::uint64_t step, int virtual_rank) const {
    const auto order = ledger.epoch(epoch(step));
    const PositionRange range = ledger.positions(step_of_epoch(step), virtual_rank);
    std::vector<std::uint64_t> samples;
    for (std::uint64_t i = range.begin; i < range.end; ++i) samples.push_back(order.index(i));
    return samples;
  }
  VirtualLoss loss(std::uint64_t step, int virtual_rank) const {
    const auto count = static_cast<double>(samples(step, virtual_rank).size());
    return {count / 2, count};
  }
  // A function of the samples and of the weights as they are: wrong weights make wrong gradients.
  std::vector<std::uint64_t> contribute(std::uint64_t step, int virtual_rank,
                                        std::span<const float> weights,
                                        std::span<float> out) const {
    const std::vector<std::uint64_t> used = samples(step, virtual_rank);
    std::uint64_t random = 1;
    for (const std::uint64_t sample : used) random = mix({random, sample});
    for (std::size_t i = 0; i < out.size(); ++i) {
      random = random * 6364136223846793005u + 1442695040888963407u;
      const auto noise = static_cast<float>(static_cast<std::int32_t>(random >> 32)) * 0x1p-31f;
      out[i] = used.empty() ? 0.0f : noise + 0.1f * weights[i];
    }
    return used;
  }
  static float first_weight(std::size_t i) {
    return static_cast<float>(mix({i}) % 2001) / 1000 - 1;
  }

  int virtual_ranks;
  Ledger ledger;
  UpdateSpec spec;
  std::vector<std::vector<float>> weights;  // after each step
};

// Every sample of an epoch once.
class Attendance {
 public:
  void count(const Work& work, std::uint64_t step, const std::vector<std::uint64_t>& samples) {
    if (work.step_of_epoch(step) == 0 && seen_step_ != step) seen_.clear();
    seen_step_ = step;
    for (const std::uint64_t sample : samples)
      if (!seen_.insert(sample).second)
        throw Violation(fmt::format("step {}: sample {} counts twice", step, sample));
  }
  void end_of_step(const Work& work, std::uint64_t step) const {
    if (work.step_of_epoch(step) + 1 == work.ledger.steps_per_epoch() && seen_.size() != 50)
      throw Violation(fmt::format("epoch {} has seen {} samples", work.epoch(step), seen_.size()));
  }

 private:
  std::set<std::uint64_t> seen_;
  std::uint64_t seen_step_ = 0;
};

class OneNode : public Model {
 public:
  OneNode(Simulation& simulation, const Work& work)
      : simulation_(simulation),
        work_(work),
        layout_(SharedLayout::of(work.spec, work.virtual_ranks)),
        memory_(static_cast<std::byte*>(std::aligned_alloc(4096, round_up(layout_.total_bytes()))),
                &std::free),
        seats_(static_cast<std::size_t>(simulation.setup().seats)) {
    std::memset(memory_.get(), 0, layout_.total_bytes());
    const SharedState state = SharedState::create({memory_.get(), layout_.total_bytes()}, work.spec,
                                                  layout_, first_record(work.spec));
    for (std::size_t i = 0; i < Work::kElements; ++i) state.weights()[i] = Work::first_weight(i);
  }

  std::uint64_t committed(int) override { return state().committed(); }
  void reset_seat(int, int seat) override { seats_[static_cast<std::size_t>(seat)] = {}; }

  void recover(Worker& worker) override {
    worker.has_done_its_part = false;
    const auto instant = [&](auto, auto) { simulation_.instant(worker); };
    simulation_.meet(worker);
    simulation_.check_alone(worker);
    SliceUpdate update(work_.spec, state());
    const RecoveryPlan plan = plan_recovery(recovery_state(state(), work_.spec), worker.size());
    if (worker.rank == 0) simulation_.log("  {}", plan.reason);
    simulation_.instant(worker);
    const std::uint64_t decided = state().decided();  // before anybody can decide the next
    if (plan.action == RecoveryPlan::Action::finish) {
      const StepRecord record = state().record(decided, work_.spec);
      const Places places(*this, record);
      recover_slices(update, plan, worker.rank, places, instant);
    }
    simulation_.meet(worker);
    simulation_.instant(worker);
    if (plan.action == RecoveryPlan::Action::finish)
      commit(worker, state().record(decided, work_.spec));
  }

  std::uint64_t step(Worker& worker) override {
    const auto instant = [&] { simulation_.instant(worker); };
    const auto runs = partition_virtual_ranks(work_.virtual_ranks, static_cast<int>(worker.size()));
    const std::uint64_t step = state().committed() + 1;
    compute(worker, step, runs[worker.rank]);
    instant();
    state().seal(static_cast<int>(worker.rank), step);
    instant();
    const auto known = simulation_.meet(worker, simulation_.newest_generation(worker.node));
    if (worker.rank == 0) {
      decide(worker, step, runs);
      instant();
    }
    simulation_.meet(worker);
    const StepRecord record = state().record(step, work_.spec);
    const Places places(*this, record);
    SliceUpdate update(work_.spec, state());
    update.run(record, places.contributions(), worker.rank, [&](auto, auto) { instant(); });
    worker.has_done_its_part = true;
    simulation_.meet(worker);
    instant();
    commit(worker, record);
    instant();
    return *std::min_element(known.begin(), known.end());
  }

 private:
  struct Seat {
    std::vector<float> slots;
    std::uint64_t step = 0;
    std::map<int, std::vector<std::uint64_t>> samples;  // that each virtual rank used
  };
  // Where a record says that its contributions lie.
  class Places {
   public:
    Places(const OneNode& model, const StepRecord& record) : stride_(model.stride()) {
      for (const std::uint64_t place : record.places.span())
        views_.emplace_back(model.seats_.at(place).slots);
    }
    Contributions contributions() const { return {.ranks = views_, .stride = stride_}; }

   private:
    std::vector<std::span<const float>> views_;
    std::uint64_t stride_;
  };

  static std::size_t round_up(std::size_t bytes) { return (bytes + 4095) / 4096 * 4096; }
  SharedState state() const {
    return SharedState::attach({memory_.get(), layout_.total_bytes()}, layout_);
  }
  std::uint64_t stride() const { return layout_.tiles() * kTileElements; }

  void compute(Worker& worker, std::uint64_t step, VirtualRange run) {
    Seat& seat = seats_[static_cast<std::size_t>(worker.seat)];
    seat.step = step;
    seat.samples.clear();
    const AccumulatePlan plan = plan_accumulation(run, work_.virtual_ranks);
    seat.slots.resize(static_cast<std::size_t>(work_.virtual_ranks) * stride());
    const auto slot = [&](std::size_t i) {
      return std::span(seat.slots).subspan(i * stride(), Work::kElements);
    };
    for (const AccumulateStep& next : plan.steps) {
      auto top = static_cast<std::size_t>(next.slot);
      seat.samples[next.virtual_rank] = work_.contribute(
          step, next.virtual_rank, state().weights().first(Work::kElements), slot(top));
      simulation_.instant(worker);
      for (int merge = 0; merge < next.merges; ++merge, --top) {
        for (std::size_t i = 0; i < Work::kElements; ++i) slot(top - 1)[i] += slot(top)[i];
        simulation_.instant(worker);
      }
    }
  }

  void decide(Worker& worker, std::uint64_t step, const std::vector<VirtualRange>& runs) {
    std::vector<std::uint64_t> places;
    for (std::size_t rank = 0; rank < worker.size(); ++rank) {
      const Worker& other = *worker.group[rank];
      places.push_back(static_cast<std::uint64_t>(other.seat));
      if (seats_[places.back()].step != step)
        throw Violation(fmt::format("step {} is decided without seat {}", step, other.seat));
    }
    std::vector<VirtualLoss> losses;
    for (int v = 0; v < work_.virtual_ranks; ++v) losses.push_back(work_.loss(step, v));
    const StepRecord last = state().record(step - 1, work_.spec);
    state().decide(plan_step(work_.spec, last,
                             {.groups = work_.spec.groups,
                              .runs = runs,
                              .places = places,
                              .losses = losses,
                              .slices = static_cast<int>(worker.size())}));
  }

  void commit(Worker& worker, const StepRecord& record) {
    const bool first = state().committed() < record.step;
    state().commit(record);
    if (first) check(record);
    simulation_.committed(worker, record.step);
  }

  void check(const StepRecord& record) {
    const std::span<float> weights = state().weights();
    if (std::memcmp(weights.data(), work_.weights[record.step - 1].data(),
                    Work::kElements * sizeof(float)) != 0)
      throw Violation(fmt::format("step {}: other weights than an undisturbed run's", record.step));
    for (std::size_t rank = 0; rank < record.runs.size; ++rank) {
      const Seat& seat = seats_.at(record.places.items[rank]);
      const VirtualRange run = record.runs.items[rank];
      for (int v = run.lo; v < run.hi; ++v)
        attendance_.count(work_, record.step, seat.samples.at(v));
    }
    attendance_.end_of_step(work_, record.step);
  }

  template <typename Instant>
  static void recover_slices(SliceUpdate& update, const RecoveryPlan& plan, std::size_t rank,
                             const Places& places, const Instant& instant) {
    lockstep::recover(update, plan, rank, places.contributions(), instant);
  }

  Simulation& simulation_;
  const Work& work_;
  SharedLayout layout_;
  std::unique_ptr<std::byte, decltype(&std::free)> memory_;
  std::vector<Seat> seats_;
  Attendance attendance_;
};

// A node's weights are one number. After a failure the newest replica wins.
class ManyNodes : public Model {
 public:
  ManyNodes(Simulation& simulation, const Work& work) : simulation_(simulation), work_(work) {
    std::uint64_t weights = kFirst;
    for (std::uint64_t step = 1; step <= Work::kMost; ++step) {
      std::vector<std::uint64_t> parts;
      for (int v = 0; v < work.virtual_ranks; ++v) parts.push_back(part(weights, step, v));
      expected_.push_back(weights = sum(weights, parts));
    }
  }
  std::uint64_t committed(int node) override { return replicas_[node].step; }
  void reset_seat(int, int) override {}

  void recover(Worker& worker) override {
    worker.has_done_its_part = false;
    const auto replicas = simulation_.meet(worker, replicas_[worker.node].step);
    simulation_.check_alone(worker);
    const auto newest = std::max_element(replicas.begin(), replicas.end());
    const Worker& source = *worker.group[static_cast<std::size_t>(newest - replicas.begin())];
    if (worker.rank == 0)
      simulation_.log("  step {} is the newest, on node {}", *newest, source.node);
    simulation_.instant(worker);
    if (speaks_for_its_node(worker)) replicas_[worker.node] = replicas_[source.node];
    simulation_.instant(worker);
    simulation_.meet(worker);
  }

  std::uint64_t step(Worker& worker) override {
    const auto runs = partition_virtual_ranks(work_.virtual_ranks, static_cast<int>(worker.size()));
    const Replica before = replicas_[worker.node];
    const std::uint64_t step = before.step + 1;
    worker.computed.clear();
    for (int v = runs[worker.rank].lo; v < runs[worker.rank].hi; ++v) {
      worker.computed[v] = part(before.weights, step, v);
      simulation_.instant(worker);
    }
    const auto known = simulation_.meet(worker, simulation_.newest_generation(worker.node));
    std::vector<std::uint64_t> parts;
    for (std::size_t rank = 0; rank < worker.size(); ++rank)
      for (const auto& [v, value] : worker.group[rank]->computed) parts.push_back(value);
    simulation_.instant(worker);
    if (speaks_for_its_node(worker)) replicas_[worker.node] = {step, sum(before.weights, parts)};
    simulation_.instant(worker);
    worker.has_done_its_part = true;
    simulation_.meet(worker);
    for (const Worker* const other : worker.group) check(replicas_[other->node], step);
    simulation_.committed(worker, step);
    simulation_.meet(worker);  // nobody begins the next step before all have looked
    return *std::min_element(known.begin(), known.end());
  }

 private:
  struct Replica {
    std::uint64_t step = 0;
    std::uint64_t weights = kFirst;
  };
  static constexpr std::uint64_t kFirst = 4711;

  std::uint64_t part(std::uint64_t weights, std::uint64_t step, int v) const {
    std::uint64_t value = weights;
    for (const std::uint64_t sample : work_.samples(step, v)) value = mix({value, sample});
    return value;
  }
  static std::uint64_t sum(std::uint64_t weights, const std::vector<std::uint64_t>& parts) {
    for (const std::uint64_t value : parts) weights = mix({weights, value});
    return weights;
  }
  static bool speaks_for_its_node(const Worker& worker) {
    for (std::size_t rank = 0; rank < worker.rank; ++rank)
      if (worker.group[rank]->node == worker.node) return false;
    return true;
  }
  void check(const Replica& replica, std::uint64_t step) const {
    if (replica.step != step || replica.weights != expected_[step - 1])
      throw Violation(fmt::format("step {}: a replica differs from an undisturbed run's", step));
  }

  Simulation& simulation_;
  const Work& work_;
  std::vector<std::uint64_t> expected_;
  std::map<int, Replica> replicas_;
};

}  // namespace lockstep::simulation
