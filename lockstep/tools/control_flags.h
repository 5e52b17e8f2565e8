// The control channel of `lockstep train` and `lockstep run`: its flags, and while the job runs its
// server and control.json. One thread.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <optional>
#include <string>

#include "lockstep/cluster/control.h"
#include "lockstep/cluster/control_file.h"

namespace lockstep {

struct ControlFlags {
  std::string address = "127.0.0.1", key_file;
  std::optional<ControlKey> key = {};  // that of key_file, where it can be read only once
};
void add_control_flags(CLI::App& app, ControlFlags& flags);

class ControlChannel {
 public:
  // `folder`: an existing one for control.json; "": a new one of the user's own.
  // `nodes`: that may connect.
  ControlChannel(const ControlFlags& flags, const std::filesystem::path& folder, int nodes = 1);
  ControlServer& server() { return server_; }

 private:
  ControlServer server_;
  ControlFile file_;
};

}  // namespace lockstep
