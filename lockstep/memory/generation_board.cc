#include "lockstep/memory/generation_board.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

// The nodes of a generation in shared memory: this node, how many there are, how many members each
// has, the bytes of each address; then the addresses.
using NodeWord = std::uint32_t;

std::vector<std::byte> pack_nodes(const Generation& generation) {
  std::vector<NodeWord> words{static_cast<NodeWord>(generation.node),
                              static_cast<NodeWord>(generation.local_sizes.size())};
  words.insert(words.end(), generation.local_sizes.begin(), generation.local_sizes.end());
  for (const std::string& address : generation.addresses) {
    LOCKSTEP_CHECK(address.size() <= kMaxAddressBytes);
    words.push_back(static_cast<NodeWord>(address.size()));
  }
  const auto head = std::as_bytes(std::span(words));
  std::vector<std::byte> bytes(head.begin(), head.end());
  for (const std::string& address : generation.addresses) {
    const auto more = as_byte_span(address);
    bytes.insert(bytes.end(), more.begin(), more.end());
  }
  return bytes;
}

void unpack_nodes(std::span<const std::byte> bytes, Generation& generation) {
  const auto damaged = [&] {
    return Error(fmt::format("generation {} is damaged: the list of its nodes", generation.number));
  };
  const auto word = [&] {
    NodeWord value = 0;
    if (bytes.size() < sizeof value) throw damaged();
    std::memcpy(&value, bytes.data(), sizeof value);
    bytes = bytes.subspan(sizeof value);
    return value;
  };
  generation.node = static_cast<int>(word());
  const NodeWord nodes = word();
  if (nodes < 2 || nodes > bytes.size() / sizeof(NodeWord) ||
      static_cast<NodeWord>(generation.node) >= nodes)
    throw damaged();
  std::uint64_t ranks = 0;
  for (NodeWord node = 0; node < nodes; ++node) {
    const NodeWord size = word();
    if (size == 0 || size > static_cast<NodeWord>(kMaxSeats)) throw damaged();
    generation.local_sizes.push_back(static_cast<int>(size));
    ranks += size;
  }
  if (generation.local_sizes[static_cast<std::size_t>(generation.node)] !=
          static_cast<int>(generation.seats.size()) ||
      ranks > bytes.size() / sizeof(NodeWord))
    throw damaged();
  std::vector<std::size_t> sizes(ranks);
  for (std::size_t& size : sizes) size = word();
  for (const std::size_t size : sizes) {
    if (size > kMaxAddressBytes || size > bytes.size()) throw damaged();
    generation.addresses.emplace_back(reinterpret_cast<const char*>(bytes.data()), size);
    bytes = bytes.subspan(size);
  }
}

}  // namespace

void publish(Segment& segment, const Generation& generation, bool at_once) {
  GenerationBoard& board = segment.board();
  LOCKSTEP_CHECK(generation.number >= board.newest.load() && !generation.seats.empty() &&
                 generation.seats.size() <= kMaxSeats);
  auto& list = board.generations[generation.number % 2];
  for (std::size_t rank = 0; rank < generation.seats.size(); ++rank)
    list.seats[rank].store(static_cast<std::uint16_t>(generation.seats[rank]));
  list.count.store(static_cast<std::uint32_t>(generation.seats.size()));
  list.reason.set(generation.reason);
  list.nodes_bytes.store(0);
  if (generation.local_sizes.size() > 1) {
    const std::vector<std::byte> nodes = pack_nodes(generation);
    if (list.nodes_room.load() < nodes.size()) {
      const auto room =
          segment.allocate_lasting(segment.node_arena(), 2 * nodes.size(), "the list of nodes");
      list.nodes.store(static_cast<std::uint64_t>(segment.offset_of(room.data())));
      list.nodes_room.store(room.size());
    }
    std::memcpy(segment.at(list.nodes.load(), nodes.size()).data(), nodes.data(), nodes.size());
    list.nodes_bytes.store(nodes.size());
  }
  // In this order: who sees the new generation sees that it ends the older ones.
  if (at_once) board.over.store(generation.number);
  board.newest.store(generation.number + 1);
  segment.wake_all();
}

std::optional<Generation> newest_generation(Segment& segment) {
  const GenerationBoard& board = segment.board();
  for (;;) {
    const std::uint64_t published = board.newest.load();
    if (published == 0) return std::nullopt;
    Generation generation{.number = published - 1, .seats = {}, .reason = {}};
    const auto& list = board.generations[generation.number % 2];
    const std::uint32_t count = list.count.load();
    for (std::size_t rank = 0; rank < count && rank < list.seats.size(); ++rank)
      generation.seats.push_back(list.seats[rank].load());
    generation.reason = list.reason.get();
    std::vector<std::byte> nodes;
    if (const std::uint64_t bytes = list.nodes_bytes.load(); bytes != 0) {
      const auto shared = segment.at(segment.node_arena(), list.nodes.load(), bytes);
      nodes.assign(shared.begin(), shared.end());
    }
    if (board.newest.load() != published) continue;  // its place is the next but one's, too
    if (count == 0 || count > list.seats.size())
      throw Error(fmt::format("generation {} is damaged: {} members", generation.number, count));
    for (const int seat : generation.seats)
      if (seat >= segment.seats())
        throw Error(fmt::format("generation {} is damaged: a member at seat {} of {}",
                                generation.number, seat, segment.seats()));
    if (!nodes.empty()) unpack_nodes(nodes, generation);
    return generation;
  }
}

std::uint64_t generations_published(Segment& segment) { return segment.board().newest.load(); }
std::uint64_t generations_over(Segment& segment) { return segment.board().over.load(); }

void await_generation(Segment& segment, int seat, std::uint64_t published,
                      std::chrono::nanoseconds timeout) {
  ControlBlock& block = segment.control(seat);
  const std::uint32_t bell = block.bell.load();
  if (generations_published(segment) > published || segment.abort_word().load() != 0) return;
  sleep_on(block.bell, bell, timeout);
}

void await_leavers(Segment& segment, std::span<const int> seats, std::uint64_t generation,
                   const Deadline& deadline) {
  constexpr std::chrono::milliseconds kSlice{50};
  for (const int seat : seats) {
    ControlBlock& block = segment.control(seat);
    for (;;) {
      const std::uint32_t bell = block.bell.load();
      if (block.left.load() > generation || block.joined.load() != generation + 1) break;
      if (generations_over(segment) > generation || segment.abort_word().load() != 0 ||
          deadline.expired())
        return;
      sleep_on(block.bell, bell, std::min<Clock::duration>(kSlice, deadline.remaining()));
    }
  }
}

void request_stop(Segment& segment) { segment.board().stop.store(1); }
bool stop_requested(Segment& segment) { return segment.board().stop.load() != 0; }

void set_world_bounds(Segment& segment, const WorldBounds& bounds) {
  segment.board().least.store(static_cast<std::uint32_t>(bounds.least));
  segment.board().most.store(static_cast<std::uint32_t>(bounds.most));
}

WorldBounds world_bounds(Segment& segment) {
  const auto checked = [](std::uint32_t count) {
    return count <= static_cast<std::uint32_t>(kMaxSeats) ? static_cast<int>(count) : 0;
  };
  return {checked(segment.board().least.load()), checked(segment.board().most.load())};
}

bool claim_fault(Segment& segment, int index) {
  LOCKSTEP_CHECK(index >= 0 && index < kMaxFaults);
  const std::uint64_t bit = std::uint64_t{1} << (index % 64);
  auto& word = segment.board().faults[static_cast<std::size_t>(index) / 64];
  return (word.fetch_or(bit) & bit) == 0;
}

std::optional<Kept> kept(Segment& segment, int number) {
  LOCKSTEP_CHECK(number >= 0 && number < kMaxKept);
  const auto& entry = segment.board().kept[number];
  const std::uint32_t state = entry.state.load();
  const std::uint64_t place = entry.place.load();
  if (place == 0) return std::nullopt;
  if (state > static_cast<std::uint32_t>(KeptState::edited))
    throw Error(
        fmt::format("what the job keeps under number {} is damaged: state {}", number, state));
  return Kept{segment.at(segment.node_arena(), place, entry.bytes.load()),
              static_cast<KeptState>(state)};
}

std::span<std::byte> keep(Segment& segment, int number, std::size_t bytes, std::string_view what) {
  if (number < 0 || number >= kMaxKept)
    throw Error(fmt::format("no room for {}: a job keeps {} things at most", what, kMaxKept));
  auto& entry = segment.board().kept[number];
  if (const auto before = kept(segment, number);
      before && before->state == KeptState::unfinished && before->memory.size() == bytes) {
    std::memset(before->memory.data(), 0, bytes);
    return before->memory;
  }
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  const auto room = segment.allocate(segment.node_arena(), bytes + page, what);
  const auto offset = static_cast<std::size_t>(segment.offset_of(room.data()));
  const std::size_t begin = (offset + page - 1) / page * page;
  entry.state.store(static_cast<std::uint32_t>(KeptState::unfinished));
  entry.bytes.store(bytes);
  entry.place.store(begin);
  return room.subspan(begin - offset, bytes);
}

void set_kept_state(Segment& segment, int number, KeptState state) {
  segment.board().kept[number].state.store(static_cast<std::uint32_t>(state));
}

}  // namespace lockstep
