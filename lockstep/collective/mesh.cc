#include "lockstep/collective/mesh.h"

#include <fmt/format.h>

#include <algorithm>

#include "lockstep/base/error.h"

namespace lockstep {

std::size_t DeviceMesh::index_of(std::string_view name) const {
  const auto found = std::ranges::find(names_, name);
  if (found == names_.end())
    throw ConfigError(fmt::format("the mesh has no axis '{}'", name),
                      fmt::format("{}", fmt::join(names_, ", ")));
  return static_cast<std::size_t>(found - names_.begin());
}

DeviceMesh init_device_mesh(Group& group, std::vector<int> shape, std::vector<std::string> names,
                            const CallOptions& options) {
  if (shape.size() != names.size())
    throw ConfigError(fmt::format("a mesh of {} axes with {} names", shape.size(), names.size()));
  std::int64_t room = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (shape[i] < 1 || std::ranges::count(names, names[i]) != 1)
      throw ConfigError(shape[i] < 1 ? fmt::format("axis '{}' has size {}", names[i], shape[i])
                                     : fmt::format("the mesh has axis '{}' twice", names[i]));
    room = std::min<std::int64_t>(room * shape[i], std::int64_t{1} << 31);
  }
  if (room != group.size())
    throw ConfigError(fmt::format("a mesh of {} has room for {} ranks, the group has {}",
                                  fmt::join(shape, " × "), room, group.size()));
  DeviceMesh mesh;
  for (int stride = group.size(); const int length : shape) {
    stride /= length;
    const int along = group.rank() / stride % length;
    // Who is in the same place along all other axes.
    mesh.groups_.push_back(group.split(group.rank() - along * stride, along, options));
  }
  mesh.shape_ = std::move(shape);
  mesh.names_ = std::move(names);
  return mesh;
}

}  // namespace lockstep
