// The environment contract: who launched this process and what its place is. Pure: reads a map, not
// the process. Understood: lockstep run and torchrun (RANK, WORLD_SIZE, LOCAL_RANK,
// LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), Open MPI (OMPI_COMM_WORLD_*), MPICH/PMI (PMI_RANK,
// PMI_SIZE, MPI_LOCALRANKID, MPI_LOCALNRANKS), Slurm (SLURM_PROCID, SLURM_NTASKS, SLURM_LOCALID,
// SLURM_STEP_TASKS_PER_NODE …); none of them: alone, a world of one.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>

namespace lockstep {

using Environment = std::map<std::string, std::string, std::less<>>;
Environment process_environment();

enum class Launcher { alone, lockstep, torchrun, open_mpi, pmi, slurm };
std::string_view name_of(Launcher launcher);

struct Place {
  Launcher launcher = Launcher::alone;
  int rank = 0;
  int size = 1;
  int local_rank = 0;
  int local_size = 1;
  std::uint64_t generation = 0;
  int segment_fd = -1;      // lockstep: the inherited segment
  int seat = -1;            // lockstep: its place there, where members change; else its local rank
  int event_fd = -1;        // lockstep: the pipe to the agent
  std::string job_id = {};  // names the rendezvous on this node where no segment is inherited
  bool several_nodes = false;  // lockstep: the job may span them (GROUP_WORLD_SIZE)
  std::string engine = {};     // LOCKSTEP_BACKEND: "ucx", "zmq", "mpi"; "": the first there is
  std::string interface = {};  // LOCKSTEP_INTERFACE; "": the one that leads to MASTER_ADDR
  std::string master = {};     // MASTER_ADDR
  std::string key = {};        // LOCKSTEP_KEY: the job's secret
  std::string trace = {};      // LOCKSTEP_TRACE: the file, "" for none
  std::string inject = {};     // LOCKSTEP_INJECT: faults (faults.h), "" for none
};

// Throws ConfigError naming the variable: missing partner, not a number, rank outside the world,
// descriptor that is not one.
Place place_from(const Environment& environment);

}  // namespace lockstep
