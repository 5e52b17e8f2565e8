#include "lockstep/cluster/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

std::string refusal(const Environment& environment) {
  try {
    place_from(environment);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "accepted";
}

Environment lockstep_variables() {
  return {{"RANK", "1"},
          {"WORLD_SIZE", "2"},
          {"LOCAL_RANK", "1"},
          {"LOCAL_WORLD_SIZE", "2"},
          {"LOCKSTEP_LAUNCHER", "lockstep"},
          {"LOCKSTEP_SEGMENT_FD", "7"},
          {"LOCKSTEP_EVENT_FD", "8"},
          {"LOCKSTEP_GENERATION", "3"}};
}

TEST(Environment, AloneWithoutALauncher) {
  const Place place = place_from({{"HOME", "/root"}, {"PATH", "/bin"}});
  EXPECT_EQ(place.launcher, Launcher::alone);
  EXPECT_EQ(place.rank, 0);
  EXPECT_EQ(place.size, 1);
  EXPECT_EQ(place.segment_fd, -1);
}

TEST(Environment, LockstepRun) {
  const Place place = place_from(lockstep_variables());
  EXPECT_EQ(place.launcher, Launcher::lockstep);
  EXPECT_EQ(place.rank, 1);
  EXPECT_EQ(place.local_size, 2);
  EXPECT_EQ(place.generation, 3u);
  EXPECT_EQ(place.segment_fd, 7);
  EXPECT_EQ(place.event_fd, 8);
}

TEST(Environment, LockstepInsideAnotherLauncher) {
  Environment environment = lockstep_variables();
  environment["OMPI_COMM_WORLD_RANK"] = "0";
  environment["SLURM_PROCID"] = "0";
  environment["SLURM_STEP_ID"] = "0";
  EXPECT_EQ(place_from(environment).launcher, Launcher::lockstep);
}

// As torchrun of PyTorch 2.13 sets them.
TEST(Environment, Torchrun) {
  const Place place = place_from({{"RANK", "3"},
                                  {"WORLD_SIZE", "4"},
                                  {"LOCAL_RANK", "3"},
                                  {"LOCAL_WORLD_SIZE", "4"},
                                  {"GROUP_RANK", "0"},
                                  {"GROUP_WORLD_SIZE", "1"},
                                  {"ROLE_NAME", "default"},
                                  {"MASTER_ADDR", "localhost"},
                                  {"MASTER_PORT", "40711"},
                                  {"TORCHELASTIC_RESTART_COUNT", "2"},
                                  {"TORCHELASTIC_MAX_RESTARTS", "3"},
                                  {"TORCHELASTIC_RUN_ID", "b1e2"},
                                  {"SLURM_PROCID", "0"},
                                  {"SLURM_STEP_ID", "0"}});
  EXPECT_EQ(place.launcher, Launcher::torchrun);
  EXPECT_EQ(place.rank, 3);
  EXPECT_EQ(place.generation, 2u);
  EXPECT_EQ(place.job_id, "torchrun.b1e2.40711.2");
}

// As Open MPI 4.1 sets them, inside a Slurm allocation.
TEST(Environment, OpenMpi) {
  const Place place = place_from({{"OMPI_COMM_WORLD_RANK", "1"},
                                  {"OMPI_COMM_WORLD_SIZE", "2"},
                                  {"OMPI_COMM_WORLD_LOCAL_RANK", "1"},
                                  {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"},
                                  {"OMPI_MCA_orte_ess_jobid", "4177526785"},
                                  {"PMIX_NAMESPACE", "4177526785"},
                                  {"PMIX_RANK", "1"},
                                  {"SLURM_PROCID", "0"},
                                  {"SLURM_STEP_ID", "0"},
                                  {"SLURM_NTASKS", "2"}});
  EXPECT_EQ(place.launcher, Launcher::open_mpi);
  EXPECT_EQ(place.rank, 1);
  EXPECT_EQ(place.job_id, "open_mpi.4177526785");
}

// As Hydra (MPICH, Intel MPI) sets them.
TEST(Environment, Pmi) {
  const Place place = place_from({{"PMI_RANK", "0"},
                                  {"PMI_SIZE", "2"},
                                  {"MPI_LOCALRANKID", "0"},
                                  {"MPI_LOCALNRANKS", "2"},
                                  {"PMI_FD", "6"}});
  EXPECT_EQ(place.launcher, Launcher::pmi);
  EXPECT_EQ(place.size, 2);
  EXPECT_EQ(place.job_id, "");
}

// As srun of Slurm 22.05 sets them: 5 tasks over 3 nodes, this one on the second node.
TEST(Environment, Slurm) {
  const Place place = place_from({{"SLURM_PROCID", "3"},
                                  {"SLURM_NTASKS", "9"},
                                  {"SLURM_STEP_NUM_TASKS", "5"},
                                  {"SLURM_LOCALID", "1"},
                                  {"SLURM_NODEID", "1"},
                                  {"SLURM_STEP_TASKS_PER_NODE", "2(x2),1"},
                                  {"SLURM_TASKS_PER_NODE", "3(x3)"},
                                  {"SLURM_JOB_ID", "17"},
                                  {"SLURM_STEP_ID", "4"},
                                  {"PMI_RANK", "3"},
                                  {"PMI_SIZE", "5"}});
  EXPECT_EQ(place.launcher, Launcher::slurm);
  EXPECT_EQ(place.rank, 3);
  EXPECT_EQ(place.size, 5);
  EXPECT_EQ(place.local_rank, 1);
  EXPECT_EQ(place.local_size, 2);
  EXPECT_EQ(place.job_id, "slurm.17.4");
}

TEST(Environment, SlurmBatchScriptIsAlone) {
  EXPECT_EQ(
      place_from({{"SLURM_PROCID", "0"}, {"SLURM_NTASKS", "4"}, {"SLURM_JOB_ID", "17"}}).launcher,
      Launcher::alone);
}

TEST(Environment, SlurmListsThatAreNone) {
  for (const char* list : {"x", "2(x", "2(x3", "2(x0)", "0", "2;1", "2(x1),", "-1", "1"}) {
    const std::string text = refusal({{"SLURM_PROCID", "1"},
                                      {"SLURM_NTASKS", "2"},
                                      {"SLURM_LOCALID", "0"},
                                      {"SLURM_NODEID", "1"},
                                      {"SLURM_TASKS_PER_NODE", list},
                                      {"SLURM_STEP_ID", "0"}});
    EXPECT_THAT(text, testing::HasSubstr("SLURM_TASKS_PER_NODE")) << list;
  }
}

TEST(Environment, NamesTheMissingPartner) {
  EXPECT_EQ(refusal({{"RANK", "1"}}),
            "environment: RANK is set but WORLD_SIZE is not; hint: set WORLD_SIZE too, or unset "
            "RANK");
  EXPECT_THAT(refusal({{"RANK", "1"}, {"WORLD_SIZE", "2"}}),
              testing::HasSubstr("LOCAL_WORLD_SIZE is not"));
  EXPECT_THAT(refusal({{"OMPI_COMM_WORLD_SIZE", "2"}}),
              testing::HasSubstr("OMPI_COMM_WORLD_RANK is not"));
  Environment environment = lockstep_variables();
  environment.erase("LOCKSTEP_SEGMENT_FD");
  EXPECT_THAT(refusal(environment), testing::HasSubstr("LOCKSTEP_SEGMENT_FD is not"));
}

TEST(Environment, RefusesWhatIsNoPlace) {
  const auto with = [](const char* name, const char* value) {
    Environment environment = lockstep_variables();
    environment[name] = value;
    return refusal(environment);
  };
  EXPECT_EQ(with("RANK", "2"), "environment: RANK=2 is outside the world: WORLD_SIZE is 2");
  EXPECT_EQ(with("LOCAL_RANK", "2"),
            "environment: LOCAL_RANK=2 is outside the world: LOCAL_WORLD_SIZE is 2");
  EXPECT_EQ(with("LOCAL_WORLD_SIZE", "3"),
            "environment: LOCAL_WORLD_SIZE=3 is larger than WORLD_SIZE=2");
  for (const char* value : {"-1", "one", "1x", " 1", "1.0", "99999999999999999999"})
    EXPECT_THAT(with("RANK", value), testing::HasSubstr("RANK=")) << value;
  EXPECT_THAT(with("LOCKSTEP_SEGMENT_FD", "1"), testing::HasSubstr("LOCKSTEP_SEGMENT_FD=1"));
  EXPECT_THAT(with("LOCKSTEP_EVENT_FD", "-3"), testing::HasSubstr("LOCKSTEP_EVENT_FD=-3"));
  EXPECT_THAT(with("LOCKSTEP_GENERATION", "-3"), testing::HasSubstr("LOCKSTEP_GENERATION=-3"));
}

}  // namespace
}  // namespace lockstep
