// The group of one: every collective is the identity, but arguments are checked as elsewhere.
#include <fmt/format.h>

#include <cstring>
#include <memory>

#include "lockstep/base/error.h"
#include "lockstep/collective/call.h"
#include "lockstep/collective/group.h"
#include "lockstep/collective/plain_memory.h"

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
    check_root(root, 1, Operation::broadcast);
    count(data.size());
  }

  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions&) override {
    copy_part(input, output, dtype, 0, Operation::all_gather);
  }
  void all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                         std::span<const std::uint64_t> counts, Dtype dtype,
                         const CallOptions&) override {
    check_counts(counts, output, dtype, 1, Operation::all_gather_uneven);
    copy_part(input, output, dtype, 0, Operation::all_gather_uneven);
  }
  void gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
              const CallOptions&) override {
    check_root(root, 1, Operation::gather);
    copy_part(input, output, dtype, 0, Operation::gather);
  }
  void scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
               const CallOptions&) override {
    check_root(root, 1, Operation::scatter);
    copy_part(input, output, dtype, 0, Operation::scatter);
  }
  void all_to_all(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions&) override {
    check_all_to_all(input, output, dtype, 1);
    copy_part(input, output, dtype, -1, Operation::all_to_all);
  }
  void all_to_all_uneven(std::span<const std::byte> input,
                         std::span<const std::uint64_t> input_counts, std::span<std::byte> output,
                         std::span<const std::uint64_t> output_counts, Dtype dtype,
                         const CallOptions&) override {
    check_counts(input_counts, input, dtype, 1, Operation::all_to_all_uneven);
    check_counts(output_counts, output, dtype, 1, Operation::all_to_all_uneven);
    copy_part(input, output, dtype, -1, Operation::all_to_all_uneven);
  }

  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction, const CallOptions&) override {
    count_elements(data, dtype, Operation::all_reduce);
    count(data.size());
  }
  void reduce(std::span<std::byte> data, Dtype dtype, Reduction, int root,
              const CallOptions&) override {
    count_elements(data, dtype, Operation::reduce);
    check_root(root, 1, Operation::reduce);
    count(data.size());
  }
  void reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      Reduction, const CallOptions&) override {
    copy_part(input, output, dtype, -1, Operation::reduce_scatter);
  }

  // Nobody else is there: every rank named is wrong.
  void send(std::span<const std::byte> data, Dtype dtype, int destination,
            const CallOptions&) override {
    count_elements(data, dtype, Operation::send);
    check_peer(destination, 0, 1, Operation::send);
  }
  void recv(std::span<std::byte> data, Dtype dtype, int source, const CallOptions&) override {
    count_elements(data, dtype, Operation::recv);
    check_peer(source, 0, 1, Operation::recv);
  }

  std::unique_ptr<Group> split(int color, int, const CallOptions&) override {
    count(0);
    return color < 0 ? nullptr : make_solo_group({.generation = generation_});
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
    return memory_.allocate(bytes, what);
  }

  GroupStatistics statistics() const override { return statistics_; }

 private:
  // own: whether the two may be the same memory (0) or must lie apart (-1).
  void copy_part(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                 int own, Operation operation) {
    count_elements(input, dtype, operation);
    check_parts(input, output, 1, own, operation);
    copy(input, output);
    count(input.size());
  }
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
  PlainMemory memory_;
};

}  // namespace

std::unique_ptr<Group> make_solo_group(const GroupOptions& options) {
  return std::make_unique<SoloGroup>(options);
}

}  // namespace lockstep
