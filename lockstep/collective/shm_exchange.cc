// What only copies over shared memory: every rank reads from the others what it is to have.
#include <fmt/format.h>

#include <numeric>

#include "lockstep/collective/shm_group.h"

namespace lockstep {

template <typename PieceOf>
void ShmGroup::exchange(const Call& made, std::span<const std::byte> input,
                        const CallOptions& options, PieceOf&& piece_of) {
  Call call = made;
  call.place = place_of(input, size_of(call.dtype));
  call.own = input.size();
  const bool stages = call.place == kNowhere;
  if (stages) stage(input);
  const std::uint64_t bytes = input.empty() ? call.count * size_of(call.dtype) : input.size();
  run(call, options, bytes, [&](const std::vector<CallWords>& calls) {
    std::uint64_t longest = 0;
    std::uint64_t staged = 0;
    for (const CallWords& words : calls) {
      longest = std::max(longest, words[kOwnWord]);
      if (words[kPlaceWord] == kNowhere) staged = std::max(staged, words[kOwnWord]);
    }
    std::vector<Piece> pieces(size_);
    for (int source = 0; source < size_; ++source) {
      pieces[source] = piece_of(source, calls);
      const std::uint64_t theirs = calls[source][kOwnWord];
      if (pieces[source].from > theirs || pieces[source].bytes > theirs - pieces[source].from)
        throw Error(fmt::format("rank {} announced {} bytes, too few for what is read of them",
                                source, theirs));
    }
    // Where all agree on the counts, all know that there is nothing to copy.
    if (longest == 0 && call.operation != Operation::all_to_all_uneven) return;
    for (std::uint64_t offset = 0; offset == 0 || offset < staged; offset += kStagingBytes) {
      if (offset != 0) {
        if (stages && offset < input.size()) stage(input.subspan(offset));
        meeting_.meet();
      }
      copy_pieces(calls, input, offset, pieces);
      meeting_.meet();
    }
  });
}

void ShmGroup::copy_pieces(const std::vector<CallWords>& calls, std::span<const std::byte> input,
                           std::uint64_t offset, const std::vector<Piece>& pieces) const {
  for (int i = 0; i < size_; ++i) {
    const int source = (rank_ + i) % size_;  // not all ranks read from the same one at once
    const Piece& piece = pieces[source];
    const std::uint64_t place = calls[source][kPlaceWord];
    if (piece.bytes == 0) continue;
    if (source == rank_ || place != kNowhere) {
      if (offset != 0) continue;  // read at once
      const std::byte* from = source == rank_ ? input.data() + piece.from
                                              : at(source, place + piece.from, piece.bytes, 1);
      if (from != piece.to) std::memcpy(piece.to, from, piece.bytes);
      continue;
    }
    const std::uint64_t begin = std::max(piece.from, offset);
    const std::uint64_t end = std::min(piece.from + piece.bytes, offset + kStagingBytes);
    if (begin < end)
      std::memcpy(piece.to + (begin - piece.from), stagings_[source] + (begin - offset),
                  end - begin);
  }
}

void ShmGroup::broadcast(std::span<std::byte> data, Dtype dtype, int root,
                         const CallOptions& options) {
  const std::uint64_t count = count_elements(data, dtype, Operation::broadcast);
  check_root(root, size_, Operation::broadcast);
  const Call call{.operation = Operation::broadcast, .dtype = dtype, .root = root, .count = count};
  const auto input = rank_ == root ? data : std::span<std::byte>();
  exchange(call, input, options, [&](int source, const auto&) {
    return source == root ? Piece{0, data.size(), data.data()} : Piece{};
  });
}

void ShmGroup::all_gather(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_gather);
  check_parts(input, output, size_, rank_, Operation::all_gather);
  const Call call{.operation = Operation::all_gather, .dtype = dtype, .count = count};
  exchange(call, input, options, [&](int source, const auto&) {
    return Piece{0, input.size(), output.data() + source * input.size()};
  });
}

void ShmGroup::all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                                 std::span<const std::uint64_t> counts, Dtype dtype,
                                 const CallOptions& options) {
  const UnevenParts parts = check_all_gather_uneven(input, output, counts, dtype, size_, rank_);
  const auto& begins = parts.begins;
  const Call call{.operation = Operation::all_gather_uneven,
                  .dtype = dtype,
                  .count = output.size() / size_of(dtype),
                  .layout = parts.digest};
  exchange(call, input, options, [&](int source, const auto&) {
    return Piece{0, begins[source + 1] - begins[source], output.data() + begins[source]};
  });
}

void ShmGroup::gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::gather);
  check_root(root, size_, Operation::gather);
  if (rank_ == root) check_parts(input, output, size_, rank_, Operation::gather);
  const Call call{.operation = Operation::gather, .dtype = dtype, .root = root, .count = count};
  exchange(call, input, options, [&](int source, const auto&) {
    return rank_ == root ? Piece{0, input.size(), output.data() + source * input.size()} : Piece{};
  });
}

void ShmGroup::scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                       int root, const CallOptions& options) {
  const std::uint64_t count = count_elements(output, dtype, Operation::scatter);
  check_root(root, size_, Operation::scatter);
  if (rank_ == root) check_parts(output, input, size_, rank_, Operation::scatter);
  const Call call{.operation = Operation::scatter, .dtype = dtype, .root = root, .count = count};
  const auto whole = rank_ == root ? input : std::span<const std::byte>();
  exchange(call, whole, options, [&](int source, const auto&) {
    return source == root ? Piece{rank_ * output.size(), output.size(), output.data()} : Piece{};
  });
}

void ShmGroup::all_to_all(std::span<const std::byte> input, std::span<std::byte> output,
                          Dtype dtype, const CallOptions& options) {
  const std::uint64_t count = count_elements(input, dtype, Operation::all_to_all);
  const std::size_t part = check_all_to_all(input, output, dtype, size_);
  const Call call{.operation = Operation::all_to_all, .dtype = dtype, .count = count / size_};
  exchange(call, input, options, [&](int source, const auto&) {
    return Piece{rank_ * part, part, output.data() + source * part};
  });
}

void ShmGroup::all_to_all_uneven(std::span<const std::byte> input,
                                 std::span<const std::uint64_t> input_counts,
                                 std::span<std::byte> output,
                                 std::span<const std::uint64_t> output_counts, Dtype dtype,
                                 const CallOptions& options) {
  constexpr auto kOperation = Operation::all_to_all_uneven;
  check_counts(input_counts, input, dtype, size_, kOperation);
  check_counts(output_counts, output, dtype, size_, kOperation);
  check_apart(input, output, kOperation);
  std::memcpy(counts(rank_), input_counts.data(), input_counts.size_bytes());
  std::byte* next = output.data();
  exchange({.operation = kOperation, .dtype = dtype}, input, options, [&](int source, const auto&) {
    const std::uint64_t* theirs = counts(source);
    if (theirs[rank_] != output_counts[source])
      throw Error(fmt::format("rank {} sends {} elements to rank {}, which expects {}", source,
                              theirs[rank_], rank_, output_counts[source]));
    const Piece piece{std::accumulate(theirs, theirs + rank_, std::uint64_t{0}) * size_of(dtype),
                      output_counts[source] * size_of(dtype), next};
    next += piece.bytes;
    return piece;
  });
}

}  // namespace lockstep
