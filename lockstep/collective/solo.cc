// The group of one: every collective is the identity, but arguments are checked as elsewhere.
#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/collective/call.h"
#include "lockstep/collective/group.h"
#include "lockstep/memory/available_memory.h"

namespace lockstep {
namespace {

class SoloGroup final : public Group {
 public:
  explicit SoloGroup(const GroupOptions& options) : generation_(options.generation) {}

  int rank() const override { return 0; }
  int size() const override { return 1; }
  std::uint64_t generation() const override { return generation_; }

  void barrier(const CallOptions&) override { count(0); }

  void broadcast(std::span<std::byte> data, Dtype dtype, int root, const CallOptions&) override {
    count_elements(data, dtype, Operation::broadcast);
    check_root(root, 1);
    count(data.size());
  }

  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions&) override {
    count_elements(input, dtype, Operation::all_gather);
    check_gather(input, output, 0, 1);
    copy(input, output);
    count(input.size());
  }

  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction, const CallOptions&) override {
    count_elements(data, dtype, Operation::all_reduce);
    count(data.size());
  }

  void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                       const TreeLayout& layout, const CallOptions&) override {
    count_elements(result, dtype, Operation::tree_all_reduce);
    check_layout(layout, 1);
    check_tree(slots, result, dtype, 1);  // the whole tree is one contribution
    copy(slots.first(result.size()), result);
    count(result.size());
  }

  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    require_memory(bytes, available_memory(), what);
    const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr && rounded != 0)
      throw Error(fmt::format("cannot allocate {} for {}", byte_text(bytes), what));
    memory_.emplace_back(memory);
    if (memory != nullptr) std::memset(memory, 0, rounded);
    return {memory, bytes};
  }

  GroupStatistics statistics() const override { return statistics_; }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };

  static void copy(std::span<const std::byte> from, std::span<std::byte> to) {
    if (!from.empty() && from.data() != to.data())
      std::memmove(to.data(), from.data(), from.size());
  }
  void count(std::uint64_t bytes) {
    ++statistics_.operations;
    statistics_.bytes += bytes;
  }

  const std::uint64_t generation_;
  GroupStatistics statistics_;
  std::vector<std::unique_ptr<std::byte, Free>> memory_;
};

}  // namespace

std::unique_ptr<Group> make_solo_group(const GroupOptions& options) {
  return std::make_unique<SoloGroup>(options);
}

}  // namespace lockstep
