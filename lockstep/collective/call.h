// A call of a collective as its rank announces it in shared memory: the fingerprint that the ranks
// compare, and what messages need to quote it. Values; any thread.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "lockstep/base/dtype.h"
#include "lockstep/collective/group.h"

namespace lockstep {

// Part of the segment's format: never renumber.
enum class Operation : std::uint8_t {
  join = 0,
  barrier = 1,
  broadcast = 2,
  all_gather = 3,
  all_reduce = 4,
  tree_all_reduce = 5,
  reduce = 6,
  reduce_scatter = 7,
  gather = 8,
  scatter = 9,
  all_to_all = 10,
  all_gather_uneven = 11,
  all_to_all_uneven = 12,
  split = 13,
  send = 14,  // a message, as its sender announces it
  recv = 15,  // the same, as its receiver does
};

inline constexpr std::uint64_t kNowhere = ~std::uint64_t{0};

struct Call {
  Operation operation = Operation::barrier;
  Dtype dtype = Dtype::uint8;
  Reduction reduction = Reduction::sum;
  int root = 0;                // where there is one; send and recv: the other rank
  int virtual_ranks = 0;       // tree_all_reduce alone
  std::uint64_t count = 0;     // elements: of the data, of one part or of the result
  std::uint64_t layout = 0;    // a digest of tree_all_reduce's runs or of the counts
  std::uint64_t sequence = 0;  // 0: join
  std::uint64_t generation = 0;
  std::int64_t started_at_ns = 0;  // monotonic clock
  // Where the rank's memory lies in the segment: input or slots, and result. kNowhere: outside it.
  std::uint64_t place = kNowhere;
  std::uint64_t result_place = kNowhere;
  // What ranks need not agree on: the bytes of an input; split: color and key.
  std::uint64_t own = 0;
  std::string tag = {};
};

using CallWords = std::array<std::uint64_t, 16>;
inline constexpr std::size_t kPlaceWord = 7;
inline constexpr std::size_t kResultPlaceWord = 8;
inline constexpr std::size_t kOwnWord = 9;
CallWords pack(const Call& call);
Call unpack(const CallWords& words);
// Whether two ranks make the same call; memory, times and tags may differ.
bool same_fingerprint(const CallWords& a, const CallWords& b);

// Whether one is the send and the other the receive of the same message.
bool same_message(const CallWords& a, const CallWords& b);

// "all_reduce(float32 × 10, sum, tag 'a')". Shows any value, also one that no rank could announce.
std::string describe(const Call& call);

// Checks of arguments that every backend makes before it announces anything: ConfigError.
std::uint64_t count_elements(std::span<const std::byte> data, Dtype dtype, Operation operation);
void check_root(int root, int size, Operation operation);
void check_peer(int peer, int rank, int size, Operation operation);
// `whole` holds `parts` parts like `part`. They may overlap only where part is number `own`; own
// < 0: nowhere.
void check_parts(std::span<const std::byte> part, std::span<const std::byte> whole, int parts,
                 int own, Operation operation);
// The bytes of all elements that `counts` name, one a rank, which must be those of `data`.
void check_counts(std::span<const std::uint64_t> counts, std::span<const std::byte> data,
                  Dtype dtype, int size, Operation operation);
void check_apart(std::span<const std::byte> input, std::span<const std::byte> output,
                 Operation operation);
// Returns the bytes of one part.
std::size_t check_all_to_all(std::span<const std::byte> input, std::span<const std::byte> output,
                             Dtype dtype, int size);
void check_layout(const TreeLayout& layout, int size);
void check_tree(std::span<const std::byte> slots, std::span<const std::byte> result, Dtype dtype,
                std::size_t contributions);

}  // namespace lockstep
