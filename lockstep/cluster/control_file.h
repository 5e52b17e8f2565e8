// Where a running job's control channel is found: control.json, which only its owner can read, in
// the run's folder or, for jobs without one, in a folder of the user's own that is named after the
// job. Written by the agent, gone with the job; one that an agent left behind which was killed is
// known by its process. One thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/cluster/control.h"

namespace lockstep {

inline constexpr const char* kControlFile = "control.json";

struct ControlEntry {
  std::string endpoint, server_public, client_secret;
  std::string host;                 // the node of the agent, as gethostname() tells
  int pid = 0;                      // the agent
  std::uint64_t process_start = 0;  // tells it from a later process of that pid
};
ControlEntry entry_of(const ControlServer& server);  // this process is the agent
ControlTarget target_of(const ControlEntry& entry);  // throws ConfigError
std::string host_name();

std::string format_control_entry(const ControlEntry& entry);
ControlEntry parse_control_entry(std::string_view text);  // throws ConfigError
// Throws ConfigError: it is another user's, open to others, no control file. Error: it cannot be
// read, or is not there.
ControlEntry read_control_entry(const std::filesystem::path& folder);

// Writes control.json whole; removes it at the end, and the folder if it was made for it.
class ControlFile {
 public:
  // In an existing folder.
  ControlFile(const std::filesystem::path& folder, const ControlEntry& entry);
  // In base/ID, made for it; base is as job_base() says.
  static ControlFile in_new_folder(const std::filesystem::path& base, const std::string& id,
                                   const ControlEntry& entry);
  ControlFile(ControlFile&&) = default;
  ControlFile& operator=(ControlFile&&) = delete;
  ~ControlFile();

  // Empty once moved from. What whoever outlives a killed agent has to remove.
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
  bool made_folder_ = false;
};

// XDG_RUNTIME_DIR/lockstep, else (that variable is empty, or names no folder of this user alone)
// TEMPORARY/lockstep-UID.
std::filesystem::path job_base(const std::string& xdg_runtime_dir,
                               const std::filesystem::path& temporary = "/tmp");
// Those below `base` that hold a control.json; none if another user could write there.
std::vector<std::filesystem::path> job_folders(const std::filesystem::path& base);

}  // namespace lockstep
