// Reductions of memory outside the arenas. The owner of a slice takes its own values from where
// they are; the others bring theirs to their staging buffers, and take the result from its, in
// chunks that stay in the cache. Three things happen to a chunk, with a meeting between them: it is
// brought, reduced, taken. They happen to three chunks at a time, so that one meeting a chunk is
// enough.
#include "lockstep/collective/shm_group.h"

namespace lockstep {
namespace {

// Of one owner's slice: a chunk of all owners, brought and reduced, fits the second-level cache.
constexpr std::size_t kChunkBytes = 64 << 10;

}  // namespace

std::vector<std::span<std::byte>> ShmGroup::slices_of(std::span<std::byte> data,
                                                      Dtype dtype) const {
  std::vector<std::span<std::byte>> slices;
  const std::size_t element = size_of(dtype);
  for (int owner = 0; owner < size_; ++owner) {
    const Slice slice = slice_of({owner, owner + 1}, size_, data.size() / element, dtype);
    slices.push_back(data.subspan(slice.first * element, slice.size() * element));
  }
  return slices;
}

void ShmGroup::reduce_staged(const ReduceJob& job, const StagedSlices& slices) {
  // A staging buffer holds, twice: a chunk for each owner, and the result of one.
  const auto ranks = static_cast<std::size_t>(size_);
  const std::size_t room = kStagingBytes / 2 / (ranks + 1) / kCacheLine * kCacheLine;
  // Where ranks sleep at meetings, fewer of them.
  const std::size_t chunk = meeting_.may_spin() ? std::min(kChunkBytes, room) : room;
  std::size_t longest = 0;
  for (const auto slice : slices.inputs) longest = std::max(longest, slice.size());
  const std::size_t chunks = (longest + chunk - 1) / chunk;
  const auto brought = [&](int rank, std::size_t number, int owner) {
    return stagings_[rank] + (number % 2 * (ranks + 1) + owner) * chunk;
  };
  const auto part = [&](int owner, std::size_t number) {
    const auto slice = slices.inputs[owner];
    const std::size_t begin = std::min(number * chunk, slice.size());
    return slice.subspan(begin, std::min(chunk, slice.size() - begin));
  };

  const std::size_t last = chunks + (slices.anybody_copies ? 2 : 1);
  for (std::size_t step = 0; step < last; ++step) {
    if (step < chunks)
      for (int owner = 0; owner < size_; ++owner)
        if (const auto mine = part(owner, step); owner != rank_ && !mine.empty())
          std::memcpy(brought(rank_, step, owner), mine.data(), mine.size());
    if (const std::size_t number = step - 1; step >= 1 && number < chunks) {
      const auto mine = part(rank_, number);
      for (int rank = 0; rank < size_; ++rank)
        slots_[rank] = rank == rank_ ? mine.data() : brought(rank, number, rank_);
      results_.clear();
      if (slices.result != nullptr) results_.push_back(slices.result + number * chunk);
      if (slices.anybody_copies) results_.push_back(brought(rank_, number, size_));
      reducer_.run(job, slots_, results_, 0, mine.size() / size_of(job.dtype));
    }
    if (const std::size_t number = step - 2; step >= 2 && !slices.copies.empty())
      for (int owner = 0; owner < size_; ++owner)
        if (const auto theirs = part(owner, number); owner != rank_ && !theirs.empty())
          std::memcpy(slices.copies[owner] + number * chunk, brought(owner, number, size_),
                      theirs.size());
    meeting_.meet();  // the last one: nobody uses the staging buffer before all have taken
  }
}

}  // namespace lockstep
