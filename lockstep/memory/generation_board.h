// Who is a member, as the agent tells all workers of a node: the newest generation, which older
// ones are over, whether the job is to stop; and what the job keeps in the node's arena for workers
// that come later. In the segment's header, all zero at first.
//
// Threads: the agent's one thread publishes; any thread of any holder may read. What is read is
// checked.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/deadline.h"
#include "lockstep/memory/control_block.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

inline constexpr int kMaxFaults = 256;
inline constexpr int kMaxKept = 64;

struct GenerationBoard {
  std::atomic<std::uint64_t> newest;  // the newest generation's number + 1; 0: none
  std::atomic<std::uint64_t> over;    // generations below this number are
  std::atomic<std::uint32_t> stop;
  std::atomic<std::uint32_t> least, most;  // members
  std::array<std::atomic<std::uint64_t>, kMaxFaults / 64> faults;
  struct {
    std::atomic<std::uint32_t> count;
    std::array<std::atomic<std::uint16_t>, kMaxSeats> seats;
    SharedText<1000> reason;
    std::atomic<std::uint64_t> nodes, nodes_bytes;  // in the node's arena; 0: one node
    std::atomic<std::uint64_t> nodes_room;
  } generations[2];  // generation g is in g % 2
  struct {
    std::atomic<std::uint64_t> place, bytes;
    std::atomic<std::uint32_t> state;
  } kept[kMaxKept];
};

struct Generation {
  std::uint64_t number = 0;
  std::vector<int> seats;  // local rank r sits at seats[r]
  std::string reason;      // why there is a new one
  // Where it spans several nodes: how many members each has, in the order of their ranks; which of
  // them this one is; and every member's address by rank, as its "join" event told it, of
  // kMaxAddressBytes at most.
  std::vector<int> local_sizes = {};
  int node = 0;
  std::vector<std::string> addresses = {};
};
inline constexpr std::size_t kMaxAddressBytes = 4096;
// Numbers only grow. at_once: the older ones are over, and waits in them end; else their members
// move on between two steps. Throws Error when the node's arena has no room for the addresses.
void publish(Segment& segment, const Generation& generation, bool at_once);
// Throws Error if what is there is damaged.
std::optional<Generation> newest_generation(Segment& segment);
// Its number + 1; 0: there is none. Cheap.
std::uint64_t generations_published(Segment& segment);
std::uint64_t generations_over(Segment& segment);
// Sleeps, on a seat's bell, until more than `published` have been published, the job was aborted,
// or `timeout` has passed.
void await_generation(Segment& segment, int seat, std::uint64_t published,
                      std::chrono::nanoseconds timeout);
// Until all members of a generation that ends as planned have left its group: one that is not in
// the next may still read of the last call what that one's calls overwrite. Returns as well where
// it is over by now, the job was aborted, or at the deadline.
void await_leavers(Segment& segment, std::span<const int> seats, std::uint64_t generation,
                   const Deadline& deadline);

// The step under way is to be the last.
void request_stop(Segment& segment);
bool stop_requested(Segment& segment);

// How many members the job may have; 0: nobody has said.
struct WorldBounds {
  int least = 0, most = 0;
};
void set_world_bounds(Segment& segment, const WorldBounds& bounds);
WorldBounds world_bounds(Segment& segment);

// True for the first caller in the job's life. `index` below kMaxFaults.
bool claim_fault(Segment& segment, int index);

// What the job keeps in the node's arena, by number: all workers that ask for the same number find
// the same memory, also those that start later.
enum class KeptState : std::uint32_t {
  unfinished,  // who made it has not come to the end
  whole,
  edited,  // being changed in place
};
struct Kept {
  std::span<std::byte> memory;
  KeptState state = KeptState::unfinished;
};
std::optional<Kept> kept(Segment& segment, int number);
// Zeroed, `bytes` large, at a page; unfinished. Made again where an earlier caller did not finish.
// One caller at a time in the job. Throws Error.
std::span<std::byte> keep(Segment& segment, int number, std::size_t bytes, std::string_view what);
void set_kept_state(Segment& segment, int number, KeptState state);

}  // namespace lockstep
