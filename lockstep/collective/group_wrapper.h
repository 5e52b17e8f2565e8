// A group that hands every call on to another: what wraps a group overrides what it changes.
//
// Owner: shares the group that it wraps. Threads: as for that group.
#pragma once

#include <memory>
#include <utility>

#include "lockstep/collective/group.h"

namespace lockstep {

class GroupWrapper : public Group {
 public:
  explicit GroupWrapper(std::shared_ptr<Group> group) : group_(std::move(group)) {}

  int rank() const override { return group_->rank(); }
  int size() const override { return group_->size(); }
  std::uint64_t generation() const override { return group_->generation(); }
  void barrier(const CallOptions& options = {}) override { group_->barrier(options); }
  void broadcast(std::span<std::byte> data, Dtype dtype, int root,
                 const CallOptions& options = {}) override {
    group_->broadcast(data, dtype, root, options);
  }
  void all_gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options = {}) override {
    group_->all_gather(input, output, dtype, options);
  }
  void all_gather_uneven(std::span<const std::byte> input, std::span<std::byte> output,
                         std::span<const std::uint64_t> counts, Dtype dtype,
                         const CallOptions& options = {}) override {
    group_->all_gather_uneven(input, output, counts, dtype, options);
  }
  void gather(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
              const CallOptions& options = {}) override {
    group_->gather(input, output, dtype, root, options);
  }
  void scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype, int root,
               const CallOptions& options = {}) override {
    group_->scatter(input, output, dtype, root, options);
  }
  void all_to_all(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                  const CallOptions& options = {}) override {
    group_->all_to_all(input, output, dtype, options);
  }
  void all_to_all_uneven(std::span<const std::byte> input,
                         std::span<const std::uint64_t> input_counts, std::span<std::byte> output,
                         std::span<const std::uint64_t> output_counts, Dtype dtype,
                         const CallOptions& options = {}) override {
    group_->all_to_all_uneven(input, input_counts, output, output_counts, dtype, options);
  }
  void all_reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction,
                  const CallOptions& options = {}) override {
    group_->all_reduce(data, dtype, reduction, options);
  }
  void reduce(std::span<std::byte> data, Dtype dtype, Reduction reduction, int root,
              const CallOptions& options = {}) override {
    group_->reduce(data, dtype, reduction, root, options);
  }
  void reduce_scatter(std::span<const std::byte> input, std::span<std::byte> output, Dtype dtype,
                      Reduction reduction, const CallOptions& options = {}) override {
    group_->reduce_scatter(input, output, dtype, reduction, options);
  }
  void tree_all_reduce(std::span<std::byte> slots, std::span<std::byte> result, Dtype dtype,
                       const TreeLayout& layout, const CallOptions& options = {}) override {
    group_->tree_all_reduce(slots, result, dtype, layout, options);
  }
  void send(std::span<const std::byte> data, Dtype dtype, int destination,
            const CallOptions& options = {}) override {
    group_->send(data, dtype, destination, options);
  }
  void recv(std::span<std::byte> data, Dtype dtype, int source,
            const CallOptions& options = {}) override {
    group_->recv(data, dtype, source, options);
  }
  std::unique_ptr<Group> split(int color, int key, const CallOptions& options = {}) override {
    return group_->split(color, key, options);
  }
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) override {
    return group_->allocate(bytes, what);
  }
  GroupStatistics statistics() const override { return group_->statistics(); }

 protected:
  const std::shared_ptr<Group> group_;
};

}  // namespace lockstep
