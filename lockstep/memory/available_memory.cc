#include "lockstep/memory/available_memory.h"

#include <fmt/format.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <optional>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
constexpr auto kUnlimited = std::numeric_limits<std::uint64_t>::max();

std::string text_or_empty(const fs::path& path) {
  try {
    return read_text_file(path);
  } catch (const Error&) {
    return "";  // not there, or not ours to read: no limit known from it
  }
}

std::optional<std::uint64_t> leading_number(std::string_view text) {
  const auto first = text.find_first_not_of(" \t");
  if (first == text.npos) return std::nullopt;
  std::uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data() + first, text.data() + text.size(), value);
  return error == std::errc() ? std::optional(value) : std::nullopt;
}

// The number after `key` at the start of a line; as in "MemAvailable:   123 kB".
std::optional<std::uint64_t> number_of_line(const std::string& text, std::string_view key) {
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with(key)) return leading_number(std::string_view(line).substr(key.size()));
  return std::nullopt;
}

// The names under which the two versions of control groups show the same facts.
struct CgroupFiles {
  const char* mount;
  const char* limit;
  const char* usage;
  const char* reclaimable;
};
constexpr CgroupFiles kVersion1{"sys/fs/cgroup/memory", "memory.limit_in_bytes",
                                "memory.usage_in_bytes", "total_inactive_file "};
constexpr CgroupFiles kVersion2{"sys/fs/cgroup", "memory.max", "memory.current", "inactive_file "};

// What is left in the group, with the page cache that the kernel would give up counted as free.
std::uint64_t left_in(const fs::path& folder, const CgroupFiles& files) {
  const auto limit = leading_number(text_or_empty(folder / files.limit));  // nothing for "max"
  const auto usage = leading_number(text_or_empty(folder / files.usage));
  if (!limit || !usage) return kUnlimited;
  const auto cache =
      number_of_line(text_or_empty(folder / "memory.stat"), files.reclaimable).value_or(0);
  const std::uint64_t used = *usage - std::min(*usage, cache);
  return *limit - std::min(*limit, used);
}

// A limit holds for everything below it, so every group from ours up to the root counts. Inside a
// container the path may name folders that are not visible: then only the visible ones count.
void apply_limits(const fs::path& root, const CgroupFiles& files, const fs::path& group,
                  AvailableMemory& available) {
  for (fs::path path = group.relative_path();; path = path.parent_path()) {
    const std::uint64_t left = left_in(root / files.mount / path, files);
    if (left < available.bytes)
      available = {left, "the memory limit of control group /" + path.string()};
    if (path.empty()) return;
  }
}

struct ProcessLimit {
  __rlimit_resource resource;
  const char* name;
  const char* hint;
};

void require_within(const ProcessLimit& limit, std::uint64_t used, std::uint64_t needed,
                    std::string_view what) {
  rlimit found{};
  if (::getrlimit(limit.resource, &found) != 0 || found.rlim_cur == RLIM_INFINITY) return;
  const std::uint64_t left = found.rlim_cur - std::min<std::uint64_t>(found.rlim_cur, used);
  if (needed <= left) return;
  throw Error(fmt::format("no room for {}: {} needed, {} left of this process's {} of {}; hint: {}",
                          what, byte_text(needed), byte_text(left), limit.name,
                          byte_text(found.rlim_cur), limit.hint));
}

}  // namespace

AvailableMemory available_memory(const fs::path& root) {
  AvailableMemory available{kUnlimited, "this machine"};
  if (const auto kilobytes = number_of_line(text_or_empty(root / "proc/meminfo"), "MemAvailable:"))
    available.bytes = *kilobytes * 1024;
  // Lines are "0::/path" (version 2) or "4:memory:/path" (version 1).
  std::istringstream lines(text_or_empty(root / "proc/self/cgroup"));
  for (std::string line; std::getline(lines, line);) {
    const auto first = line.find(':');
    const auto second = first == line.npos ? line.npos : line.find(':', first + 1);
    if (second == line.npos) continue;
    const std::string controllers = fmt::format(",{},", line.substr(first + 1, second - first - 1));
    const std::string group = line.substr(second + 1);
    if (controllers == ",,") apply_limits(root, kVersion2, group, available);
    if (controllers.find(",memory,") != controllers.npos)
      apply_limits(root, kVersion1, group, available);
  }
  return available;
}

std::uint64_t total_memory() {
  return static_cast<std::uint64_t>(::sysconf(_SC_PHYS_PAGES)) *
         static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
}

void require_memory(std::uint64_t needed, const AvailableMemory& available, std::string_view what) {
  if (needed <= available.bytes) return;
  throw Error(
      fmt::format("not enough memory for {}: {} needed, {} free (limited by {}); hint: fewer "
                  "workers, a smaller "
                  "model or batch, or more memory",
                  what, byte_text(needed), byte_text(available.bytes), available.limited_by));
}

void require_file_size(std::uint64_t bytes, std::string_view what) {
  require_within({RLIMIT_FSIZE, "largest file size (RLIMIT_FSIZE)", "ulimit -f unlimited"}, 0,
                 bytes, what);
}

void require_address_space(std::uint64_t bytes, std::string_view what) {
  const auto pages = leading_number(text_or_empty("/proc/self/statm")).value_or(0);
  const auto used = pages * static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
  require_within({RLIMIT_AS, "address space (RLIMIT_AS)", "ulimit -v unlimited"}, used, bytes,
                 what);
}

std::string byte_text(std::uint64_t bytes) {
  constexpr const char* kUnits[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
  if (bytes < 1024) return fmt::format("{} bytes", bytes);
  double value = static_cast<double>(bytes) / 1024;
  std::size_t unit = 0;
  for (; value >= 1024 && unit + 1 < std::size(kUnits); ++unit) value /= 1024;
  return fmt::format("{:.2f} {}", value, kUnits[unit]);
}

}  // namespace lockstep
