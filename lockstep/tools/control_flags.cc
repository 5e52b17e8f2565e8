#include "lockstep/tools/control_flags.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>

#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

ControlServerOptions options_of(const ControlFlags& flags, int nodes) {
  ControlServerOptions options{.address = flags.address};
  options.most_connections += nodes - 1;
  if (flags.key)
    options.key = flags.key;
  else if (!flags.key_file.empty())
    options.key = read_control_key(flags.key_file);
  return options;
}

ControlFile file_for(const std::filesystem::path& folder, const ControlEntry& entry) {
  if (!folder.empty()) return ControlFile(folder, entry);
  const char* const runtime = std::getenv("XDG_RUNTIME_DIR");
  return ControlFile::in_new_folder(job_base(runtime != nullptr ? runtime : ""),
                                    fmt::format("run-{}", ::getpid()), entry);
}

}  // namespace

void add_control_flags(CLI::App& app, ControlFlags& flags) {
  app.add_option(both_spellings("--control-address"), flags.address,
                 "where lockstep scale, status and stop reach the job")
      ->capture_default_str();
  app.add_option(both_spellings("--key-file"), flags.key_file,
                 "the key of who may (lockstep key FILE); by default the job makes its own");
}

ControlChannel::ControlChannel(const ControlFlags& flags, const std::filesystem::path& folder,
                               int nodes)
    : server_(options_of(flags, nodes)), file_(file_for(folder, entry_of(server_))) {}

}  // namespace lockstep
