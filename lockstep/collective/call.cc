#include "lockstep/collective/call.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

constexpr std::string_view kNames[] = {"join",       "barrier",    "broadcast",
                                       "all_gather", "all_reduce", "tree_all_reduce"};
constexpr std::string_view kReductions[] = {"sum", "mean", "min", "max", "product"};
constexpr std::size_t kFingerprintWords = 5;
constexpr std::size_t kTagWord = 9;
constexpr std::size_t kMaxTagBytes = (std::tuple_size_v<CallWords> - kTagWord) * 8;

std::string_view name_of(Operation operation) {
  const auto index = static_cast<std::size_t>(operation);
  return index < std::size(kNames) ? kNames[index] : "unknown operation";
}

std::string_view safe_name_of(Dtype dtype) {
  return static_cast<int>(dtype) < kDtypeCount ? lockstep::name_of(dtype) : "unknown dtype";
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
  CallWords words{};
  words[0] = call.sequence;
  words[1] = call.generation;
  words[2] = static_cast<std::uint64_t>(call.operation) |
             static_cast<std::uint64_t>(call.dtype) << 8 |
             static_cast<std::uint64_t>(call.reduction) << 16 |
             static_cast<std::uint64_t>(static_cast<std::uint32_t>(call.root)) << 32;
  words[3] = call.count;
  words[4] = call.layout;
  words[5] = static_cast<std::uint64_t>(call.virtual_ranks);
  words[6] = static_cast<std::uint64_t>(call.started_at_ns);
  words[kPlaceWord] = call.place;
  words[kResultPlaceWord] = call.result_place;
  std::memcpy(&words[kTagWord], call.tag.data(), std::min(call.tag.size(), kMaxTagBytes));
  return words;
}

Call unpack(const CallWords& words) {
  Call call;
  call.sequence = words[0];
  call.generation = words[1];
  call.operation = static_cast<Operation>(words[2] & 0xff);
  call.dtype = static_cast<Dtype>((words[2] >> 8) & 0xff);
  call.reduction = static_cast<Reduction>((words[2] >> 16) & 0xff);
  call.root = static_cast<int>(words[2] >> 32);
  call.count = words[3];
  call.layout = words[4];
  call.virtual_ranks = static_cast<int>(words[5]);
  call.started_at_ns = static_cast<std::int64_t>(words[6]);
  call.place = words[kPlaceWord];
  call.result_place = words[kResultPlaceWord];
  const char* tag = reinterpret_cast<const char*>(&words[kTagWord]);
  call.tag.assign(tag, std::find(tag, tag + kMaxTagBytes, '\0'));
  for (char& byte : call.tag)
    if (static_cast<unsigned char>(byte) < ' ') byte = '?';
  return call;
}

bool same_fingerprint(const CallWords& a, const CallWords& b) {
  return std::equal(a.begin(), a.begin() + kFingerprintWords, b.begin());
}

std::string describe(const Call& call) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (call.operation != Operation::barrier && call.operation != Operation::join)
    add(fmt::format("{} × {}", safe_name_of(call.dtype), call.count));
  if (call.operation == Operation::all_reduce) add(std::string(name_of(call.reduction)));
  if (call.operation == Operation::broadcast) add(fmt::format("root {}", call.root));
  if (call.operation == Operation::tree_all_reduce)
    add(fmt::format("{} virtual ranks, layout {:x}", call.virtual_ranks, call.layout));
  if (!call.tag.empty()) add(fmt::format("tag '{}'", call.tag));
  return fmt::format("{}({})", name_of(call.operation), text);
}

std::uint64_t count_elements(std::span<const std::byte> data, Dtype dtype, Operation operation) {
  if (data.size() % size_of(dtype) != 0)
    throw ConfigError(fmt::format("{}: {} bytes are no whole number of {} elements",
                                  name_of(operation), data.size(), name_of(dtype)));
  return data.size() / size_of(dtype);
}

void check_root(int root, int size) {
  if (root < 0 || root >= size)
    throw ConfigError(fmt::format("broadcast: root {} in a group of {}", root, size));
}

void check_gather(std::span<const std::byte> input, std::span<std::byte> output, int rank,
                  int size) {
  if (checked_multiply(input.size(), static_cast<std::uint64_t>(size)) != output.size())
    throw ConfigError(fmt::format("all_gather: output has {} bytes, {} ranks of {} bytes need {}",
                                  output.size(), size, input.size(), size * input.size()));
  if (overlap(input, output) && input.data() != output.data() + rank * input.size())
    throw ConfigError("all_gather: input overlaps output in another place than its own");
}

void check_layout(const TreeLayout& layout, int size) {
  if (layout.runs.size() != static_cast<std::size_t>(size))
    throw ConfigError(fmt::format("tree_all_reduce: the layout has {} runs for {} ranks",
                                  layout.runs.size(), size));
  int next = 0;
  for (const VirtualRange run : layout.runs) {
    if (run.lo != next || run.hi < run.lo)
      throw ConfigError(fmt::format("tree_all_reduce: run [{}, {}) should begin at virtual rank {}",
                                    run.lo, run.hi, next));
    next = run.hi;
  }
  if (next != layout.virtual_ranks || next < 1)
    throw ConfigError(fmt::format("tree_all_reduce: the runs cover {} of {} virtual ranks", next,
                                  layout.virtual_ranks));
}

void check_tree(std::span<const std::byte> slots, std::span<const std::byte> result, Dtype dtype,
                std::size_t contributions) {
  if (!is_floating_point(dtype))
    throw ConfigError(fmt::format("tree_all_reduce: {} is not floating point", name_of(dtype)));
  const auto needed = checked_multiply(result.size(), contributions);
  if (!needed || *needed > slots.size())
    throw ConfigError(
        fmt::format("tree_all_reduce: {} contributions of {} bytes do not fit in slots of {} bytes",
                    contributions, result.size(), slots.size()));
  if (overlap(slots, result) && slots.data() != result.data())
    throw ConfigError("tree_all_reduce: result overlaps slots, but not at their beginning");
}

}  // namespace lockstep
