#include "lockstep/checkpoint/checkpoint.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <numeric>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/checkpoint/async_saver.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

class CheckpointTest : public testing::Test {
 protected:
  CheckpointTest() : floats_(1000) {
    std::iota(floats_.begin(), floats_.end(), 0.25f);
    fs::remove_all(folder_);
  }
  ~CheckpointTest() override { fs::remove_all(folder_); }

  std::span<const std::byte> bytes(std::size_t first, std::size_t count) const {
    return std::as_bytes(std::span(floats_)).subspan(first, count);
  }
  CheckpointContents some(std::uint64_t step) const {
    return {.step = step,
            .state = R"({"epoch":3,"loss":0.1,"name":"naïve"})",
            .tensors = {{"weight", Dtype::float32, {20, 30}, bytes(0, 2400)},
                        {"adam.first/weight", Dtype::float32, {600}, bytes(1600, 2400)},
                        {"step", Dtype::int64, {}, bytes(8, 8)},
                        {"none", Dtype::uint8, {0}, bytes(0, 0)}}};
  }
  std::vector<std::string> names() const {
    std::vector<std::string> found;
    if (fs::exists(folder_))
      for (const auto& entry : fs::directory_iterator(folder_))
        found.push_back(entry.path().filename().string());
    std::ranges::sort(found);
    return found;
  }
  void expect_whole(const fs::path& path, std::uint64_t step) const {
    const Checkpoint checkpoint = Checkpoint::open(path);
    const CheckpointContents expected = some(step);
    EXPECT_EQ(checkpoint.step(), step);
    EXPECT_EQ(checkpoint.state(), expected.state);
    ASSERT_EQ(checkpoint.tensors().size(), expected.tensors.size());
    for (const TensorView& tensor : expected.tensors) {
      const Manifest::Tensor* found = checkpoint.find(tensor.name);
      ASSERT_NE(found, nullptr) << tensor.name;
      EXPECT_EQ(found->dtype, tensor.dtype);
      EXPECT_EQ(found->shape, tensor.shape);
      std::vector<std::byte> out(found->bytes);
      checkpoint.read(tensor.name, out);
      EXPECT_TRUE(std::ranges::equal(out, tensor.bytes)) << tensor.name;
    }
  }
  static std::string message(const std::function<void()>& attempt) {
    try {
      attempt();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  }
  std::string opening(const fs::path& path) const {
    return message([&] { Checkpoint::open(path); });
  }
  static void write(const fs::path& file, std::string_view text) {
    write_file_atomically(file, text);
  }

  const fs::path folder_ =
      fs::path(testing::TempDir()) / ("lockstep_checkpoint_test_" + std::to_string(::getpid()));
  std::vector<float> floats_;
};

TEST_F(CheckpointTest, RoundTripInOneShardAndInMany) {
  for (const std::uint64_t shard_bytes :
       {std::uint64_t{1} << 30, std::uint64_t{2408}, std::uint64_t{1}}) {
    const fs::path path = write_checkpoint(folder_, some(7), {.shard_bytes = shard_bytes});
    EXPECT_EQ(path, folder_ / "step-00000007");
    expect_whole(path, 7);
    EXPECT_TRUE(fs::exists(path / "shard-00000.safetensors"));
    EXPECT_EQ(fs::exists(path / "shard-00001.safetensors"), shard_bytes < 5000);
    // What tools for safetensors see.
    EXPECT_NO_THROW(SafetensorsFile::read(path / "shard-00000.safetensors"));
    EXPECT_THAT(names(), ElementsAre("step-00000007"));
  }
}

TEST_F(CheckpointTest, SameContentsSameManifest) {
  write_checkpoint(folder_ / "a", some(7));
  CheckpointContents other = some(7);
  std::ranges::reverse(other.tensors);
  write_checkpoint(folder_ / "b", other);
  EXPECT_EQ(read_text_file(folder_ / "a/step-00000007/manifest.json"),
            read_text_file(folder_ / "b/step-00000007/manifest.json"));
}

TEST_F(CheckpointTest, KeepsTheLastOnesAndThoseNamed) {
  for (std::uint64_t step = 10; step <= 50; step += 10)
    write_checkpoint(folder_, some(step), {.keep = 2, .keep_also = {20}});
  EXPECT_THAT(names(), ElementsAre("step-00000020", "step-00000040", "step-00000050"));
  // Begun again from step 20: what lies ahead is not what was written last, and does not count.
  write_checkpoint(folder_, some(30), {.keep = 1});
  EXPECT_THAT(names(), ElementsAre("step-00000030", "step-00000040", "step-00000050"));
  EXPECT_EQ(newest_checkpoint(folder_).checkpoint->step(), 50u);
}

TEST_F(CheckpointTest, EveryChangedByteAndEveryCutIsRefusedByName) {
  const fs::path path = write_checkpoint(folder_, some(7), {.shard_bytes = 3000});
  for (const char* name : {"manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"}) {
    const fs::path file = path / name;
    const std::string good = read_text_file(file);
    for (std::size_t at = 0; at < good.size(); at += 1 + good.size() / 150) {
      std::string bad = good;
      bad[at] = static_cast<char>(bad[at] ^ 0x11);
      write(file, bad);
      EXPECT_THAT(opening(path), AllOf(HasSubstr(name), HasSubstr("hint:"))) << at;
      write(file, good.substr(0, at));
      EXPECT_THAT(opening(path), AllOf(HasSubstr(name), HasSubstr("hint:"))) << at;
    }
    write(file, good + "x");
    EXPECT_THAT(opening(path), HasSubstr(name));
    fs::remove(file);
    EXPECT_THAT(opening(path), AllOf(HasSubstr(name), HasSubstr("No such file")));
    write(file, good);
    expect_whole(path, 7);
  }
  EXPECT_THAT(opening(folder_ / "none"), HasSubstr("no such folder"));
  EXPECT_THAT(opening(folder_), HasSubstr("no whole checkpoint"));
}

TEST_F(CheckpointTest, ForeignFilesAndOtherVersionsAreRefused) {
  const fs::path path = write_checkpoint(folder_, some(7));
  const std::string good = read_text_file(path / "manifest.json");
  const auto with = [&](std::string_view from, std::string_view to) {
    std::string text = good;
    text.replace(text.find(from), from.size(), to);
    write(path / "manifest.json", text);
    return opening(path);
  };
  EXPECT_THAT(with("\"version\": 1", "\"version\": 2"),
              AllOf(HasSubstr("version 2"), HasSubstr("reads version 1"), HasSubstr("hint:")));
  EXPECT_THAT(with("lockstep checkpoint", "elsewhere"), HasSubstr("not a manifest of lockstep's"));
  EXPECT_THAT(with("shard-00000.safetensors", "../../etc/passwd"), HasSubstr("unexpected file"));
  EXPECT_THAT(with("\"F32\"", "\"F33\""), HasSubstr("unknown dtype"));
  EXPECT_THAT(with("\"epoch\": 3", "\"epoch\": 4"), HasSubstr("checksum"));
}

TEST_F(CheckpointTest, ReadRefusesWhatDoesNotFit) {
  const Checkpoint checkpoint = Checkpoint::open(write_checkpoint(folder_, some(7)));
  std::vector<std::byte> out(2400);
  EXPECT_THAT(message([&] { checkpoint.read("wight", out); }), HasSubstr("no tensor \"wight\""));
  EXPECT_THAT(message([&] { checkpoint.read("step", out); }), HasSubstr("8 bytes, 2400"));
  fs::resize_file(checkpoint.path() / "shard-00000.safetensors", 100);
  EXPECT_THAT(message([&] { checkpoint.read("weight", out); }), HasSubstr("checksum"));
}

TEST_F(CheckpointTest, NewestSkipsBrokenOnesAndSaysWhy) {
  EXPECT_FALSE(newest_checkpoint(folder_ / "none").checkpoint);
  for (const std::uint64_t step : {9u, 10u, 100000000u}) write_checkpoint(folder_, some(step));
  EXPECT_EQ(newest_checkpoint(folder_).checkpoint->step(), 100000000u);
  fs::resize_file(folder_ / "step-100000000" / "shard-00000.safetensors", 50);
  fs::remove(folder_ / "step-00000010" / "manifest.json");
  fs::create_directories(folder_ / "step-00000011.tmp-1");
  fs::create_directories(folder_ / "step-12");
  fs::copy(folder_ / "step-00000009", folder_ / "step-00000099");
  const NewestCheckpoint newest = newest_checkpoint(folder_);
  ASSERT_TRUE(newest.checkpoint);
  EXPECT_EQ(newest.checkpoint->step(), 9u);
  EXPECT_THAT(newest.skipped, ElementsAre(HasSubstr("50 bytes"), HasSubstr("holds step 9"),
                                          HasSubstr("manifest.json")));
}

// Runs `body` in a child; returns its exit status.
int in_child(const std::function<int()>& body) {
  const pid_t pid = ::fork();
  if (pid == 0) ::_exit(body());
  int status = 0;
  ::waitpid(pid, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}
constexpr int kNotPermitted = 77;

TEST_F(CheckpointTest, AFileSizeLimitIsAnErrorAndLeavesTheOlderOnes) {
  write_checkpoint(folder_, some(1));
  const int status = in_child([&] {
    ::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1000, 1000};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    const std::string text = message([&] { write_checkpoint(folder_, some(2), {.keep = 1}); });
    return text.find("File too large") != std::string::npos &&
                   text.find("step 2 not saved") != std::string::npos
               ? 0
               : 1;
  });
  EXPECT_EQ(status, 0);
  EXPECT_THAT(names(), ElementsAre("step-00000001"));
  expect_whole(folder_ / "step-00000001", 1);
}

TEST_F(CheckpointTest, AFullDiskIsAnErrorAndLeavesTheOlderOnes) {
  fs::create_directories(folder_);
  const int status = in_child([&] {  // the mount is this child's alone, and ends with it
    if (::unshare(CLONE_NEWNS) != 0 ||
        ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr) != 0 ||
        ::mount("lockstep", folder_.c_str(), "tmpfs", 0, "size=40k") != 0)
      return kNotPermitted;
    std::uint64_t step = 1;
    std::string text;
    while (text.empty() && step < 20) {
      try {
        write_checkpoint(folder_, some(step));
        ++step;
      } catch (const Error& error) {
        text = error.what();
      }
    }
    const NewestCheckpoint newest = newest_checkpoint(folder_);
    const bool good = step > 1 && text.find("No space left on device") != std::string::npos &&
                      newest.checkpoint && newest.checkpoint->step() == step - 1 &&
                      newest.skipped.empty() && names().size() == step - 1;
    return good ? 0 : 1;
  });
  if (status == kNotPermitted) GTEST_SKIP() << "may not mount a file system";
  EXPECT_EQ(status, 0);
}

TEST_F(CheckpointTest, AWriterKilledAtAnyInstantLeavesWholeCheckpointsOnly) {
  write_checkpoint(folder_, some(1));
  for (int round = 0; round < 25; ++round) {
    int ends[2];
    ASSERT_EQ(::pipe(ends), 0);
    const pid_t pid = ::fork();
    if (pid == 0) {
      for (std::uint64_t step = 2;; ++step) {
        write_checkpoint(folder_, some(step % 4 + 2), {.shard_bytes = 1});
        [[maybe_unused]] const auto written = ::write(ends[1], "x", 1);
      }
    }
    char byte;
    ASSERT_EQ(::read(ends[0], &byte, 1), 1);
    for (int spin = 0; spin < round * 20000; ++spin) asm volatile("");
    ::kill(pid, SIGKILL);
    ::waitpid(pid, nullptr, 0);
    ::close(ends[0]);
    ::close(ends[1]);
    const NewestCheckpoint newest = newest_checkpoint(folder_);
    ASSERT_TRUE(newest.checkpoint);
    EXPECT_THAT(newest.skipped, ElementsAre());
    expect_whole(newest.checkpoint->path(), newest.checkpoint->step());
  }
  write_checkpoint(folder_, some(9));
  for (const std::string& name : names()) EXPECT_EQ(name.find("tmp"), std::string::npos) << name;
}

TEST_F(CheckpointTest, AsyncSaverCopiesBeforeItReturns) {
  AsyncSaver saver(folder_, {.keep = 2});
  const std::vector<float> before = floats_;
  for (std::uint64_t step = 1; step <= 4; ++step) {
    saver.save(some(step));
    std::ranges::fill(floats_, -1.0f);  // the next step
    saver.wait();
    floats_ = before;
    expect_whole(checkpoint_path(folder_, step), step);
  }
  EXPECT_THAT(names(), ElementsAre("step-00000003", "step-00000004"));
}

TEST_F(CheckpointTest, AsyncSaverThrowsAtTheNextCall) {
  write(folder_.string() + "_file", "x");
  AsyncSaver saver(folder_.string() + "_file");
  saver.save(some(1));
  EXPECT_THAT(message([&] { saver.save(some(2)); }), HasSubstr("cannot make"));
  EXPECT_EQ(message([&] { saver.wait(); }), "no error");
  saver.save(some(3));
  EXPECT_THAT(message([&] { saver.wait(); }), HasSubstr("cannot make"));
  fs::remove(folder_.string() + "_file");
}

TEST_F(CheckpointTest, AsyncSaverWaitsNoLongerThanItsDeadline) {
  AsyncSaver saver(folder_);
  saver.save(some(1));
  try {
    saver.wait(Deadline::at(Clock::now()));
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("step 1 is still being written"));
  }
  saver.wait();
  expect_whole(checkpoint_path(folder_, 1), 1);
}

}  // namespace
}  // namespace lockstep
