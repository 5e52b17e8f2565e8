#include "lockstep/collective/call.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

constexpr std::string_view kNames[] = {"join",
                                       "barrier",
                                       "broadcast",
                                       "all_gather",
                                       "all_reduce",
                                       "tree_all_reduce",
                                       "reduce",
                                       "reduce_scatter",
                                       "gather",
                                       "scatter",
                                       "all_to_all",
                                       "all_gather_uneven",
                                       "all_to_all_uneven",
                                       "split",
                                       "send",
                                       "recv",
                                       "wait"};
constexpr auto kTree = Operation::tree_all_reduce;
constexpr int kMaxVirtualRanks = 0xffff;  // as the announcement has room for
constexpr std::string_view kReductions[] = {"sum", "mean", "min", "max", "product"};
std::string_view name_of(Operation operation) {
  const auto index = static_cast<std::size_t>(operation);
  return index < std::size(kNames) ? kNames[index] : "unknown operation";
}

std::string_view safe_name_of(Dtype dtype) {
  return static_cast<int>(dtype) < kDtypeCount ? lockstep::name_of(dtype) : "unknown dtype";
}

// "OPERATION: what is wrong with its arguments".
template <typename... Values>
ConfigError wrong(Operation operation, fmt::format_string<Values...> text, Values&&... values) {
  return ConfigError(fmt::format("{}: {}", name_of(operation),
                                 fmt::format(text, std::forward<Values>(values)...)));
}

bool overlap(std::span<const std::byte> a, std::span<const std::byte> b) {
  return !a.empty() && !b.empty() && a.data() < b.data() + b.size() &&
         b.data() < a.data() + a.size();
}

}  // namespace

std::string_view name_of(Reduction reduction) {
  const auto index = static_cast<std::size_t>(reduction);
  return index < std::size(kReductions) ? kReductions[index] : "unknown reduction";
}

CallWords pack(const Call& call) {
  return {ticket_of(call.generation, call.sequence),
          static_cast<std::uint64_t>(call.operation) | static_cast<std::uint64_t>(call.dtype) << 8 |
              static_cast<std::uint64_t>(call.reduction) << 16 |
              static_cast<std::uint64_t>(call.payload) << 24 |
              static_cast<std::uint64_t>(static_cast<std::uint16_t>(call.root)) << 32 |
              static_cast<std::uint64_t>(static_cast<std::uint16_t>(call.virtual_ranks)) << 48,
          call.count,
          call.layout,
          call.place,
          call.result_place,
          call.own,
          0};
}

Call unpack(const CallWords& words) {
  Call call;
  call.sequence = (words[0] & ((std::uint64_t{1} << kGenerationShift) - 1)) - 1;
  call.generation = words[0] >> kGenerationShift;
  call.operation = static_cast<Operation>(words[1] & 0xff);
  call.dtype = static_cast<Dtype>((words[1] >> 8) & 0xff);
  call.reduction = static_cast<Reduction>((words[1] >> 16) & 0xff);
  call.payload = static_cast<std::uint8_t>(words[1] >> 24);
  call.root = static_cast<std::uint16_t>(words[1] >> 32);
  call.virtual_ranks = static_cast<std::uint16_t>(words[1] >> 48);
  call.count = words[2];
  call.layout = words[3];
  if (call.payload != 0) return call;
  call.place = words[kPlaceWord];
  call.result_place = words[kResultPlaceWord];
  call.own = words[kOwnWord];
  return call;
}

bool same_fingerprint(const CallWords& a, const CallWords& b) {
  return std::equal(a.begin(), a.begin() + kFingerprintWords, b.begin());
}

bool same_message(const CallWords& a, const CallWords& b) {
  const Call x = unpack(a), y = unpack(b);
  const bool opposite = (x.operation == Operation::send && y.operation == Operation::recv) ||
                        (x.operation == Operation::recv && y.operation == Operation::send);
  return opposite && x.sequence == y.sequence && x.generation == y.generation &&
         x.dtype == y.dtype && x.count == y.count;
}

std::string describe(const Call& call) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  using enum Operation;
  const Operation operation = call.operation;
  if (operation == split) {
    add(fmt::format("color {}, key {}", static_cast<std::int32_t>(call.own >> 32),
                    static_cast<std::int32_t>(call.own)));
  } else if (operation == all_to_all_uneven) {
    add(fmt::format("{}, {} bytes", safe_name_of(call.dtype), call.own));
  } else if (operation != barrier && operation != join) {
    add(fmt::format("{} × {}", safe_name_of(call.dtype), call.count));
  }
  if (operation == all_reduce || operation == reduce || operation == reduce_scatter)
    add(std::string(name_of(call.reduction)));
  if (operation == broadcast || operation == reduce || operation == gather || operation == scatter)
    add(fmt::format("root {}", call.root));
  if (operation == send) add(fmt::format("to rank {}", call.root));
  if (operation == recv) add(fmt::format("from rank {}", call.root));
  if (operation == all_gather_uneven) add(fmt::format("counts {:x}", call.layout));
  if (operation == tree_all_reduce)
    add(fmt::format("{} virtual ranks, layout {:x}", call.virtual_ranks, call.layout));
  if (!call.tag.view().empty()) add(fmt::format("tag '{}'", call.tag.view()));
  return fmt::format("{}({})", name_of(call.operation), text);
}

std::string describe_difference(const std::vector<std::string>& calls_by_rank) {
  std::vector<std::pair<std::string_view, std::vector<std::size_t>>> groups;  // call, who made it
  for (std::size_t rank = 0; rank < calls_by_rank.size(); ++rank) {
    const std::string& text = calls_by_rank[rank];
    const auto found = std::ranges::find(groups, text, [](const auto& one) { return one.first; });
    if (found != groups.end())
      found->second.push_back(rank);
    else
      groups.push_back({text, {rank}});
  }
  std::string text;
  for (const auto& [call, ranks] : groups)
    text += fmt::format("{}{} {} called {}", text.empty() ? "" : ", ",
                        ranks.size() == 1 ? "rank" : "ranks", fmt::join(ranks, " and "), call);
  return "the ranks' calls differ: " + text;
}

std::uint64_t count_elements(std::span<const std::byte> data, Dtype dtype, Operation operation) {
  if (data.size() % size_of(dtype) != 0)
    throw wrong(operation, "{} bytes are no whole number of {} elements", data.size(),
                name_of(dtype));
  if (reinterpret_cast<std::uintptr_t>(data.data()) % size_of(dtype) != 0)
    throw ConfigError(fmt::format("{}: the memory is not aligned to its {} elements",
                                  name_of(operation), name_of(dtype)),
                      "copy it to memory that is");
  return data.size() / size_of(dtype);
}

void check_root(int root, int size, Operation operation) {
  if (root < 0 || root >= size) throw wrong(operation, "root {} in a group of {}", root, size);
}

void check_peer(int peer, int rank, int size, Operation operation) {
  if (peer < 0 || peer >= size || peer == rank)
    throw wrong(operation, "rank {} names rank {} in a group of {}", rank, peer, size);
}

void check_parts(std::span<const std::byte> part, std::span<const std::byte> whole, int parts,
                 int own, Operation operation) {
  if (checked_multiply(part.size(), static_cast<std::uint64_t>(parts)) != whole.size())
    throw wrong(operation, "the whole has {} bytes, {} parts of {} bytes need {}", whole.size(),
                parts, part.size(), parts * part.size());
  if (overlap(part, whole) && (own < 0 || part.data() != whole.data() + own * part.size()))
    throw wrong(operation, "input and output overlap in another place than a rank's own");
}

void check_counts(std::span<const std::uint64_t> counts, std::span<const std::byte> data,
                  Dtype dtype, int size, Operation operation) {
  if (counts.size() != static_cast<std::size_t>(size))
    throw wrong(operation, "{} counts for {} ranks", counts.size(), size);
  const std::uint64_t elements = count_elements(data, dtype, operation);
  std::uint64_t sum = 0;
  for (const std::uint64_t count : counts) {
    if (count > elements - sum)
      throw wrong(operation, "counts exceed the {} elements given", elements);
    sum += count;
  }
  if (sum != elements) throw wrong(operation, "counts name {} of {} elements given", sum, elements);
}

UnevenParts check_all_gather_uneven(std::span<const std::byte> input,
                                    std::span<const std::byte> output,
                                    std::span<const std::uint64_t> counts, Dtype dtype, int size,
                                    int rank) {
  constexpr auto kOperation = Operation::all_gather_uneven;
  count_elements(output, dtype, kOperation);
  check_counts(counts, output, dtype, size, kOperation);
  UnevenParts parts{.begins = {0}};
  for (const std::uint64_t count : counts) {
    parts.begins.push_back(parts.begins.back() + count * size_of(dtype));
    parts.digest = mix({parts.digest, count});
  }
  const auto own = output.subspan(parts.begins[rank], counts[rank] * size_of(dtype));
  if (input.size() != own.size())
    throw wrong(kOperation, "rank {} has {} bytes, its count says {}", rank, input.size(),
                own.size());
  if (input.data() != own.data()) check_apart(input, output, kOperation);
  return parts;
}

void check_apart(std::span<const std::byte> input, std::span<const std::byte> output,
                 Operation operation) {
  if (overlap(input, output)) throw wrong(operation, "input and output overlap");
}

std::size_t check_all_to_all(std::span<const std::byte> input, std::span<const std::byte> output,
                             Dtype dtype, int size) {
  const std::size_t parts_bytes = size_of(dtype) * static_cast<std::size_t>(size);
  if (input.size() != output.size() || input.size() % parts_bytes != 0)
    throw wrong(Operation::all_to_all, "{} bytes in and {} out are not {} equal parts",
                input.size(), output.size(), size);
  check_apart(input, output, Operation::all_to_all);
  return input.size() / static_cast<std::size_t>(size);
}

void check_layout(const TreeLayout& layout, int size) {
  if (layout.runs.size() != static_cast<std::size_t>(size))
    throw wrong(kTree, "the layout has {} runs for {} ranks", layout.runs.size(), size);
  int next = 0;
  for (const VirtualRange run : layout.runs) {
    if (run.lo != next || run.hi < run.lo)
      throw wrong(kTree, "run [{}, {}) should begin at virtual rank {}", run.lo, run.hi, next);
    next = run.hi;
  }
  if (next > kMaxVirtualRanks)
    throw wrong(kTree, "{} virtual ranks are more than {}", next, kMaxVirtualRanks);
  if (next != layout.virtual_ranks || next < 1)
    throw wrong(kTree, "the runs cover {} of {} virtual ranks", next, layout.virtual_ranks);
}

void check_tree(std::span<const std::byte> slots, std::span<const std::byte> result, Dtype dtype,
                std::size_t contributions) {
  if (!is_floating_point(dtype)) throw wrong(kTree, "{} is not floating point", name_of(dtype));
  const auto needed = checked_multiply(result.size(), contributions);
  if (!needed || *needed > slots.size())
    throw wrong(kTree, "{} contributions of {} bytes do not fit in slots of {} bytes",
                contributions, result.size(), slots.size());
  if (overlap(slots, result) && slots.data() != result.data())
    throw wrong(kTree, "result overlaps slots, but not at their beginning");
}

}  // namespace lockstep
