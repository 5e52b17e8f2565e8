// How much memory this process may still take: what the machine has available, or less where a
// control group (a container, a Slurm step) limits it; and the process's own limits. Stateless; any
// thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

namespace lockstep {

struct AvailableMemory {
  std::uint64_t bytes = 0;
  std::string limited_by;  // "this machine" or "the memory limit of control group /x"
};

// Reads /proc and /sys below `root`; tests pass a folder of their own.
AvailableMemory available_memory(const std::filesystem::path& root = "/");
std::uint64_t total_memory();

// Throws Error with the size needed, what is free and a hint unless `needed` fits.
void require_memory(std::uint64_t needed, const AvailableMemory& available, std::string_view what);

// The limits of this process (setrlimit) that a segment of `bytes` meets before it uses any memory.
// The kernel answers the first with a signal that kills; so both are asked beforehand. Throw Error
// with the size needed, what is left and a hint.
void require_file_size(std::uint64_t bytes, std::string_view what);      // RLIMIT_FSIZE
void require_address_space(std::uint64_t bytes, std::string_view what);  // RLIMIT_AS

// "1.50 GiB", "640 bytes".
std::string byte_text(std::uint64_t bytes);

}  // namespace lockstep
