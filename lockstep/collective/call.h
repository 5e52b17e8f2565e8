// A call of a collective as its rank announces it in shared memory: the fingerprint that the ranks
// compare, and what messages need to quote it. Values; any thread.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
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
  wait = 16,  // of a CommQueue's owner, for it: recorded, never announced
};

inline constexpr std::uint64_t kNowhere = ~std::uint64_t{0};

// A tensor's name or the like, cut to what the flight recorder keeps; control characters become
// '?'.
class Tag {
 public:
  static constexpr std::size_t kBytes = 32;
  Tag() = default;
  template <typename Text>
  requires std::convertible_to<const Text&, std::string_view> Tag(const Text& text)
      : Tag(std::string_view(text), 0) {}
  std::string_view view() const {
    return {bytes_.data(), static_cast<std::size_t>(std::ranges::find(bytes_, 0) - bytes_.begin())};
  }
  const std::array<char, kBytes>& bytes() const { return bytes_; }
  bool operator==(const Tag&) const = default;

 private:
  Tag(std::string_view text, int) {
    for (std::size_t i = 0; i < std::min(text.size(), kBytes) && text[i] != 0; ++i)
      bytes_[i] = static_cast<unsigned char>(text[i]) < ' ' ? '?' : text[i];
  }
  std::array<char, kBytes> bytes_{};
};

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
  // Where the rank's memory lies in the segment: input or slots, and result. kNowhere: outside it.
  std::uint64_t place = kNowhere;
  std::uint64_t result_place = kNowhere;
  // What ranks need not agree on: the bytes of an input; split: color and key.
  std::uint64_t own = 0;
  std::uint8_t payload = 0;  // bytes of data that lie in the announcement itself
  Tag tag = {};
};

// An announcement: one cache line. The ticket (generation, then sequence number) comes first; the
// first four words are the fingerprint; the places, or the payload instead of them, follow. Tag and
// time are the flight recorder's.
using CallWords = std::array<std::uint64_t, 8>;
inline constexpr int kGenerationShift = 48;
inline constexpr std::size_t kFingerprintWords = 4;
inline constexpr std::size_t kPlaceWord = 4;
inline constexpr std::size_t kResultPlaceWord = 5;
inline constexpr std::size_t kOwnWord = 6;
inline constexpr std::size_t kSplitWord = 7;  // across nodes: the first channel of a new group
inline constexpr std::size_t kPayloadWord = 4;
inline constexpr std::size_t kPayloadBytes = (std::tuple_size_v<CallWords> - kPayloadWord) * 8;
inline std::uint64_t ticket_of(std::uint64_t generation, std::uint64_t sequence) {
  return generation << kGenerationShift | (sequence + 1);
}
CallWords pack(const Call& call);
Call unpack(const CallWords& words);
// Whether two ranks make the same call; memory and payload may differ.
bool same_fingerprint(const CallWords& a, const CallWords& b);

// Whether one is the send and the other the receive of the same message.
bool same_message(const CallWords& a, const CallWords& b);

// "all_reduce(float32 × 10, sum, tag 'a')". Shows any value, also one that no rank could announce.
std::string describe(const Call& call);

// "the ranks' calls differ: ranks 0 and 2 called …, rank 1 called …".
std::string describe_difference(const std::vector<std::string>& calls_by_rank);

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
// Where each rank's part of all_gather_uneven's output begins, in bytes, and the end.
struct UnevenParts {
  std::vector<std::uint64_t> begins;
  std::uint64_t digest = 0;  // of the counts
};
UnevenParts check_all_gather_uneven(std::span<const std::byte> input,
                                    std::span<const std::byte> output,
                                    std::span<const std::uint64_t> counts, Dtype dtype, int size,
                                    int rank);
void check_apart(std::span<const std::byte> input, std::span<const std::byte> output,
                 Operation operation);
// Returns the bytes of one part.
std::size_t check_all_to_all(std::span<const std::byte> input, std::span<const std::byte> output,
                             Dtype dtype, int size);
void check_layout(const TreeLayout& layout, int size);
void check_tree(std::span<const std::byte> slots, std::span<const std::byte> result, Dtype dtype,
                std::size_t contributions);

}  // namespace lockstep
