#include "lockstep/collective/remote_group.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "lockstep/base/hash.h"

namespace lockstep {

RemoteGroup::RemoteGroup(std::shared_ptr<RemoteLink> link, std::vector<int> members, int rank,
                         int channel, const GroupOptions& options, const std::string& name)
    : rank_(rank),
      size_(static_cast<int>(members.size())),
      options_(options),
      meeting_(std::move(link), std::move(members), rank, channel, options, name),
      own_tree_(one_each(size_)) {}

template <typename OutOf, typename InOf>
void RemoteGroup::exchange(const Call& made, const CallOptions& options, std::uint64_t bytes,
                           OutOf&& out_of, InOf&& in_of) {
  Parcels parcels(size_);
  Call call = made;
  for (int rank = 0; rank < size_; ++rank) {
    parcels.out[rank] = out_of(rank);
    parcels.in[rank] = in_of(rank);
  }
  run(bytes, [&] {
    meeting_.begin(call, options, parcels);
    const auto from = parcels.out[rank_];
    const auto to = parcels.in[rank_];
    if (!to.empty() && from.data() != to.data()) std::memcpy(to.data(), from.data(), to.size());
    meeting_.carry(parcels);
  });
}

void RemoteGroup::barrier(const CallOptions& options) {
  exchange(
      {.operation = Operation::barrier}, options, 0, [](int) { return std::span<std::byte>(); },
      [](int) { return std::span<std::byte>(); });
}

void RemoteGroup::broadcast(std::span<std::byte> data, Dtype dtype, int root,
                            const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::broadcast);
  check_root(root, size_, Operation::broadcast);
  const Call call{.operation = Operation::broadcast, .dtype = dtype, .root = root, .count = count};
  exchange(
      call, options, data.size(),
      [&](int) { return rank_ == root ? data : std::span<std::byte>(); },
      [&](int rank) { return rank == root ? data : std::span<std::byte>(); });
}

void RemoteGroup::all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                             Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_gather);
  check_parts(input, output, size_, rank_, Operation::all_gather);
  const Call call{.operation = Operation::all_gather, .dtype = dtype, .count = count};
  exchange(
      call, options, input.size(), [&](int) { return input; },
      [&](int rank) { return output.subspan(rank * input.size(), input.size()); });
}

void RemoteGroup::all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                                    std::span<const std::uint64_t> counts, Dtype dtype,
                                    const CallOptions& options) {
  const UnevenParts parts = check_all_gather_uneven(input, output, counts, dtype, size_, rank_);
  exchange(
      {.operation = Operation::all_gather_uneven,
       .dtype = dtype,
       .count = output.size() / size_of(dtype),
       .layout = parts.digest},
      options, input.size(), [&](int) { return input; },
      [&](int rank) {
        return output.subspan(parts.begins[rank], parts.begins[rank + 1] - parts.begins[rank]);
      });
}

void RemoteGroup::gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                         int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::gather);
  check_root(root, size_, Operation::gather);
  if (rank_ == root) check_parts(input, output, size_, rank_, Operation::gather);
  const Call call{.operation = Operation::gather, .dtype = dtype, .root = root, .count = count};
  exchange(
      call, options, input.size(),
      [&](int rank) { return rank == root ? input : std::span<const std::byte>(); },
      [&](int rank) {
        return rank_ == root ? output.subspan(rank * input.size(), input.size())
                             : std::span<std::byte>();
      });
}

void RemoteGroup::scatter(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::scatter);
  check_root(root, size_, Operation::scatter);
  if (rank_ == root) check_parts(output, input, size_, rank_, Operation::scatter);
  const Call call{.operation = Operation::scatter, .dtype = dtype, .root = root, .count = count};
  exchange(
      call, options, rank_ == root ? input.size() : output.size(),
      [&](int rank) {
        return rank_ == root ? input.subspan(rank * output.size(), output.size())
                             : std::span<const std::byte>();
      },
      [&](int rank) { return rank == root ? output : std::span<std::byte>(); });
}

void RemoteGroup::all_to_all(std::span<const std::byte> input, std::span<std::byte> output,
                             Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_to_all);
  const std::size_t part = check_all_to_all(input, output, dtype, size_);
  exchange(
      {.operation = Operation::all_to_all, .dtype = dtype, .count = count / size_}, options,
      input.size(), [&](int rank) { return input.subspan(rank * part, part); },
      [&](int rank) { return output.subspan(rank * part, part); });
}

void RemoteGroup::all_to_all_uneven(std::span<const std::byte> input,
                                    std::span<const std::uint64_t> input_counts,
                                    std::span<std::byte> output,
                                    std::span<const std::uint64_t> output_counts, Dtype dtype,
                                    const CallOptions& options) {
  constexpr auto kOperation = Operation::all_to_all_uneven;
  check_counts(input_counts, input, dtype, size_, kOperation);
  check_counts(output_counts, output, dtype, size_, kOperation);
  check_apart(input, output, kOperation);
  std::size_t read = 0, written = 0;
  exchange(
      {.operation = kOperation, .dtype = dtype, .own = input.size()}, options, input.size(),
      [&](int rank) {
        const std::size_t bytes = input_counts[rank] * size_of(dtype);
        return input.subspan(std::exchange(read, read + bytes), bytes);
      },
      [&](int rank) {
        const std::size_t bytes = output_counts[rank] * size_of(dtype);
        return output.subspan(std::exchange(written, written + bytes), bytes);
      });
}

void RemoteGroup::message(int peer, const Call& call, const CallOptions& options,
                          std::span<const std::byte> out, std::span<std::byte> in) {
  run(out.size() + in.size(), [&] {
    Parcels parcels(size_);
    parcels.out[peer] = out;
    parcels.in[peer] = in;
    meeting_.begin_message(peer, call, options, parcels);
    meeting_.carry(parcels);
  });
}

void RemoteGroup::send(std::span<const std::byte> data, Dtype dtype, int destination,
                       const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::send);
  check_peer(destination, rank_, size_, Operation::send);
  message(destination,
          {.operation = Operation::send, .dtype = dtype, .root = destination, .count = count},
          options, data, {});
}

void RemoteGroup::recv(std::span<std::byte> data, Dtype dtype, int source,
                       const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::recv);
  check_peer(source, rank_, size_, Operation::recv);
  message(source, {.operation = Operation::recv, .dtype = dtype, .root = source, .count = count},
          options, {}, data);
}

std::unique_ptr<Group> RemoteGroup::split(int color, int key, const CallOptions& options) {
  struct Member {
    int key, rank;
  };
  std::vector<Member> chosen;
  int channel = 0;
  run(0, [&] {
    const auto& calls = meeting_.begin(
        {.operation = Operation::split,
         .own = static_cast<std::uint64_t>(color) << 32 | static_cast<std::uint32_t>(key)},
        options, Parcels(size_));
    for (int rank = 0; rank < size_; ++rank) {
      const std::uint64_t own = calls[rank][kOwnWord];
      if (static_cast<std::int32_t>(own >> 32) == color)
        chosen.push_back({static_cast<std::int32_t>(own), rank});
      // One that is free on all ranks, of whatever color: it is the new groups'.
      channel = std::max(
          channel, static_cast<int>(std::min<std::uint64_t>(calls[rank][kSplitWord], 1 << 16)));
    }
  });
  meeting_.link()->next_channel = channel + RemoteMeeting::kChannels;
  if (color < 0) return nullptr;
  std::ranges::stable_sort(chosen, {}, &Member::key);
  std::vector<int> members;
  for (const Member& member : chosen) members.push_back(meeting_.members()[member.rank]);
  const auto self = std::ranges::find(chosen, rank_, &Member::rank) - chosen.begin();
  const std::string name = fmt::format("ranks {}", fmt::join(members, ","));
  return std::make_unique<RemoteGroup>(meeting_.link(), std::move(members), static_cast<int>(self),
                                       channel, options_, name);
}

std::unique_ptr<Group> make_remote_group(std::unique_ptr<Transport> transport,
                                         const GroupOptions& options) {
  auto link = std::make_shared<RemoteLink>(std::move(transport));
  try {
    join_remote(*link, options);
  } catch (const TransportError& error) {
    throw CommError(fmt::format("rank {} cannot join generation {}: {}", link->transport->rank(),
                                options.generation, error.what()));
  }
  std::vector<int> members(link->transport->size());
  std::iota(members.begin(), members.end(), 0);
  const int rank = link->transport->rank();
  const int channel = link->next_channel;
  return std::make_unique<RemoteGroup>(std::move(link), std::move(members), rank, channel, options,
                                       "");
}

}  // namespace lockstep
