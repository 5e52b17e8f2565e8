// lockstep scale, status, stop and key against an agent that is played by a child process.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "lockstep/base/file.h"
#include "lockstep/cluster/control_file.h"
#include "lockstep/cluster/job_commands.h"
#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

struct Result {
  std::string out, error;
};

template <typename Command>
Result run(Command command, const std::vector<std::string>& arguments) {
  Result result;
  testing::internal::CaptureStdout();
  try {
    command(arguments, Start{});
  } catch (const Error& error) {
    result.error = error.what();
  }
  console().flush(Deadline::never());
  result.out = testing::internal::GetCapturedStdout();
  return result;
}

// A job that takes three questions to get its new workers.
struct Job : ControlHandler {
  JobStatus status() override {
    if (left > 0 && --left == 0 && state.wanted != state.workers) {
      state.workers = state.wanted;
      ++state.generation;
      state.first_step = state.step = *state.step + 5;
    }
    return state;
  }
  void scale(int workers) override {
    state.wanted = workers;
    left = 4;
  }
  void stop() override { stopped = true; }
  JobStatus state;
  int left = 0;
  bool stopped = false;
};

class Scale : public testing::Test {
 protected:
  Scale() {
    std::string name = (fs::temp_directory_path() / "lockstep-scale-XXXXXX").string();
    folder = ::mkdtemp(name.data());
    before = fs::current_path();
    fs::current_path(folder);
    ::setenv("XDG_RUNTIME_DIR", folder.c_str(), 1);
  }
  ~Scale() override {
    for (const int pid : agents) {
      ::kill(pid, SIGKILL);
      ::waitpid(pid, nullptr, 0);
    }
    fs::current_path(before);
    fs::remove_all(folder);
  }

  // Returns once it listens.
  int start_agent(const fs::path& run, const JobStatus& state) {
    int ready[2];
    EXPECT_EQ(::pipe2(ready, O_CLOEXEC), 0);
    const int pid = ::fork();
    if (pid == 0) play_agent(run, state, ready[1]);
    agents.push_back(pid);
    ::close(ready[1]);
    char byte = 0;
    EXPECT_EQ(::read(ready[0], &byte, 1), 1);
    ::close(ready[0]);
    return pid;
  }

  [[noreturn]] static void play_agent(const fs::path& run, const JobStatus& state, int ready) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    {
      Job job;
      job.state = state;
      ControlServer server({});
      const ControlFile file =
          run.has_parent_path()
              ? (fs::create_directories(run), ControlFile(run, entry_of(server)))
              : ControlFile::in_new_folder(job_base(std::getenv("XDG_RUNTIME_DIR")), run,
                                           entry_of(server));
      if (::write(ready, "", 1) != 1) ::_exit(1);
      while (!job.stopped) {
        pollfd watched{server.fd(), POLLIN, 0};
        ::poll(&watched, 1, -1);
        server.handle([&](const ControlRequest& ask, const ControlPeer&) {
          return answer_command(job, ask);
        });
      }
    }
    ::_exit(0);
  }

  fs::path folder, before;
  std::vector<int> agents;
};

const JobStatus kTwo{.workers = 2,
                     .wanted = 2,
                     .least = 1,
                     .most = 4,
                     .generation = 3,
                     .first_step = 100,
                     .step = 112,
                     .reason = ""};

TEST_F(Scale, WaitsUntilTheWorkersAreThere) {
  start_agent("runs/job-1", kTwo);
  Result result = run(scale_command, {"runs/job-1", "3"});
  EXPECT_EQ(result.error, "");
  EXPECT_EQ(result.out, "3 workers from generation 4 on, step 117\n");
  EXPECT_EQ(run(scale_command, {"runs/job-1", "3"}).out, "3 workers already: generation 4\n");
  EXPECT_EQ(run(scale_command, {"runs/job-1/", "1"}).out,
            "1 worker from generation 5 on, step 122\n");
  EXPECT_EQ(run(status_command, {"runs/job-1"}).out, "1 worker, generation 5, step 122 (1 to 4)\n");
  EXPECT_EQ(run(scale_command, {"runs/job-1", "5"}).error,
            "5 workers: this job has 1 to 4; hint: its --workers MIN:MAX says so");
  EXPECT_THAT(
      run(scale_command, {"runs/job-1", "2", "--timeout", "0"}).error,
      HasSubstr("the job runs/job-1 still has 1 worker, generation 5, step 122, aiming at 2"));
}

TEST_F(Scale, ListsTheJobsItFinds) {
  EXPECT_THAT(run(scale_command, {}).out, HasSubstr("no job was found"));
  JobStatus fixed = kTwo;
  fixed.least = fixed.most = 2;
  fixed.step = fixed.first_step = std::nullopt;
  fixed.reason = "rank 1 joined";
  start_agent("run-1", fixed);
  start_agent("runs/job-1", kTwo);
  EXPECT_EQ(run(scale_command, {}).out,
            "run-1  2 workers, generation 3: rank 1 joined\n"
            "runs/job-1  2 workers, generation 3, step 112 (1 to 4)\n");
  EXPECT_THAT(run(scale_command, {"run-1", "3"}).error, HasSubstr("always has 2 workers"));
}

TEST_F(Scale, StopWaitsForTheEnd) {
  const int pid = start_agent("run-1", kTwo);
  EXPECT_EQ(run(stop_command, {"run-1"}).out,
            "the job run-1 (pid " + std::to_string(pid) + ") has ended\n");
  EXPECT_TRUE(fs::is_empty(folder / "lockstep"));
  EXPECT_THAT(run(status_command, {"run-1"}).error,
              AllOf(HasSubstr("there is no job run-1"), HasSubstr("hint:")));
}

TEST_F(Scale, AStoppedAgentIsNamed) {
  const int pid = start_agent("runs/job-1", kTwo);
  ASSERT_EQ(::kill(pid, SIGSTOP), 0);
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, WUNTRACED), pid);
  EXPECT_THAT(run(scale_command, {}).out,
              AllOf(HasSubstr("the job runs/job-1 does not answer: its agent (pid " +
                              std::to_string(pid) + ") is stopped by a signal"),
                    HasSubstr("in time")));
}

TEST_F(Scale, AKilledAgentHasLeftItsFile) {
  const int pid = start_agent("runs/job-1", kTwo);
  ::kill(pid, SIGKILL);
  ::waitpid(pid, nullptr, 0);
  EXPECT_TRUE(fs::exists("runs/job-1/control.json"));
  EXPECT_THAT(run(stop_command, {"runs/job-1"}).error,
              HasSubstr("has ended: its agent (pid " + std::to_string(pid) + ") was killed"));
}

TEST_F(Scale, TheKeyOfAnotherJob) {
  start_agent("runs/job-1", kTwo);
  start_agent("runs/job-2", kTwo);
  ControlEntry mixed = read_control_entry("runs/job-1");
  mixed.client_secret = read_control_entry("runs/job-2").client_secret;
  fs::create_directory("runs/mixed");
  write_private_file("runs/mixed/control.json", format_control_entry(mixed));
  EXPECT_THAT(run(scale_command, {"runs/mixed", "3"}).error, HasSubstr("refuses this key"));
  mixed.server_public = make_curve_pair().public_key;
  write_private_file("runs/mixed/control.json", format_control_entry(mixed));
  EXPECT_THAT(run(stop_command, {"runs/mixed"}).error, HasSubstr("breaks off every handshake"));
  EXPECT_THAT(run(status_command, {"runs/job-1"}).out, HasSubstr("generation 3"));
}

TEST_F(Scale, JobsThatAreNone) {
  EXPECT_THAT(run(scale_command, {"nothing", "3"}).error, HasSubstr("there is no job nothing"));
  EXPECT_THAT(run(scale_command, {"../lockstep", "3"}).error, HasSubstr("there is no job"));
  fs::create_directories("runs/done");
  std::ofstream("runs/done/job.toml") << "";
  EXPECT_THAT(run(scale_command, {"runs/done", "3"}).error,
              HasSubstr("no job is running in runs/done; hint: it has ended"));
  start_agent("runs/job-1", kTwo);
  ::chmod("runs/job-1/control.json", 0644);
  EXPECT_THAT(run(status_command, {"runs/job-1"}).error,
              HasSubstr("runs/job-1/control.json: others than its owner may use it"));
  ::chmod("runs/job-1/control.json", 0600);
  ControlEntry elsewhere = read_control_entry("runs/job-1");
  elsewhere.host = "another-node";
  fs::create_directory("runs/far");
  write_private_file("runs/far/control.json", format_control_entry(elsewhere));
  EXPECT_EQ(run(status_command, {"runs/far"}).error,
            "the job runs/far runs on another-node; hint: run this command there");
}

TEST_F(Scale, Arguments) {
  EXPECT_THAT(run(scale_command, {"job"}).error, HasSubstr("no number of workers given"));
  EXPECT_THAT(run(scale_command, {"job", "0"}).error, HasSubstr("at least 1"));
  EXPECT_THAT(run(scale_command, {"job", "many"}).error, HasSubstr("many"));
  EXPECT_THAT(run(status_command, {}).error, HasSubstr("no job given"));
  EXPECT_THAT(run(stop_command, {}).error, HasSubstr("no job given"));
  EXPECT_THAT(run(key_command, {}).error, HasSubstr("no file given"));
  EXPECT_EQ(run(key_command, {"key"}).error, "");
  EXPECT_EQ(read_control_key("key").client.secret_key.size(), 40u);
  EXPECT_THAT(run(key_command, {"key"}).error, HasSubstr("key exists"));
}

}  // namespace
}  // namespace lockstep
