// A mesh: the ranks of a group as a grid with named axes, each of which is a group, as PyTorch's
// init_device_mesh makes them. Owns the axes' groups; one thread at a time.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/collective/group.h"

namespace lockstep {

class DeviceMesh {
 public:
  // The group of the ranks that differ from this one along that axis alone. Throws ConfigError for
  // a name that no axis has.
  Group& axis(std::string_view name) const { return *groups_[index_of(name)]; }
  // Where this rank is along it.
  int coordinate(std::string_view name) const { return axis(name).rank(); }
  const std::vector<int>& shape() const { return shape_; }
  const std::vector<std::string>& names() const { return names_; }

 private:
  friend DeviceMesh init_device_mesh(Group& group, std::vector<int> shape,
                                     std::vector<std::string> names, const CallOptions& options);
  std::size_t index_of(std::string_view name) const;

  std::vector<int> shape_;
  std::vector<std::string> names_;
  std::vector<std::unique_ptr<Group>> groups_;
};

// Ranks fill the grid row by row: the last axis' neighbours have consecutive ranks. Collective over
// `group`. Throws ConfigError unless the shape has room for exactly its ranks.
DeviceMesh init_device_mesh(Group& group, std::vector<int> shape, std::vector<std::string> names,
                            const CallOptions& options = {});

}  // namespace lockstep
