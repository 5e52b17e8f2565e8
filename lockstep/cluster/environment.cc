#include "lockstep/cluster/environment.h"

#include <fmt/format.h>
#include <unistd.h>

#include <charconv>

#include "lockstep/base/error.h"
#include "lockstep/base/numbers.h"

namespace lockstep {
namespace {

// More ranks than any machine has, fewer than arithmetic on them could overflow.
constexpr int kMaxWorldSize = 1 << 20;

const std::string* find(const Environment& environment, std::string_view name) {
  const auto found = environment.find(name);
  return found == environment.end() || found->second.empty() ? nullptr : &found->second;
}

std::string text_or(const Environment& environment, std::string_view name,
                    const std::string& fallback) {
  const std::string* text = find(environment, name);
  return text != nullptr ? *text : fallback;
}

template <typename Integer>
Integer number(const Environment& environment, std::string_view name, Integer lowest,
               Integer highest, std::string_view partner) {
  const std::string* text = find(environment, name);
  if (text == nullptr)
    throw ConfigError(fmt::format("environment: {} is set but {} is not", partner, name),
                      fmt::format("set {} too, or unset {}", name, partner));
  if (const auto value = whole_number(*text, lowest, highest)) return *value;
  throw ConfigError(fmt::format("environment: {}={} is not a whole number from {} to {}", name,
                                *text, lowest, highest));
}

// The four variables that say a process's place, by their names under one launcher.
struct Names {
  std::string_view rank, size, local_rank, local_size;
};

void read_ranks(const Environment& environment, const Names& names, Place& place) {
  place.size = number(environment, names.size, 1, kMaxWorldSize, names.rank);
  place.rank = number(environment, names.rank, 0, kMaxWorldSize, names.size);
  place.local_size = number(environment, names.local_size, 1, kMaxWorldSize, names.rank);
  place.local_rank = number(environment, names.local_rank, 0, kMaxWorldSize, names.rank);
  const auto inside = [](std::string_view name, int rank, std::string_view size_name, int size) {
    if (rank >= size)
      throw ConfigError(fmt::format("environment: {}={} is outside the world: {} is {}", name, rank,
                                    size_name, size));
  };
  inside(names.rank, place.rank, names.size, place.size);
  inside(names.local_rank, place.local_rank, names.local_size, place.local_size);
  if (place.local_size > place.size)
    throw ConfigError(fmt::format("environment: {}={} is larger than {}={}", names.local_size,
                                  place.local_size, names.size, place.size));
}

constexpr Names kTorchrunNames{"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"};

Place lockstep_place(const Environment& environment) {
  Place place{.launcher = Launcher::lockstep};
  read_ranks(environment, kTorchrunNames, place);
  constexpr std::string_view kPartner = "LOCKSTEP_LAUNCHER";
  place.generation =
      number<std::uint64_t>(environment, "LOCKSTEP_GENERATION", 0, ~std::uint64_t{0}, kPartner);
  place.segment_fd = number(environment, "LOCKSTEP_SEGMENT_FD", 3, 1 << 30, kPartner);
  place.event_fd = number(environment, "LOCKSTEP_EVENT_FD", 3, 1 << 30, kPartner);
  if (find(environment, "LOCKSTEP_SEAT") != nullptr)
    place.seat = number(environment, "LOCKSTEP_SEAT", 0, kMaxWorldSize, kPartner);
  return place;
}

Place torchrun_place(const Environment& environment) {
  Place place{.launcher = Launcher::torchrun};
  read_ranks(environment, kTorchrunNames, place);
  // A restarted set of workers is another generation: it must not meet what is left of the last.
  if (find(environment, "TORCHELASTIC_RESTART_COUNT") != nullptr)
    place.generation = number<std::uint64_t>(environment, "TORCHELASTIC_RESTART_COUNT", 0,
                                             ~std::uint64_t{0}, "TORCHELASTIC_RESTART_COUNT");
  place.job_id =
      fmt::format("torchrun.{}.{}.{}", text_or(environment, "TORCHELASTIC_RUN_ID", "none"),
                  text_or(environment, "MASTER_PORT", ""), place.generation);
  return place;
}

// `ids`: the first of them that is set tells jobs apart.
Place mpi_place(Launcher launcher, std::string_view prefix, const Names& names,
                std::initializer_list<const char*> ids, const Environment& environment) {
  Place place{.launcher = launcher};
  read_ranks(environment, names, place);
  for (const char* name : ids)
    if (const std::string* id = find(environment, name); id != nullptr && place.job_id.empty())
      place.job_id = fmt::format("{}.{}", prefix, *id);
  return place;
}

// "2(x3),1" is 2, 2, 2, 1 tasks on the step's nodes in order; this node's entry.
int slurm_local_size(const Environment& environment, std::string_view name) {
  const std::string text = text_or(environment, name, "");
  int node = 0;
  if (find(environment, "SLURM_NODEID") != nullptr)
    node = number(environment, "SLURM_NODEID", 0, kMaxWorldSize, "SLURM_PROCID");
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto bad = [&] {
    return ConfigError(
        fmt::format("environment: {}={} is not a list of tasks per node such as "
                    "2(x3),1 with an entry for node {}",
                    name, text, node));
  };
  for (int first = 0; at != end;) {
    int tasks = 0;
    int repeat = 1;
    auto parsed = std::from_chars(at, end, tasks);
    if (parsed.ec != std::errc() || tasks < 1) throw bad();
    at = parsed.ptr;
    if (std::string_view(at, end).starts_with("(x")) {
      parsed = std::from_chars(at + 2, end, repeat);
      if (parsed.ec != std::errc() || parsed.ptr == end || *parsed.ptr != ')' || repeat < 1)
        throw bad();
      at = parsed.ptr + 1;
    }
    if (node - first < repeat) return tasks;
    first += repeat;
    if (at != end && *at++ != ',') throw bad();
  }
  throw bad();
}

Place slurm_place(const Environment& environment) {
  Place place{.launcher = Launcher::slurm};
  const bool step = find(environment, "SLURM_STEP_NUM_TASKS") != nullptr;
  const std::string_view tasks_name = find(environment, "SLURM_STEP_TASKS_PER_NODE") != nullptr
                                          ? "SLURM_STEP_TASKS_PER_NODE"
                                          : "SLURM_TASKS_PER_NODE";
  Environment with_local_size = environment;
  if (find(environment, tasks_name) != nullptr)
    with_local_size[std::string(tasks_name)] =
        std::to_string(slurm_local_size(environment, tasks_name));
  read_ranks(
      with_local_size,
      {"SLURM_PROCID", step ? "SLURM_STEP_NUM_TASKS" : "SLURM_NTASKS", "SLURM_LOCALID", tasks_name},
      place);
  place.job_id = fmt::format("slurm.{}.{}", text_or(environment, "SLURM_JOB_ID", ""),
                             text_or(environment, "SLURM_STEP_ID", ""));
  return place;
}

}  // namespace

Environment process_environment() {
  Environment environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string_view text = *entry;
    const std::size_t equals = text.find('=');
    if (equals != std::string_view::npos)
      environment.emplace(text.substr(0, equals), text.substr(equals + 1));
  }
  return environment;
}

std::string_view name_of(Launcher launcher) {
  constexpr std::string_view kNames[] = {"no launcher", "lockstep run", "torchrun",
                                         "mpirun",      "mpiexec",      "srun"};
  return kNames[static_cast<int>(launcher)];
}

namespace {

// Launchers nest (`srun torchrun`, mpirun inside a Slurm job, `mpirun lockstep run`): the one that
// is usually inside wins. A batch script's own process has SLURM_PROCID but no SLURM_STEP_ID: it is
// alone.
Place launched_place(const Environment& environment) {
  const auto has = [&](std::string_view name) { return find(environment, name) != nullptr; };
  if (has("LOCKSTEP_LAUNCHER")) return lockstep_place(environment);
  if (has("TORCHELASTIC_RUN_ID") || (has("RANK") && has("WORLD_SIZE") && has("LOCAL_RANK")))
    return torchrun_place(environment);
  if (has("OMPI_COMM_WORLD_RANK") || has("OMPI_COMM_WORLD_SIZE"))
    return mpi_place(Launcher::open_mpi, "open_mpi",
                     {"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK",
                      "OMPI_COMM_WORLD_LOCAL_SIZE"},
                     {"PMIX_NAMESPACE", "OMPI_MCA_orte_ess_jobid", "OMPI_MCA_ess_base_jobid"},
                     environment);
  if (has("PMI_RANK") || has("PMI_SIZE")) {
    // Slurm's own PMI sets these without the local ones.
    if (!has("SLURM_STEP_ID") || has("MPI_LOCALRANKID"))
      return mpi_place(Launcher::pmi, "pmi",
                       {"PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"},
                       {"PMI_JOBID", "PMI_KVSNAME", "PMI_PORT"}, environment);
  }
  if (has("SLURM_PROCID") && has("SLURM_STEP_ID")) return slurm_place(environment);
  if (has("RANK") || has("WORLD_SIZE")) return torchrun_place(environment);
  return Place{};
}

}  // namespace

Place place_from(const Environment& environment) {
  Place place = launched_place(environment);
  if (place.seat >= 0 && find(environment, "GROUP_WORLD_SIZE") != nullptr)
    place.several_nodes =
        number(environment, "GROUP_WORLD_SIZE", 1, kMaxWorldSize, "LOCKSTEP_SEAT") > 1;
  place.engine = text_or(environment, "LOCKSTEP_BACKEND", "");
  place.interface = text_or(environment, "LOCKSTEP_INTERFACE", "");
  place.master = text_or(environment, "MASTER_ADDR", "");
  place.key = text_or(environment, "LOCKSTEP_KEY", "");
  place.trace = text_or(environment, "LOCKSTEP_TRACE", "");
  place.inject = text_or(environment, "LOCKSTEP_INJECT", "");
  return place;
}

}  // namespace lockstep
