#include "lockstep/collective/hierarchical_group.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "lockstep/base/error.h"
#include "lockstep/collective/endable.h"
#include "lockstep/collective/group_wrapper.h"

namespace lockstep {
namespace {

constexpr std::size_t kHeaderBytes = sizeof(CallWords) + Tag::kBytes;
constexpr std::size_t kCacheLineBytes = 64;
// Of all ranks, what travels with the calls.
constexpr std::size_t kMostLuggage = 128 << 10;
constexpr std::size_t kTextBytes = 1024;

}  // namespace

HierarchicalGroup::HierarchicalGroup(const NodeGroups& groups, const GroupOptions& options)
    : groups_(groups),
      options_(options),
      node_(groups.node),
      local_rank_(groups.local->rank()),
      local_size_(groups.local->size()),
      nodes_(static_cast<int>(groups.local_sizes.size())),
      carriers_(*std::ranges::min_element(groups.local_sizes)),
      firsts_(groups.local_sizes.size() + 1),
      reachable_(dynamic_cast<Reachable*>(groups.local.get())),
      across_(dynamic_cast<RemoteGroup*>(groups.carriers.get())) {
  LOCKSTEP_CHECK(groups.local_sizes[node_] == local_size_ && carriers_ >= 1 &&
                 (across_ != nullptr) == carries() && (reachable_ != nullptr || local_size_ == 1));
  LOCKSTEP_CHECK(!carries() ||
                 (groups.carriers->rank() == node_ && groups.carriers->size() == nodes_));
  std::partial_sum(groups.local_sizes.begin(), groups.local_sizes.end(), firsts_.begin() + 1);
  rank_ = firsts_[node_] + local_rank_;
  size_ = firsts_.back();
  own_tree_ = std::make_unique<NodeTree>(one_each(size_), firsts_, node_);
}

int HierarchicalGroup::node_of(int rank) const {
  return static_cast<int>(std::ranges::upper_bound(firsts_, rank) - firsts_.begin()) - 1;
}

bool HierarchicalGroup::is_small(std::size_t bytes) const {
  return (bytes + kHeaderBytes) * static_cast<std::size_t>(size_) <= kMostLuggage;
}

GroupStatistics HierarchicalGroup::below() const {
  GroupStatistics sum{.moved = reducer_.moved()};
  const bool apart =
      groups_.everyone != groups_.carriers;  // of nodes of one rank each they are one
  for (const Group* group :
       {groups_.local.get(), groups_.carriers.get(), apart ? groups_.everyone.get() : nullptr})
    if (group != nullptr) {
      sum.moved += group->statistics().moved;
      sum.waiting += group->statistics().waiting;
    }
  return sum;
}

void HierarchicalGroup::guarded(const CallOptions& options, std::uint64_t bytes,
                                const std::function<void()>& body) {
  if (!over_.empty()) throw CommError("this group ended with: " + over_);
  const Clock::time_point began = Clock::now();
  const GroupStatistics before = below();
  call_.tag = options.tag;
  call_.generation = options_.generation;
  inner_tag_ = describe(call_);  // its beginning: what messages of the groups below show
  timeout_ = options.timeout.value_or(options_.timeout);
  try {
    body();
  } catch (const std::exception& error) {
    end_with(error.what());
  }
  const GroupStatistics after = below();
  ++statistics_.operations;
  statistics_.bytes += bytes;
  statistics_.total += Clock::now() - began;
  statistics_.moved += after.moved - before.moved;
  statistics_.waiting += after.waiting - before.waiting;
}

void HierarchicalGroup::end_with(const std::string& message) {
  over_ = fmt::format("rank {}, operation {} of generation {}, {}: {}", rank_, call_.sequence,
                      options_.generation, describe(call_), message);
  for (Group* group : {groups_.local.get(), groups_.carriers.get(), groups_.everyone.get()})
    if (auto* endable = dynamic_cast<Endable*>(group)) endable->end_group(over_);
  throw CommError(over_);
}

void HierarchicalGroup::run(const Call& call, const CallOptions& options, std::uint64_t bytes,
                            const Luggage& luggage, const std::function<void()>& body) {
  call_ = call;
  call_.sequence = next_sequence_++;
  guarded(options, bytes, [&] {
    meet(luggage);
    if (body) body();
  });
}

void HierarchicalGroup::compare(const std::byte* frames, std::size_t frame_bytes,
                                std::string& difference) const {
  std::vector<std::string> texts;
  bool same = true;
  CallWords first{};
  for (int rank = 0; rank < size_; ++rank) {
    const std::byte* const frame = frames + rank * frame_bytes;
    CallWords words;
    std::memcpy(words.data(), frame, sizeof(words));
    if (rank == 0) first = words;
    same &= same_fingerprint(first, words);
    Call call = unpack(words);
    call.tag = std::string_view(reinterpret_cast<const char*>(frame) + sizeof(words), Tag::kBytes);
    texts.push_back(describe(call));
  }
  if (!same) difference = describe_difference(texts);
}

// What the leader tells his node: nothing, or what is wrong; then the answer.
void HierarchicalGroup::meet(const Luggage& luggage) {
  const std::size_t frame_bytes =
      (kHeaderBytes + luggage.room + kCacheLineBytes - 1) / kCacheLineBytes * kCacheLineBytes;
  std::vector<std::byte> frame(frame_bytes);
  const CallWords words = pack(call_);
  std::memcpy(frame.data(), words.data(), sizeof(words));
  std::memcpy(frame.data() + sizeof(words), call_.tag.bytes().data(), Tag::kBytes);
  std::ranges::copy(luggage.payload, frame.begin() + kHeaderBytes);
  const bool leads = local_rank_ == 0;
  std::vector<std::byte> verdict(8 + luggage.answer.size());
  std::string difference;
  if (leads) frames_.resize(std::max(frames_.size(), size_ * frame_bytes));
  const auto part_of = [&](int node) {
    return std::span(frames_).subspan(firsts_[node] * frame_bytes,
                                      groups_.local_sizes[node] * frame_bytes);
  };
  groups_.local->gather(frame, leads ? part_of(node_) : std::span<std::byte>(), Dtype::uint8, 0,
                        inner());
  if (leads) {
    std::vector<std::uint64_t> counts;
    for (const int ranks : groups_.local_sizes) counts.push_back(ranks * frame_bytes);
    groups_.carriers->all_gather_uneven(part_of(node_),
                                        std::span(frames_).first(size_ * frame_bytes), counts,
                                        Dtype::uint8, inner());
    compare(frames_.data(), frame_bytes, difference);
    difference.resize(std::min(difference.size(), kTextBytes));
    const std::uint64_t length = difference.size();
    std::memcpy(verdict.data(), &length, sizeof(length));
    if (length == 0 && luggage.make_answer) {
      Payloads payloads;
      for (int rank = 0; rank < size_; ++rank)
        payloads.push_back(frames_.data() + rank * frame_bytes + kHeaderBytes);
      luggage.make_answer(payloads);
      std::ranges::copy(luggage.answer, verdict.begin() + 8);
    }
  }
  groups_.local->broadcast(verdict, Dtype::uint8, 0, inner());
  std::uint64_t length = 0;
  std::memcpy(&length, verdict.data(), sizeof(length));
  if (length != 0) {
    difference.resize(kTextBytes);
    groups_.local->broadcast(std::as_writable_bytes(std::span(difference)), Dtype::uint8, 0,
                             inner());
    throw CommError(difference.substr(0, length));
  }
  std::copy(verdict.begin() + 8, verdict.end(), luggage.answer.begin());
}

void HierarchicalGroup::barrier(const CallOptions& options) {
  run({.operation = Operation::barrier}, options, 0, {});
}

void HierarchicalGroup::broadcast(std::span<std::byte> data, Dtype dtype, int root,
                                  const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::broadcast);
  check_root(root, size_, Operation::broadcast);
  const Call call{.operation = Operation::broadcast, .dtype = dtype, .root = root, .count = count};
  if (is_small(data.size()))
    return run(call, options, data.size(),
               {.payload = data,
                .room = data.size(),
                .answer = data,
                .make_answer = [&](const Payloads& payloads) {
                  std::copy_n(payloads[root], data.size(), data.begin());
                }});
  run(call, options, data.size(), {}, [&] {
    const int from = node_of(root);
    if (node_ == from) groups_.local->broadcast(data, dtype, root - firsts_[from], inner());
    std::vector<std::uint64_t> counts(local_size_);
    std::span<std::byte> mine;
    for (int carrier = 0; carrier < carriers_; ++carrier) {
      const Slice slice = slice_of({carrier, carrier + 1}, carriers_, count, dtype);
      counts[carrier] = slice.size();
      if (carrier == local_rank_)
        mine = data.subspan(slice.first * size_of(dtype), slice.size() * size_of(dtype));
    }
    if (carries()) groups_.carriers->broadcast(mine, dtype, from, inner());
    if (node_ != from) groups_.local->all_gather_uneven(mine, data, counts, dtype, inner());
  });
}

void HierarchicalGroup::all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                                   Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_gather);
  check_parts(input, output, size_, rank_, Operation::all_gather);
  const Call call{.operation = Operation::all_gather, .dtype = dtype, .count = count};
  if (is_small(input.size()))
    return run(call, options, input.size(),
               {.payload = input,
                .room = input.size(),
                .answer = output,
                .make_answer = [&](const Payloads& payloads) {
                  for (int rank = 0; rank < size_; ++rank)
                    std::copy_n(payloads[rank], input.size(), output.begin() + rank * input.size());
                }});
  run(call, options, input.size(), {},
      [&] { gather_all(input, output, std::vector<std::uint64_t>(size_, count), dtype); });
}

void HierarchicalGroup::all_gather_uneven(std::span<const std::byte> input,
                                          std::span<std::byte> output,
                                          std::span<const std::uint64_t> counts, Dtype dtype,
                                          const CallOptions& options) {
  const UnevenParts parts = check_all_gather_uneven(input, output, counts, dtype, size_, rank_);
  run({.operation = Operation::all_gather_uneven,
       .dtype = dtype,
       .count = output.size() / size_of(dtype),
       .layout = parts.digest},
      options, input.size(), {}, [&] { gather_all(input, output, counts, dtype); });
}

// A node's part of the output, complete on it, is cut into a slice for each carrier. What a carrier
// has from the other nodes lies apart at first.
void HierarchicalGroup::gather_all(std::span<const std::byte> input, std::span<std::byte> output,
                                   std::span<const std::uint64_t> counts, Dtype dtype) {
  std::vector<Slice> parts;  // by node
  for (std::uint64_t next = 0; const int ranks : groups_.local_sizes) {
    const auto theirs = counts.subspan(firsts_[parts.size()], ranks);
    const std::uint64_t end = std::accumulate(theirs.begin(), theirs.end(), next);
    parts.push_back({next, end});
    next = end;
  }
  const std::size_t element = size_of(dtype);
  const auto bytes_of = [&](Slice slice) {
    return output.subspan(slice.first * element, slice.size() * element);
  };
  groups_.local->all_gather_uneven(input, bytes_of(parts[node_]),
                                   counts.subspan(firsts_[node_], local_size_), dtype, inner());
  const auto slice_for = [&](int carrier, int node) {
    const Slice in = slice_of({carrier, carrier + 1}, carriers_, parts[node].size(), dtype);
    return Slice{parts[node].first + in.first, parts[node].first + in.last};
  };
  std::vector<std::uint64_t> of_nodes(nodes_), of_carriers(local_size_);
  std::size_t before = 0;  // where this carrier's begin in everything
  for (int carrier = 0; carrier < carriers_; ++carrier) {
    if (carrier == local_rank_)
      before = std::accumulate(of_carriers.begin(), of_carriers.end(), std::size_t{0});
    for (int node = 0; node < nodes_; ++node) {
      const std::size_t count = slice_for(carrier, node).size();
      of_carriers[carrier] += count;
      if (carrier == local_rank_) of_nodes[node] = count;
    }
  }
  const auto everything = room(packed_, output.size());
  std::span<std::byte> mine;
  if (carries()) {
    mine = everything.subspan(before * element, of_carriers[local_rank_] * element);
    groups_.carriers->all_gather_uneven(bytes_of(slice_for(local_rank_, node_)), mine, of_nodes,
                                        dtype, inner());
  }
  groups_.local->all_gather_uneven(mine, everything, of_carriers, dtype, inner());
  std::size_t next = 0;
  for (int carrier = 0; carrier < carriers_; ++carrier)
    for (int node = 0; node < nodes_; ++node) {
      const auto to = bytes_of(slice_for(carrier, node));
      if (node != node_) std::copy_n(everything.begin() + next, to.size(), to.begin());
      next += to.size();
    }
}

void HierarchicalGroup::gather(std::span<const std::byte> input, std::span<std::byte> output,
                               Dtype dtype, int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::gather);
  check_root(root, size_, Operation::gather);
  if (rank_ == root) check_parts(input, output, size_, rank_, Operation::gather);
  Group& all = everyone();
  run({.operation = Operation::gather, .dtype = dtype, .root = root, .count = count}, options,
      input.size(), {}, [&] { all.gather(input, output, dtype, root, inner()); });
}

void HierarchicalGroup::scatter(std::span<const std::byte> input, std::span<std::byte> output,
                                Dtype dtype, int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::scatter);
  check_root(root, size_, Operation::scatter);
  if (rank_ == root) check_parts(output, input, size_, rank_, Operation::scatter);
  Group& all = everyone();
  run({.operation = Operation::scatter, .dtype = dtype, .root = root, .count = count}, options,
      rank_ == root ? input.size() : output.size(), {},
      [&] { all.scatter(input, output, dtype, root, inner()); });
}

void HierarchicalGroup::all_to_all(std::span<const std::byte> input, std::span<std::byte> output,
                                   Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_to_all);
  check_all_to_all(input, output, dtype, size_);
  Group& all = everyone();
  run({.operation = Operation::all_to_all, .dtype = dtype, .count = count / size_}, options,
      input.size(), {}, [&] { all.all_to_all(input, output, dtype, inner()); });
}

void HierarchicalGroup::all_to_all_uneven(std::span<const std::byte> input,
                                          std::span<const std::uint64_t> input_counts,
                                          std::span<std::byte> output,
                                          std::span<const std::uint64_t> output_counts, Dtype dtype,
                                          const CallOptions& options) {
  constexpr auto kOperation = Operation::all_to_all_uneven;
  check_counts(input_counts, input, dtype, size_, kOperation);
  check_counts(output_counts, output, dtype, size_, kOperation);
  check_apart(input, output, kOperation);
  Group& all = everyone();
  run({.operation = kOperation, .dtype = dtype, .own = input.size()}, options, input.size(), {},
      [&] { all.all_to_all_uneven(input, input_counts, output, output_counts, dtype, inner()); });
}

// Between ranks of one node, over its memory.
void HierarchicalGroup::send(std::span<const std::byte> data, Dtype dtype, int destination,
                             const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::send);
  check_peer(destination, rank_, size_, Operation::send);
  call_ = {.operation = Operation::send, .dtype = dtype, .root = destination, .count = count};
  const bool is_near = node_of(destination) == node_;
  Group& group = is_near ? *groups_.local : everyone();
  guarded(options, data.size(), [&] {
    group.send(data, dtype, is_near ? destination - firsts_[node_] : destination,
               {.tag = options.tag, .timeout = timeout_});
  });
}

void HierarchicalGroup::recv(std::span<std::byte> data, Dtype dtype, int source,
                             const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::recv);
  check_peer(source, rank_, size_, Operation::recv);
  call_ = {.operation = Operation::recv, .dtype = dtype, .root = source, .count = count};
  const bool is_near = node_of(source) == node_;
  Group& group = is_near ? *groups_.local : everyone();
  guarded(options, data.size(), [&] {
    group.recv(data, dtype, is_near ? source - firsts_[node_] : source,
               {.tag = options.tag, .timeout = timeout_});
  });
}

// Groups within a node are the node's, others are those across nodes.
std::unique_ptr<Group> HierarchicalGroup::split(int color, int key, const CallOptions& options) {
  std::vector<std::int32_t> colors(size_);
  const std::int32_t own = color;
  std::unique_ptr<Group> group;
  run({.operation = Operation::split,
       .own = static_cast<std::uint64_t>(color) << 32 | static_cast<std::uint32_t>(key)},
      options, 0,
      {.payload = std::as_bytes(std::span(&own, 1)),
       .room = sizeof(own),
       .answer = std::as_writable_bytes(std::span(colors)),
       .make_answer =
           [&](const Payloads& payloads) {
             for (int rank = 0; rank < size_; ++rank)
               std::memcpy(&colors[rank], payloads[rank], sizeof(own));
           }},
      [&] {
        const auto spans_nodes = [&](int rank) {
          for (int other = 0; other < size_; ++other)
            if (colors[rank] >= 0 && colors[other] == colors[rank] &&
                node_of(other) != node_of(rank))
              return true;
          return false;
        };
        bool any = false;
        for (int rank = 0; rank < size_; ++rank) any |= spans_nodes(rank);
        const bool mine = spans_nodes(rank_);
        group = groups_.local->split(mine ? -1 : color, key, inner());
        if (!any) return;
        auto across = everyone().split(mine ? color : -1, key, inner());
        if (across) group = std::move(across);
      });
  return group;
}

Group& HierarchicalGroup::everyone() const {
  if (!groups_.everyone)
    throw ConfigError("this call between ranks of different nodes needs a group of all ranks",
                      "NodeGroups::everyone");
  return *groups_.everyone;
}

std::unique_ptr<Group> make_hierarchical_group(const NodeGroups& groups,
                                               const GroupOptions& options) {
  // Ranks alone on their nodes have nothing to do but what carriers do.
  if (std::ranges::all_of(groups.local_sizes, [](int size) { return size == 1; }))
    return std::make_unique<GroupWrapper>(groups.carriers);
  return std::make_unique<HierarchicalGroup>(groups, options);
}

}  // namespace lockstep
