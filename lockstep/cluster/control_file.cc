#include "lockstep/cluster/control_file.h"

#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/collective/process_state.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

bool is_ours_alone(const fs::path& folder) {
  struct stat status {};  // of the link itself, should it be one
  return ::lstat(folder.c_str(), &status) == 0 && S_ISDIR(status.st_mode) &&
         status.st_uid == ::geteuid() && (status.st_mode & 077) == 0;
}

void make_private_folder(const fs::path& folder) {
  if (::mkdir(folder.c_str(), 0700) != 0 && errno != EEXIST)
    throw Error(fmt::format("cannot make folder {}: {}", folder.string(), errno_text(errno)));
  if (!is_ours_alone(folder))
    throw ConfigError(
        fmt::format("{} is not a folder of this user alone", folder.string()),
        "another user may have made it: have it removed, or set XDG_RUNTIME_DIR to a folder of "
        "yours with mode 0700");
}

bool is_job_id(std::string_view id) {
  return !id.empty() && id.size() <= 128 && id[0] != '.' &&
         std::all_of(id.begin(), id.end(), [](unsigned char c) {
           return std::isalnum(c) != 0 || c == '-' || c == '_' || c == '.';
         });
}

// The channel is TCP alone; ZeroMQ knows other transports, which would open files.
bool is_endpoint(std::string_view text) {
  return text.starts_with("tcp://") && text.size() <= 128 &&
         text.find_first_not_of("0123456789.:", 6) == std::string_view::npos;
}

}  // namespace

std::string host_name() {
  std::array<char, 256> name{};
  ::gethostname(name.data(), name.size() - 1);
  return name.data();
}

ControlEntry entry_of(const ControlServer& server) {
  return {.endpoint = server.endpoint(),
          .server_public = server.key().server.public_key,
          .client_secret = server.key().client.secret_key,
          .host = host_name(),
          .pid = ::getpid(),
          .process_start = process_start_time(::getpid())};
}

ControlTarget target_of(const ControlEntry& entry) {
  return {entry.endpoint, entry.server_public, curve_pair_of(entry.client_secret)};
}

std::string format_control_entry(const ControlEntry& entry) {
  return nlohmann::json{{"lockstep_control", 1},
                        {"endpoint", entry.endpoint},
                        {"server_public", entry.server_public},
                        {"client_secret", entry.client_secret},
                        {"host", entry.host},
                        {"pid", entry.pid},
                        {"process_start", entry.process_start}}
             .dump(1) +
         "\n";
}

ControlEntry parse_control_entry(std::string_view text) {
  const nlohmann::json json = parse_flat_json(text, "lockstep_control");
  const std::uint64_t pid = whole_in(json, "pid");
  ControlEntry entry{.endpoint = text_in(json, "endpoint"),
                     .server_public = text_in(json, "server_public"),
                     .client_secret = text_in(json, "client_secret"),
                     .host = text_in(json, "host"),
                     .pid = 0,
                     .process_start = whole_in(json, "process_start")};
  if (pid == 0 || pid > static_cast<std::uint64_t>(std::numeric_limits<int>::max()))
    throw ConfigError("its 'pid' is none");
  if (!is_endpoint(entry.endpoint)) throw ConfigError("its 'endpoint' is none");
  if (!is_curve_key(entry.server_public) || !is_curve_key(entry.client_secret))
    throw ConfigError("its keys are none");
  entry.pid = static_cast<int>(pid);
  return entry;
}

ControlEntry read_control_entry(const fs::path& folder) {
  const fs::path path = folder / kControlFile;
  try {
    return parse_control_entry(read_private_file(path));
  } catch (const ConfigError& error) {
    throw ConfigError(fmt::format("{}: {}", path.string(), error.what()));
  }
}

ControlFile::ControlFile(const fs::path& folder, const ControlEntry& entry)
    : path_(fs::absolute(folder) / kControlFile) {
  write_private_file(path_, format_control_entry(entry));
}

ControlFile ControlFile::in_new_folder(const fs::path& base, const std::string& id,
                                       const ControlEntry& entry) {
  if (!is_job_id(id))
    throw ConfigError(fmt::format("a job cannot be named '{}'", id),
                      "letters, digits, dots, dashes and underscores");
  make_private_folder(base);
  for (const fs::path& folder : job_folders(base)) {  // what killed agents left
    std::error_code ignored;
    try {
      const ControlEntry old = read_control_entry(folder);
      if (old.host != entry.host || process_state(old.pid, old.process_start) != ProcessState::dead)
        continue;
    } catch (const Error&) {
      continue;  // not ours to judge
    }
    fs::remove(folder / kControlFile, ignored);
    fs::remove(folder, ignored);
  }
  make_private_folder(base / id);
  ControlFile file(base / id, entry);
  file.made_folder_ = true;
  return file;
}

ControlFile::~ControlFile() {
  if (path_.empty()) return;
  std::error_code ignored;
  fs::remove(path_, ignored);
  if (made_folder_) fs::remove(path_.parent_path(), ignored);
}

fs::path job_base(const std::string& xdg_runtime_dir, const fs::path& temporary) {
  if (fs::path(xdg_runtime_dir).is_absolute() && is_ours_alone(xdg_runtime_dir))
    return fs::path(xdg_runtime_dir) / "lockstep";
  return temporary / fmt::format("lockstep-{}", ::geteuid());
}

std::vector<fs::path> job_folders(const fs::path& base) {
  std::vector<fs::path> folders;
  std::error_code error;
  if (!is_ours_alone(base)) return folders;
  for (const fs::directory_entry& entry : fs::directory_iterator(base, error)) {
    std::error_code ignored;
    if (fs::exists(entry.path() / kControlFile, ignored)) folders.push_back(entry.path());
  }
  std::sort(folders.begin(), folders.end());
  return folders;
}

}  // namespace lockstep
