// What a group without a segment gives its callers: memory of this process, 64-byte aligned and
// zeroed, until the group ends. One thread at a time.
#pragma once

#include <fmt/format.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/memory/available_memory.h"

namespace lockstep {

class PlainMemory {
 public:
  // Throws Error when memory is short.
  std::span<std::byte> allocate(std::size_t bytes, std::string_view what) {
    require_memory(bytes, available_memory(), what);
    const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    auto* memory = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
    if (memory == nullptr && rounded != 0)
      throw Error(fmt::format("cannot allocate {} for {}", byte_text(bytes), what));
    memory_.emplace_back(memory);
    if (memory != nullptr) std::memset(memory, 0, rounded);
    return {memory, bytes};
  }

 private:
  static constexpr std::size_t kAlignment = 64;
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  std::vector<std::unique_ptr<std::byte, Free>> memory_;
};

}  // namespace lockstep
