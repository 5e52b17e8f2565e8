#include "lockstep/cluster/world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/cluster/segment_exchange.h"
#include "lockstep/cluster/trace.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"

namespace lockstep {
namespace {
constexpr std::uint64_t kNoGeneration = ~std::uint64_t{0};  // not a member yet
}

struct World::State {
  Place place;
  GroupOptions group_options;
  UniqueFd name;  // of the job on this node, where no agent holds it together
  std::shared_ptr<Segment> segment;
  std::unique_ptr<EventSink> events;
  std::unique_ptr<Group> group;
  bool is_elastic = false;
  std::uint64_t seen = 0;  // generations that this worker knows of
  std::map<std::string, std::span<std::byte>> lasting;
  int next_kept = 0;

  bool enter_next(bool failed);
  bool enter(const Generation& generation);
};

int World::rank() const { return state_->place.rank; }
int World::size() const { return state_->place.size; }
int World::local_rank() const { return state_->place.local_rank; }
int World::local_size() const { return state_->place.local_size; }
std::uint64_t World::generation() const { return state_->place.generation; }
const Place& World::place() const { return state_->place; }
Group& World::group() const { return *state_->group; }
EventSink& World::events() const { return *state_->events; }
bool World::has_agent() const { return state_->place.event_fd >= 0; }
bool World::is_elastic() const { return state_->is_elastic; }

std::shared_ptr<Segment> World::segment() const {
  if (!state_->segment) state_->segment = Segment::create({.seats = 1});
  return state_->segment;
}

int World::seat() const {
  return state_->place.seat >= 0 ? state_->place.seat : state_->place.local_rank;
}

void World::declare_elastic() const {
  if (state_->place.seat < 0 || std::exchange(state_->is_elastic, true)) return;
  state_->events->emit({{"event", "elastic"}});
}

void World::join() const {
  if (state_->group) return;
  state_->events->emit({{"event", "join"}});
  state_->enter_next(false);
}

bool World::next_generation(std::string_view failure) const {
  if (!failure.empty())
    state_->events->emit(
        {{"event", "comm_error"}, {"generation", generation()}, {"message", failure}});
  state_->group.reset();
  return state_->enter_next(!failure.empty());
}

bool World::in_generations(const std::function<bool()>& work,
                           const std::function<void()>& leave) const {
  for (;;) {
    std::string failure;
    try {
      if (work()) return true;
    } catch (const CommError& error) {
      if (!is_elastic()) throw;
      failure = error.what();
    }
    leave();
    if (!next_generation(failure)) return false;
  }
}

bool World::next_generation_is_due() const {
  return state_->is_elastic && generations_published(*state_->segment) > state_->seen;
}

bool World::stop_requested() const {
  return state_->place.seat >= 0 && lockstep::stop_requested(*state_->segment);
}

int World::least_size() const {
  const int least = is_elastic() ? world_bounds(*state_->segment).least : 0;
  return least > 0 ? least : size();
}

int World::most_size() const {
  const int most = is_elastic() ? world_bounds(*state_->segment).most : 0;
  return std::max(most, size());
}

void World::made_progress() const {
  if (state_->segment)
    state_->segment->control(seat()).progress.fetch_add(1, std::memory_order_relaxed);
}

std::span<std::byte> World::lasting(const std::string& name, std::size_t bytes) const {
  std::span<std::byte>& memory = state_->lasting[name];
  if (memory.size() < bytes) memory = segment()->allocate_lasting(seat(), bytes, name);
  return memory.first(bytes);
}

void World::release(const std::string& name) const {
  if (const auto found = state_->lasting.extract(name)) segment()->release(seat(), found.mapped());
}

int World::claim_kept() const { return state_->next_kept++; }

// False: it does not list this worker, which was a member before. After a failure only a generation
// that ends the old one will do: a planned one that happens to be there may leave out somebody who
// is still at work on a step that the others would recover.
bool World::State::enter_next(bool failed) {
  const bool was_member = place.generation != kNoGeneration;
  const Deadline deadline = was_member ? Deadline::after(group_options.timeout) : Deadline::never();
  for (;;) {
    if (segment->abort_word().load() != 0)
      throw CommError("the job was aborted: " + segment->abort_reason());
    if (generations_published(*segment) > seen) {
      const Generation generation = *newest_generation(*segment);
      seen = generation.number + 1;
      const std::uint64_t over = generations_over(*segment);
      if (generation.number < over || (failed && over <= place.generation)) continue;
      if (enter(generation)) return true;
      failed = std::ranges::find(generation.seats, place.seat) != generation.seats.end();
      if (was_member && !failed) return false;
      continue;
    }
    if (deadline.expired())
      throw CommError(fmt::format("no generation after {} within {:.0f} s", seen,
                                  seconds(group_options.timeout)));
    await_generation(*segment, place.seat, seen,
                     std::min<Clock::duration>(deadline.remaining(), std::chrono::seconds(1)));
  }
}

bool World::State::enter(const Generation& generation) {
  const auto self = std::ranges::find(generation.seats, place.seat);
  if (self == generation.seats.end()) return false;
  place.rank = place.local_rank = static_cast<int>(self - generation.seats.begin());
  place.size = place.local_size = static_cast<int>(generation.seats.size());
  place.generation = group_options.generation = generation.number;
  group_options.seats = generation.seats;
  try {
    group = make_shm_group(segment, place.rank, group_options);
  } catch (const CommError& error) {  // somebody died on the way here
    events->emit(
        {{"event", "comm_error"}, {"generation", generation.number}, {"message", error.what()}});
  }
  return group != nullptr;
}

namespace {

UniqueFd inherited(int fd, const char* variable) {
  if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
    throw ConfigError(
        fmt::format("environment: {}={} is not an open descriptor: {}", variable, fd,
                    errno_text(errno)),
        "its launcher must pass it on; a program started by a worker can't join in its place");
  return UniqueFd(fd);
}

void check_one_node(const Place& place) {
  if (place.local_size != place.size || place.local_rank != place.rank)
    throw ConfigError(
        fmt::format(
            "{} started {} workers, of which {} on this node: this version runs on one node",
            name_of(place.launcher), place.size, place.local_size),
        "start all workers on one node");
}

}  // namespace

World init(const InitOptions& options) {
  const Environment environment = process_environment();
  // What `lockstep run` does for its workers: big blocks stay in the process, instead of being
  // faulted in anew in every step.
  if (!environment.contains("GLIBC_TUNABLES")) {
    ::mallopt(M_MMAP_MAX, 0);
    ::mallopt(M_TRIM_THRESHOLD, 1 << 30);
  }
  return init_from(place_from(environment), options);
}

World init_from(const Place& place, const InitOptions& options) {
  check_one_node(place);
  const Deadline deadline = Deadline::after(options.timeout);
  auto state = std::make_shared<World::State>();
  state->place = place;
  if (place.segment_fd >= 0) {
    state->segment = Segment::attach(inherited(place.segment_fd, "LOCKSTEP_SEGMENT_FD"));
    const int seats = state->segment->seats();
    if (place.seat < 0 ? seats != place.local_size : place.seat >= seats)
      throw ConfigError(
          fmt::format("environment: the segment LOCKSTEP_SEGMENT_FD={} is for {} "
                      "ranks, not {}",
                      place.segment_fd, seats, std::max(place.local_size, place.seat + 1)));
  } else if (place.local_size > 1) {
    SharedSegment shared = exchange_segment(place, deadline);
    state->segment = std::move(shared.segment);
    state->name = std::move(shared.name);
  }
  if (place.event_fd >= 0)
    state->events = std::make_unique<PipeEventSink>(inherited(place.event_fd, "LOCKSTEP_EVENT_FD"));
  else
    state->events = std::make_unique<NullEventSink>();
  state->group_options = {.generation = place.generation, .timeout = options.timeout};
  GroupOptions& group = state->group_options;
  if (!place.trace.empty()) {
    // A group of one leaves no records: traced, it is one of several that happens to be alone.
    if (!state->segment) state->segment = Segment::create({.seats = 1});
    const auto trace = std::make_shared<RankTrace>(
        state->segment, place.seat >= 0 ? place.seat : place.local_rank, place.trace,
        /*merges=*/place.event_fd < 0);
    group.on_records = [trace] { trace->copy_records(); };
  }
  World world;
  world.state_ = std::move(state);
  if (place.seat >= 0) {
    world.state_->place.generation = kNoGeneration;
    if (options.join) world.join();
  } else {
    world.state_->group = place.size > 1 || group.on_records
                              ? make_shm_group(world.state_->segment, place.local_rank, group)
                              : make_solo_group(group);
  }
  return world;
}

}  // namespace lockstep
