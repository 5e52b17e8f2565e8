// What `lockstep doctor` looks at on a machine, and what it says of it: facts are read in one
// place, findings follow from facts alone. Values and free functions; any thread.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/cluster/environment.h"
#include "lockstep/memory/available_memory.h"
#include "lockstep/transport/transport.h"

namespace lockstep {

enum class Verdict : std::uint8_t { ok, warning, error };
NLOHMANN_JSON_SERIALIZE_ENUM(Verdict, {{Verdict::error, "error"},  // and what is none
                                       {Verdict::warning, "warning"},
                                       {Verdict::ok, "ok"}})
std::string_view name_of(Verdict verdict);

struct Finding {
  Verdict verdict = Verdict::ok;
  std::string subject, text;
  std::string hint = {};  // what to do about it; "" where all is well
  bool operator==(const Finding&) const = default;
};
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Finding, verdict, subject, text, hint)

// What another node sent. Throws Error: it is none.
template <typename T>
T received(const nlohmann::json& json) {
  try {
    return json.get<T>();
  } catch (const nlohmann::json::exception&) {
    throw Error("a node sent a report that is none");
  }
}

struct NetworkInterface {
  std::string name, address;  // IPv4
  int megabits_per_s = 0;     // 0: it doesn't say
};

// What can be known of a machine without asking another. Limits: UINT64_MAX for none.
struct Facts {
  std::string lockstep, libtorch, c_library;  // versions
  std::string host, kernel, processor, instruction_set;
  int cores = 1, all_cores = 1;  // this process's, the machine's
  double core_quota = 0;         // of the control group; 0: none
  std::uint64_t memory = 0;
  AvailableMemory available_memory;
  std::uint64_t open_files = 0, processes = 0, locked_memory = 0;
  std::uint64_t shm_folder = 0;      // bytes of /dev/shm
  std::string shmem_huge_pages;      // "advise"; "" where the kernel has none
  std::string no_segment, no_pidfd;  // why a job's shared memory, or pidfds, can't be had; ""
  std::string clock_source;
  bool clock_synchronised = false;
  std::vector<NetworkInterface> interfaces;  // up, not loopback
  std::string used_interface, why_used;      // "" and why there is none
  std::vector<std::string> rdma_devices, gpus;
  std::map<std::string, std::string> engines;       // name: why it can't be had; "": it can
  std::map<std::string, std::string> code_choices;  // variables that choose among code paths
  bool has_worker = false;                          // lockstep-worker is there
};

// `root`: of /proc and /sys; tests pass a folder of their own. `options`: of the engine that will
// have to choose an interface.
Facts read_facts(const std::filesystem::path& root, const Environment& environment,
                 const EndpointOptions& options);
std::vector<Finding> findings_of(const Facts& facts);

// What must be the same on all nodes of a job that is to be exact, by name.
using Traits = std::map<std::string, std::string>;
Traits traits_of(const Facts& facts);
// What differs, named with the nodes of each kind. `traits`: by node.
std::vector<Finding> differences(std::span<const Traits> traits);

std::string text_of(std::span<const Finding> findings);  // a line each, hints below

}  // namespace lockstep
