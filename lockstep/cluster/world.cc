#include "lockstep/cluster/world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>

#include <cerrno>
#include <cstdlib>

#include "lockstep/base/error.h"
#include "lockstep/cluster/segment_exchange.h"
#include "lockstep/cluster/trace.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"

namespace lockstep {

struct World::State {
  Place place;
  UniqueFd name;  // of the job on this node, where no agent holds it together
  std::shared_ptr<Segment> segment;
  std::unique_ptr<EventSink> events;
  std::unique_ptr<Group> group;
};

int World::rank() const { return state_->place.rank; }
int World::size() const { return state_->place.size; }
int World::local_rank() const { return state_->place.local_rank; }
int World::local_size() const { return state_->place.local_size; }
std::uint64_t World::generation() const { return state_->place.generation; }
const Place& World::place() const { return state_->place; }
Group& World::group() const { return *state_->group; }
EventSink& World::events() const { return *state_->events; }
std::shared_ptr<Segment> World::segment() const { return state_->segment; }
bool World::has_agent() const { return state_->place.event_fd >= 0; }

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
    if (state->segment->seats() != place.local_size)
      throw ConfigError(
          fmt::format("environment: the segment LOCKSTEP_SEGMENT_FD={} is for {} "
                      "ranks, not {}",
                      place.segment_fd, state->segment->seats(), place.local_size));
  } else if (place.local_size > 1) {
    SharedSegment shared = exchange_segment(place, deadline);
    state->segment = std::move(shared.segment);
    state->name = std::move(shared.name);
  }
  if (place.event_fd >= 0)
    state->events = std::make_unique<PipeEventSink>(inherited(place.event_fd, "LOCKSTEP_EVENT_FD"));
  else
    state->events = std::make_unique<NullEventSink>();
  GroupOptions group{.generation = place.generation, .timeout = options.timeout};
  if (!place.trace.empty()) {
    // A group of one leaves no records: traced, it is one of several that happens to be alone.
    if (!state->segment) state->segment = Segment::create({.seats = 1});
    const auto trace = std::make_shared<RankTrace>(state->segment, place.local_rank, place.trace,
                                                   /*merges=*/place.event_fd < 0);
    group.on_records = [trace] { trace->copy_records(); };
  }
  state->group = place.size > 1 || group.on_records
                     ? make_shm_group(state->segment, place.local_rank, group)
                     : make_solo_group(group);
  World world;
  world.state_ = std::move(state);
  return world;
}

}  // namespace lockstep
