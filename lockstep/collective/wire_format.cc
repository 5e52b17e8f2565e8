#include "lockstep/collective/wire_format.h"

#include <algorithm>
#include <cstring>

#include "lockstep/base/error.h"
#include "lockstep/collective/call.h"
#include "lockstep/collective/kernels.h"
#include "lockstep/collective/reduce.h"

namespace lockstep {
namespace {

constexpr std::size_t kTile = 1024;  // whole blocks; a few ranks' fit in the first-level cache
static_assert(kTile % kWireBlock == 0);

std::size_t blocks_of(std::size_t count) { return (count + kWireBlock - 1) / kWireBlock; }

// Which values are a rank's to add: whole blocks, so that blocks don't depend on who adds.
struct Part {
  std::size_t first = 0, count = 0;
};
Part part_of(std::size_t count, std::size_t rank, std::size_t ranks) {
  const std::size_t blocks = blocks_of(count);
  const auto begin = [&](std::size_t r) {
    return std::min(count, (blocks / ranks * r + std::min(r, blocks % ranks)) * kWireBlock);
  };
  return {begin(rank), begin(rank + 1) - begin(rank)};
}

class Compressed final : public CompressedGroup {
 public:
  Compressed(std::shared_ptr<Group> group, WireFormat format, const NodeGroups& nodes)
      : CompressedGroup(group), format_(format) {
    const bool even = nodes.local && std::ranges::all_of(nodes.local_sizes, [&](int size) {
                        return size == nodes.local->size();
                      });
    if (even && nodes.local->size() > 1) local_ = nodes.local;
    links_ = even ? nodes.carriers : group;
    LOCKSTEP_CHECK(links_ != nullptr, "a node's ranks that are equally many all carry");
    std::vector<VirtualRange> runs;
    for (int rank = 0; rank < links_->size(); ++rank) runs.push_back({rank, rank + 1});
    plan_ = plan_combination(runs, links_->size());
  }

  Errors& errors() override { return errors_; }

  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                  const CallOptions& options) override {
    const bool sums = reduction == Reduction::sum || reduction == Reduction::mean;
    const std::uint64_t count = count_elements(data, dtype, Operation::all_reduce);
    if (format_ == WireFormat::fp32 || dtype != Dtype::float32 || !sums ||
        count < kLeastCompressed || links_->size() == 1)
      return group_->all_reduce(data, dtype, reduction, options);
    const std::span values(reinterpret_cast<float*>(data.data()), count);
    const std::int64_t divisor = reduction == Reduction::mean ? size() : 1;
    if (!local_) return exchange(values, divisor, options);
    const auto ranks = static_cast<std::size_t>(local_->size());
    std::vector<float> part((count + ranks - 1) / ranks), all(part.size() * ranks);
    std::ranges::copy(values, all.begin());
    local_->reduce_scatter(std::as_bytes(std::span(all)), std::as_writable_bytes(std::span(part)),
                           dtype, Reduction::sum, options);
    exchange(part, divisor, options);
    local_->all_gather(std::as_bytes(std::span(part)), std::as_writable_bytes(std::span(all)),
                       dtype, options);
    std::copy_n(all.begin(), count, values.begin());
  }

 private:
  std::size_t bytes(std::size_t count) const { return wire_bytes(format_, count); }

  void exchange(std::span<float> values, std::int64_t divisor, const CallOptions& options) {
    const auto ranks = static_cast<std::size_t>(links_->size());
    const auto rank = static_cast<std::size_t>(links_->rank());
    const Part mine = part_of(values.size(), rank, ranks);
    std::vector<float> unkept;
    std::vector<float>& error =
        options.tag.empty() ? unkept : errors_.try_emplace(std::string(options.tag)).first->second;
    if (error.size() != values.size() + mine.count) error.assign(values.size() + mine.count, 0);

    std::vector<std::uint64_t> counts(ranks);
    for (std::size_t r = 0; r < ranks; ++r)
      counts[r] = bytes(part_of(values.size(), r, ranks).count);
    wire_.resize(bytes(values.size()));  // parts are whole blocks: one after another, no gaps
    wire_kernels().encode(format_, wire_.data(), values.data(), error.data(), values.size());
    arrived_.resize(ranks * bytes(mine.count));
    links_->all_to_all_uneven(wire_, counts, arrived_,
                              std::vector<std::uint64_t>(ranks, bytes(mine.count)), Dtype::uint8,
                              options);
    sum_.resize(bytes(mine.count));
    add(mine.count, divisor, error.data() + values.size());
    links_->all_gather_uneven(sum_, wire_, counts, Dtype::uint8, options);
    wire_kernels().decode(format_, values.data(), wire_.data(), values.size());
  }

  // sum_ = all ranks' values in arrived_, divided.
  void add(std::size_t count, std::int64_t divisor, float* error) {
    const auto ranks = static_cast<std::size_t>(links_->size());
    std::vector<float> tiles(ranks * kTile);
    std::vector<const std::byte*> slots;
    for (std::size_t r = 0; r < ranks; ++r)
      slots.push_back(reinterpret_cast<const std::byte*>(tiles.data() + r * kTile));
    auto* const total = reinterpret_cast<std::byte*>(tiles.data());
    for (std::size_t first = 0; first < count; first += kTile) {
      const std::size_t length = std::min(kTile, count - first);
      for (std::size_t r = 0; r < ranks; ++r)
        wire_kernels().decode(format_, tiles.data() + r * kTile,
                              arrived_.data() + r * bytes(count) + bytes(first), length);
      reducer_.run({plan_, Dtype::float32, Reduction::sum, false, 0}, slots, {{total}}, 0, length);
      if (divisor != 1) kernels().divide(total, Dtype::float32, divisor, length);
      wire_kernels().encode(format_, sum_.data() + bytes(first), tiles.data(), error + first,
                            length);
    }
  }

  const WireFormat format_;
  std::shared_ptr<Group> local_;  // a node's ranks, which add up first; null: one level
  std::shared_ptr<Group> links_;  // between whom the wire format travels
  CombinePlan plan_;
  Reducer reducer_;
  Errors errors_;
  std::vector<std::byte> wire_, arrived_, sum_;
};

}  // namespace

std::unique_ptr<CompressedGroup> make_compressed_group(std::shared_ptr<Group> group,
                                                       WireFormat format, const NodeGroups& nodes) {
  return std::make_unique<Compressed>(std::move(group), format, nodes);
}

}  // namespace lockstep
