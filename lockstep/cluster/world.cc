#include "lockstep/cluster/world.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <malloc.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <utility>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/cluster/segment_exchange.h"
#include "lockstep/cluster/trace.h"
#include "lockstep/collective/plan_choice.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"
#include "lockstep/transport/transport.h"

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
  std::unique_ptr<Endpoint> endpoint;  // where the world may span nodes
  std::vector<int> local_sizes;        // by node
  int node = 0;
  std::shared_ptr<Group> local, across, group;
  bool is_elastic = false;
  std::uint64_t seen = 0;  // generations that this worker knows of
  std::map<std::string, std::span<std::byte>> lasting;
  int next_kept = 0;

  int seat() const { return place.seat >= 0 ? place.seat : place.local_rank; }
  bool enter_next(bool failed);
  bool enter(const Generation& generation);
  void make_groups(const std::vector<std::string>& addresses);
  void leave() {
    group.reset();
    across.reset();
    local.reset();
  }
};

int World::rank() const { return state_->place.rank; }
int World::size() const { return state_->place.size; }
int World::local_rank() const { return state_->place.local_rank; }
int World::local_size() const { return state_->place.local_size; }
std::uint64_t World::generation() const { return state_->place.generation; }
const Place& World::place() const { return state_->place; }
Group& World::group() const { return *state_->group; }
int World::node() const { return state_->node; }
const std::vector<int>& World::local_sizes() const { return state_->local_sizes; }
Group& World::local_group() const { return *state_->local; }
Group* World::across_group() const { return state_->across.get(); }
EventSink& World::events() const { return *state_->events; }
bool World::has_agent() const { return state_->place.event_fd >= 0; }
bool World::is_elastic() const { return state_->is_elastic; }

std::shared_ptr<Segment> World::segment() const {
  if (!state_->segment) state_->segment = Segment::create({.seats = 1});
  return state_->segment;
}

int World::seat() const { return state_->seat(); }

void World::declare_elastic() const {
  if (state_->place.seat < 0 || std::exchange(state_->is_elastic, true)) return;
  state_->events->emit({{"event", "elastic"}});
}

void World::join() const {
  if (state_->group) return;
  nlohmann::json event{{"event", "join"}};
  if (state_->endpoint) event["address"] = to_base64(state_->endpoint->address());
  state_->events->emit(event);
  state_->enter_next(false);
}

bool World::next_generation(std::string_view failure) const {
  if (!failure.empty())
    state_->events->emit(
        {{"event", "comm_error"}, {"generation", generation()}, {"message", failure}});
  state_->leave();
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
  if (was_member && !failed)
    await_leavers(*segment, group_options.seats, place.generation, deadline);
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
  place.local_rank = static_cast<int>(self - generation.seats.begin());
  place.local_size = static_cast<int>(generation.seats.size());
  place.generation = group_options.generation = generation.number;
  group_options.seats = generation.seats;
  node = generation.node;
  local_sizes = generation.local_sizes;
  if (local_sizes.empty()) local_sizes = {place.local_size};
  const auto mine = local_sizes.begin() + node;
  place.rank = std::accumulate(local_sizes.begin(), mine, place.local_rank);
  place.size = std::accumulate(mine, local_sizes.end(), place.rank - place.local_rank);
  try {
    make_groups(generation.addresses);
  } catch (const CommError& error) {  // somebody died on the way here
    leave();
    events->emit(
        {{"event", "comm_error"}, {"generation", generation.number}, {"message", error.what()}});
  }
  return group != nullptr;
}

// Of the place and the nodes' sizes; addresses: of all ranks, in base64, where there are several
// nodes.
void World::State::make_groups(const std::vector<std::string>& addresses) {
  local = segment && (place.seat >= 0 || place.local_size > 1 || group_options.on_records)
              ? make_shm_group(segment, place.local_rank, group_options)
              : make_solo_group(group_options);
  group = local;
  if (local_sizes.size() == 1) return;
  GroupOptions options = group_options;
  options.seats = {};
  options.key = place.key;
  options.is_over = [segment = segment, generation = place.generation]() -> std::string {
    if (!segment) return "";
    if (segment->abort_word().load() != 0) return "the job was aborted: " + segment->abort_reason();
    if (generations_over(*segment) <= generation) return "";
    const auto next = newest_generation(*segment);
    return fmt::format("generation {} is over{}", generation,
                       next && next->number > generation ? ": " + next->reason : "");
  };
  options.local_ranks = place.local_size;
  // Who looks for workers that hang sees them wait there.
  if (segment) options.recorder = &segment->recorder(seat());
  options.on_choice = [this](const std::string& choice) {
    if (place.rank != 0) return;
    if (place.event_fd >= 0)
      events->emit({{"event", "message"}, {"text", choice}});
    else
      std::fprintf(stderr, "lockstep: %s\n", choice.c_str());
  };
  std::vector<std::string> decoded;
  for (const std::string& address : addresses) decoded.push_back(from_base64(address));
  const std::shared_ptr<Group> everyone = make_remote_group(
      endpoint->connect(
          decoded, place.rank,
          {.generation = place.generation, .deadline = Deadline::after(options.timeout)}),
      options);
  const int carriers = *std::ranges::min_element(local_sizes);
  const bool carries = place.local_rank < carriers;
  across = std::ranges::all_of(local_sizes, [](int size) { return size == 1; })
               ? everyone
               : everyone->split(carries ? place.local_rank : -1, node, {.tag = "carriers"});
  group = make_hierarchical_group({local, across, local_sizes, node, everyone}, options);
}

namespace {

static_assert((kMostAddressBytes + 2) / 3 * 4 <= kMaxAddressBytes);

std::unique_ptr<Endpoint> endpoint_of(const Place& place) {
  Engine engine = place.launcher == Launcher::open_mpi ? Engine::mpi : Engine::ucx;
  if (!place.engine.empty())
    engine = engine_from(place.engine);
  else if (engine == Engine::ucx && !unavailable(engine).empty())
    engine = Engine::zmq;
  return make_endpoint(engine,
                       {.interface = place.interface, .towards = place.master, .key = place.key});
}

std::map<Launcher, Exchange>& exchanges() {
  static std::map<Launcher, Exchange> exchanges{
      {Launcher::open_mpi,
       [](const Place&, const std::string& mine) { return exchange_by_mpi(mine); }}};
  return exchanges;
}

Exchange exchange_of(const Place& place, const InitOptions& options) {
  Exchange exchange = options.exchange ? options.exchange : exchanges()[place.launcher];
  if (!exchange)
    throw ConfigError(
        fmt::format("{} started {} workers, of which {} on this node: there is no way "
                    "to ask for the others' addresses",
                    name_of(place.launcher), place.size, place.local_size),
        "start them with lockstep run --nnodes, torchrun or mpirun");
  return exchange;
}

// What the ranks of a job without an agent tell each other. Returns their addresses.
std::vector<std::string> meet(const Place& place, const Exchange& exchange,
                              const std::string& address, std::vector<int>& local_sizes,
                              int& node) {
  const auto refuse = [&](int rank, const std::string& what) {
    return ConfigError(fmt::format("{}: rank {} {}", name_of(place.launcher), rank, what),
                       "a node's ranks are to be one after another, and every rank to run the "
                       "same version");
  };
  nlohmann::json mine{{"local_rank", place.local_rank}, {"local_size", place.local_size}};
  mine["address"] = to_base64(address);
  const std::vector<std::string> texts = exchange(place, mine.dump());
  std::vector<std::string> addresses;
  int first = 0;  // rank of the node under way
  for (int rank = 0; rank < place.size; ++rank) {
    const auto told =
        nlohmann::json::parse(texts.at(static_cast<std::size_t>(rank)), nullptr, false);
    try {
      const int local_rank = told.at("local_rank"), local_size = told.at("local_size");
      if (rank == first + (rank == 0 ? 0 : local_sizes.back())) {
        first = rank;
        local_sizes.push_back(local_size);
      }
      if (local_rank != rank - first || local_size != local_sizes.back() || local_size < 1)
        throw refuse(rank, fmt::format("is local rank {} of {}", local_rank, local_size));
      if (rank == place.rank) node = static_cast<int>(local_sizes.size()) - 1;
      addresses.push_back(told.at("address"));
    } catch (const nlohmann::json::exception&) {
      throw refuse(rank, "told nothing that can be read");
    }
  }
  if (first + local_sizes.back() != place.size)
    throw refuse(place.size - 1, "is not the last of its node");
  return addresses;
}

UniqueFd inherited(int fd, const char* variable) {
  if (::fcntl(fd, F_SETFD, FD_CLOEXEC) != 0)
    throw ConfigError(
        fmt::format("environment: {}={} is not an open descriptor: {}", variable, fd,
                    errno_text(errno)),
        "its launcher must pass it on; a program started by a worker can't join in its place");
  return UniqueFd(fd);
}

}  // namespace

bool meet_by(Launcher launcher, Exchange exchange) {
  exchanges()[launcher] = std::move(exchange);
  return true;
}

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
  const bool several_nodes = place.several_nodes || place.local_size < place.size;
  const Exchange exchange =
      several_nodes && place.seat < 0 ? exchange_of(place, options) : Exchange();
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
    const auto trace = std::make_shared<RankTrace>(state->segment, state->seat(), place.trace,
                                                   /*merges=*/place.event_fd < 0);
    group.on_records = [trace] { trace->copy_records(); };
  }
  group.exact = options.exact;
  group.known_costs = std::make_shared<KnownLinkCosts>();
  if (several_nodes) state->endpoint = endpoint_of(place);
  World world;
  world.state_ = std::move(state);
  if (place.seat >= 0) {
    world.state_->place.generation = kNoGeneration;
    if (options.join) world.join();
    return world;
  }
  std::vector<std::string> addresses;
  if (several_nodes)
    addresses = meet(place, exchange, world.state_->endpoint->address(), world.state_->local_sizes,
                     world.state_->node);
  else
    world.state_->local_sizes = {place.size};
  world.state_->make_groups(addresses);
  return world;
}

}  // namespace lockstep
