#include "lockstep/tools/doctor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using ::testing::Contains;
using ::testing::HasSubstr;

Facts healthy() {
  Facts facts;
  facts.lockstep = "1.2.3";
  facts.libtorch = "2.13.0";
  facts.host = "here";
  facts.processor = "A Processor";
  facts.instruction_set = "avx512";
  facts.cores = facts.all_cores = 4;
  facts.memory = facts.available_memory.bytes = std::uint64_t{8} << 30;
  facts.open_files = facts.processes = std::numeric_limits<std::uint64_t>::max();
  facts.locked_memory = 8 << 20;
  facts.shm_folder = std::uint64_t{1} << 30;
  facts.shmem_huge_pages = "advise";
  facts.clock_source = "tsc";
  facts.interfaces = {{"eth0", "10.0.0.1", 1000}};
  facts.used_interface = "eth0";
  facts.why_used = "it leads to node0";
  facts.engines = {{"ucx", ""}, {"mpi", "not in this build"}, {"zmq", ""}};
  facts.has_worker = true;
  return facts;
}

// The findings that are not ok, as "error shared memory: TEXT".
std::vector<std::string> complaints(const Facts& facts) {
  std::vector<std::string> found;
  for (const Finding& one : findings_of(facts))
    if (one.verdict != Verdict::ok) {
      EXPECT_FALSE(one.hint.empty()) << one.subject;
      found.push_back(std::string(name_of(one.verdict)) + ' ' + one.subject + ": " + one.text);
    }
  return found;
}

TEST(DoctorTest, AHealthyMachineHasNoComplaints) {
  EXPECT_THAT(complaints(healthy()), ::testing::IsEmpty());
  const std::string text = text_of(findings_of(healthy()));
  EXPECT_THAT(text, HasSubstr("A Processor, 4 of 4 cores, kernels for avx512"));
  EXPECT_THAT(text, HasSubstr("eth0 10.0.0.1 1000 Mbit/s (used: it leads to node0)"));
  EXPECT_THAT(text, HasSubstr("not to be had: not in this build"));
  EXPECT_EQ(text.find("hint:"), text.npos);
}

TEST(DoctorTest, EachFaultIsNamedOnce) {
  const auto alone = [](const auto& change, const char* complaint) {
    Facts facts = healthy();
    change(facts);
    EXPECT_THAT(complaints(facts), ::testing::ElementsAre(HasSubstr(complaint)));
  };
  alone([](Facts& f) { f.core_quota = 1.5; },
        "warning processor: A Processor, 4 of 4 cores, kernels for avx512; the control group "
        "allows the time of 1.5");
  alone(
      [](Facts& f) {
        f.available_memory = {512 << 20, "the memory limit of control group /x"};
      },
      "warning memory: 512.00 MiB free of 8.00 GiB (limited by the memory limit of control ");
  alone([](Facts& f) { f.no_segment = "no memfd"; }, "error shared memory: a job's cannot be made");
  alone([](Facts& f) { f.no_pidfd = "Function not implemented"; }, "error kernel: ");
  alone([](Facts& f) { f.shmem_huge_pages = "never"; }, "warning huge pages: ");
  alone([](Facts& f) { f.shm_folder = 64 << 20; }, "warning /dev/shm: 64.00 MiB");
  alone([](Facts& f) { f.open_files = 256; }, "warning open files: 256");
  alone([](Facts& f) { f.processes = 100; }, "warning processes: 100");
  alone([](Facts& f) { f.rdma_devices = {"mlx5_0"}; }, "warning locked memory: 8.00 MiB");
  alone([](Facts& f) { f.clock_source = "hpet"; }, "warning clock: hpet");
  alone([](Facts& f) { f.used_interface = "", f.why_used = "no way to 'x'"; },
        "warning network: eth0 10.0.0.1 1000 Mbit/s: no way to 'x'");
  alone(
      [](Facts& f) {
        f.code_choices = {{"MKL_CBWR", "AVX2"}};
      },
      "warning exactness: code is chosen by MKL_CBWR=AVX2");
  alone([](Facts& f) { f.has_worker = false; }, "warning programs: there is no lockstep-worker");
}

TEST(DoctorTest, OneEngineIsEnough) {
  Facts facts = healthy();
  facts.engines["ucx"] = "not in this build";
  EXPECT_THAT(complaints(facts), ::testing::IsEmpty());
  facts.engines["zmq"] = "not in this build";
  EXPECT_THAT(complaints(facts),
              ::testing::ElementsAre(HasSubstr("warning ucx: "), HasSubstr("warning zmq: ")));
}

TEST(DoctorTest, NodesThatDifferAreNamed) {
  Facts other = healthy();
  other.processor = "Another";
  other.code_choices = {{"MKL_CBWR", "AVX2"}};
  const Traits one = traits_of(healthy());
  const std::vector<Traits> nodes = {one, traits_of(other), one};
  const std::vector<Finding> found = differences(nodes);
  ASSERT_EQ(found.size(), 2u);
  EXPECT_EQ(found[0].text, "MKL_CBWR differs: AVX2 on node 1; not set on node 0, 2");
  EXPECT_EQ(found[1].text, "processor differs: A Processor on node 0, 2; Another on node 1");
  EXPECT_EQ(found[1].verdict, Verdict::error);
  EXPECT_EQ(differences(std::span(nodes).first(1))[0].verdict, Verdict::ok);
}

TEST(DoctorTest, FactsAreReadBelowAFolder) {
  const fs::path root = ::testing::TempDir() + "lockstep-doctor";
  const auto write = [&](const fs::path& path, const char* text) {
    fs::create_directories((root / path).parent_path());
    std::ofstream(root / path) << text;
  };
  write("proc/cpuinfo", "processor : 0\nmodel name\t: A Processor\n");
  write("proc/meminfo", "MemAvailable: 2048 kB\n");
  write("proc/self/cgroup", "4:cpu:/x\n0::/y\n");
  write("sys/fs/cgroup/cpu.max", "max 100000\n");
  write("sys/fs/cgroup/y/cpu.max", "150000 100000\n");
  write("sys/kernel/mm/transparent_hugepage/shmem_enabled", "always within_size [never] deny\n");
  write("sys/devices/system/clocksource/clocksource0/current_clocksource", "hpet\n");
  write("sys/class/infiniband/mlx5_0/node_type", "1: CA\n");
  const Facts facts =
      read_facts(root, {{"MKL_CBWR", "AVX2"}, {"HOME", "/"}}, {.towards = "127.0.0.1"});
  fs::remove_all(root);
  EXPECT_EQ(facts.processor, "A Processor");
  EXPECT_EQ(facts.available_memory.bytes, 2u << 20);
  EXPECT_DOUBLE_EQ(facts.core_quota, 1.5);
  EXPECT_EQ(facts.shmem_huge_pages, "never");
  EXPECT_EQ(facts.clock_source, "hpet");
  EXPECT_EQ(facts.shm_folder, 0u);
  EXPECT_EQ(facts.rdma_devices, std::vector<std::string>{"mlx5_0"});
  EXPECT_EQ(facts.code_choices, (std::map<std::string, std::string>{{"MKL_CBWR", "AVX2"}}));
  EXPECT_EQ(facts.used_interface + ": " + facts.why_used, "lo: it leads to 127.0.0.1");
  EXPECT_EQ(facts.no_segment + facts.no_pidfd, "");
  EXPECT_GE(facts.cores, 1);
}

TEST(DoctorTest, AFindingsJsonIsReadBackAndAnotherRefused) {
  const Finding wrong{Verdict::error, "memory", "none", "buy some"};
  const Finding back = received<Finding>(nlohmann::json(wrong));
  EXPECT_EQ(text_of({&back, 1}), text_of({&wrong, 1}));
  for (const char* text : {"{}", "[]", R"({"verdict": "fine"})", R"({"verdict": "ok"})",
                           R"({"verdict": "ok", "subject": 1, "text": "", "hint": ""})"})
    EXPECT_THROW(received<Finding>(nlohmann::json::parse(text)), Error) << text;
}

}  // namespace
}  // namespace lockstep
