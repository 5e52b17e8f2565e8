#include "lockstep/memory/available_memory.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <fstream>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

// A machine's /proc and /sys, made of files.
class AvailableMemoryTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lockstep-memory-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    root_ = name;
    write("proc/meminfo", "MemTotal:       4000 kB\nMemAvailable:   2000 kB\n");
  }
  void TearDown() override { fs::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    fs::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  fs::path root_;
};

TEST_F(AvailableMemoryTest, WithoutControlGroupsTheMachinesCounts) {
  EXPECT_EQ(available_memory(root_).bytes, 2000u * 1024);
  EXPECT_EQ(available_memory(root_).limited_by, "this machine");
}

TEST_F(AvailableMemoryTest, UnreadableMachinesLimitNothing) {
  EXPECT_EQ(available_memory(root_ / "nothing").bytes, ~std::uint64_t{0});
}

TEST_F(AvailableMemoryTest, TheTightestGroupOfVersion2Counts) {
  write("proc/self/cgroup", "0::/slurm/step\n");
  write("sys/fs/cgroup/slurm/step/memory.max", "max\n");
  write("sys/fs/cgroup/slurm/step/memory.current", "5000\n");
  EXPECT_EQ(available_memory(root_).bytes, 2000u * 1024);
  write("sys/fs/cgroup/slurm/memory.max", "100000\n");
  write("sys/fs/cgroup/slurm/memory.current", "70000\n");
  EXPECT_EQ(available_memory(root_).bytes, 30000u);
  EXPECT_EQ(available_memory(root_).limited_by, "the memory limit of control group /slurm");
  // The page cache that the kernel would give up is free.
  write("sys/fs/cgroup/slurm/memory.stat", "anon 1\nactive_file 9\ninactive_file 20000\n");
  EXPECT_EQ(available_memory(root_).bytes, 50000u);
  write("sys/fs/cgroup/slurm/memory.current", "200000\n");
  EXPECT_EQ(available_memory(root_).bytes, 0u);
}

TEST_F(AvailableMemoryTest, InAContainerTheVisibleRootCounts) {
  write("proc/self/cgroup", "0::/../outside\n");
  write("sys/fs/cgroup/memory.max", "1000\n");
  write("sys/fs/cgroup/memory.current", "400\n");
  EXPECT_EQ(available_memory(root_).bytes, 600u);
}

TEST_F(AvailableMemoryTest, Version1Counts) {
  write("proc/self/cgroup", "5:cpu:/x\n4:hugetlb,memory:/docker/abc\nnonsense\n");
  write("sys/fs/cgroup/memory/memory.limit_in_bytes", "3000\n");
  write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000\n");
  write("sys/fs/cgroup/memory/memory.stat", "inactive_file 1\ntotal_inactive_file 500\n");
  EXPECT_EQ(available_memory(root_).bytes, 2500u);
}

TEST(RequireMemoryTest, DecidesAndExplains) {
  EXPECT_NO_THROW(require_memory(100, {100, "this machine"}, "x"));
  try {
    require_memory(3 << 20, {1536, "the memory limit of control group /a"}, "the weights");
    FAIL();
  } catch (const Error& error) {
    EXPECT_STREQ(
        error.what(),
        "not enough memory for the weights: 3.00 MiB needed, 1.50 KiB free (limited by the "
        "memory limit of control group /a); hint: fewer workers, a smaller model or batch, "
        "or more memory");
  }
}

TEST(RequireMemoryTest, ThisMachineHasSome) {
  EXPECT_GT(available_memory().bytes, 0u);
  EXPECT_GT(total_memory(), std::uint64_t{1} << 20);
  EXPECT_EQ(byte_text(1023), "1023 bytes");
  EXPECT_EQ(byte_text(1024), "1.00 KiB");
  EXPECT_EQ(byte_text(~std::uint64_t{0}), "16.00 EiB");
}

}  // namespace
}  // namespace lockstep
