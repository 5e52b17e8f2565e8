#include "lockstep/train/snapshot.h"

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <nlohmann/json.hpp>

#include "lockstep/bridge/dtypes.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"

namespace lockstep {
namespace {
constexpr std::size_t kAlignment = 64;
}

Snapshots::Snapshots(const World& world, const std::vector<NamedTensor>& tensors)
    : world_(world), tensors_(tensors) {
  if (!world.has_agent() || world.rank() != 0) return;
  std::size_t bytes = kAlignment;  // the sequence word
  for (const NamedTensor& named : tensors_) {
    offsets_.push_back(bytes);
    bytes += (named.tensor.nbytes() + kAlignment - 1) / kAlignment * kAlignment;
  }
  for (const char* name : {"a snapshot of the model", "another snapshot of the model"}) {
    areas_.push_back(world.lasting(name, bytes));
    // The numbers of earlier generations are not used again: the agent may still be reading one.
    std::uint64_t last;
    std::memcpy(&last, areas_.back().data(), sizeof last);
    writes_ = std::max(writes_, (last + 1) / 2);
  }
}

void Snapshots::write(std::int64_t epoch) {
  if (areas_.empty()) return;
  const std::span<std::byte> area = areas_[writes_ % areas_.size()];
  const std::uint64_t sequence = 2 * ++writes_;
  std::atomic_ref<std::uint64_t> word(*reinterpret_cast<std::uint64_t*>(area.data()));
  word.store(sequence - 1, std::memory_order_relaxed);
  std::atomic_thread_fence(std::memory_order_release);
  nlohmann::json list = nlohmann::json::array();
  for (std::size_t i = 0; i < tensors_.size(); ++i) {
    const at::Tensor& tensor = tensors_[i].tensor;
    std::byte* home = area.data() + offsets_[i];
    std::memcpy(home, tensor.const_data_ptr(), tensor.nbytes());
    list.push_back({{"name", tensors_[i].name},
                    {"dtype", name_of(dtype_from(tensor.scalar_type()).value())},
                    {"shape", tensor.sizes().vec()},
                    {"offset", world_.segment()->offset_of(home)},
                    {"nbytes", tensor.nbytes()}});
  }
  word.store(sequence, std::memory_order_release);
  world_.events().emit({{"event", "snapshot"},
                        {"epoch", epoch},
                        {"sequence", sequence},
                        {"sequence_offset", world_.segment()->offset_of(area.data())},
                        {"tensors", std::move(list)}});
}

}  // namespace lockstep
