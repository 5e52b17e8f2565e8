#include "lockstep/tools/snapshot_saver.h"

#include <fmt/format.h>

#include <atomic>
#include <cstring>

#include "lockstep/base/error.h"
#include "lockstep/checkpoint/safetensors.h"
#include "lockstep/observe/append_file.h"

namespace lockstep {
namespace {

// The word that is even while the snapshot behind it is whole. Read by a write that changes
// nothing, which orders it after the reads before it (Boehm, "Can Seqlocks Get Along With
// Programming Language Memory Models?", 2012, section 4).
std::uint64_t sequence_at(const Segment& segment, std::uint64_t offset) {
  const std::span<std::byte> bytes = segment.at(offset, sizeof(std::uint64_t));
  if (reinterpret_cast<std::uintptr_t>(bytes.data()) % alignof(std::uint64_t) != 0)
    throw Error(fmt::format("broken snapshot: its sequence word at {} is not aligned", offset));
  auto* word = reinterpret_cast<std::uint64_t*>(bytes.data());
  return std::atomic_ref(*word).fetch_add(0, std::memory_order_acq_rel);
}

TensorView view_of(const nlohmann::json& tensor, const Segment& segment) {
  const auto& name = tensor.at("dtype").get_ref<const std::string&>();
  const auto dtype = dtype_from_name(name);
  if (!dtype) throw Error("broken snapshot: unknown element type " + name);
  return {tensor.at("name").get<std::string>(), *dtype,
          tensor.at("shape").get<std::vector<std::int64_t>>(),
          segment.at(tensor.at("offset").get<std::uint64_t>(),
                     tensor.at("nbytes").get<std::uint64_t>())};
}

}  // namespace

// A seqlock's reading side: the worker may begin a newer snapshot in the same place meanwhile. Then
// this one is dropped; the newer one's event follows.
void SnapshotSaver::save() {
  if (pending_.is_null()) return;
  const nlohmann::json event = std::exchange(pending_, nullptr);
  const std::uint64_t sequence = event.at("sequence"), offset = event.at("sequence_offset");
  if (sequence % 2 != 0 || sequence_at(*segment_, offset) != sequence) return;
  std::vector<TensorView> tensors;
  std::size_t total = 0;
  for (const nlohmann::json& tensor : event.at("tensors")) {
    tensors.push_back(view_of(tensor, *segment_));
    total += tensors.back().bytes.size();
  }
  std::vector<std::byte> copy(total);
  std::byte* end = copy.data();
  for (TensorView& tensor : tensors) {
    if (!tensor.bytes.empty()) std::memcpy(end, tensor.bytes.data(), tensor.bytes.size());
    tensor.bytes = {end, tensor.bytes.size()};
    end += tensor.bytes.size();
  }
  if (sequence_at(*segment_, offset) != sequence) return;
  sha256_ = with_free_space_note(file_, [&] { return write_safetensors(file_, tensors); });
}

}  // namespace lockstep
