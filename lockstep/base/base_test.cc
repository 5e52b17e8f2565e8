#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <filesystem>
#include <numeric>

#include "lockstep/base/bytes.h"
#include "lockstep/base/deadline.h"
#include "lockstep/base/dtype.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

class FileTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "lockstep-base-XXXXXX").string();
    ASSERT_NE(::mkdtemp(name.data()), nullptr);
    folder_ = name;
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::ptrdiff_t files() const {
    return std::distance(fs::directory_iterator(folder_), fs::directory_iterator());
  }
  fs::path folder_;
};

template <typename Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(ErrorTest, Texts) {
  EXPECT_EQ(errno_text(ENOSPC), "No space left on device");
  EXPECT_STREQ(ConfigError("bad").what(), "bad");
  EXPECT_STREQ(ConfigError("bad", "be good").what(), "bad; hint: be good");
}

TEST(ErrorDeathTest, CheckNamesPlaceConditionAndMessage) {
  EXPECT_DEATH(LOCKSTEP_CHECK(1 + 1 == 3, "arithmetic"),
               "base_test.cc:[0-9]+: check failed: 1 \\+ 1 == 3: arithmetic");
  EXPECT_DEATH(LOCKSTEP_CHECK(false), "check failed: false\n");
}

TEST(DtypeTest, EveryTypeHasNamesThatLeadBack) {
  for (int i = 0; i < kDtypeCount; ++i) {
    const auto dtype = static_cast<Dtype>(i);
    EXPECT_EQ(dtype_from_name(name_of(dtype)), dtype);
    EXPECT_EQ(dtype_from_safetensors_name(safetensors_name_of(dtype)), dtype);
  }
  EXPECT_EQ(dtype_from_name("complex64"), std::nullopt);
  EXPECT_EQ(size_of(Dtype::bfloat16), 2u);
  EXPECT_EQ(size_of(Dtype::int64), 8u);
  EXPECT_EQ(safetensors_name_of(Dtype::bfloat16), "BF16");
  EXPECT_TRUE(is_floating_point(Dtype::float16));
  EXPECT_FALSE(is_floating_point(Dtype::uint8));
}

TEST(BytesTest, BoundsAndEndianness) {
  EXPECT_TRUE(in_bounds(4, 4, 8));
  EXPECT_FALSE(in_bounds(5, 4, 8));
  EXPECT_FALSE(in_bounds(~0ull, 2, 8));
  EXPECT_FALSE(in_bounds(2, ~0ull, 8));
  EXPECT_EQ(checked_multiply(1ull << 32, 1ull << 31), 1ull << 63);
  EXPECT_EQ(checked_multiply(1ull << 32, 1ull << 32), std::nullopt);
  std::byte bytes[5];
  write_little_endian<std::uint32_t>(0x01020384, bytes);
  EXPECT_EQ(read_little_endian<std::uint32_t>(bytes, 0), 0x01020384u);
  EXPECT_EQ(read_big_endian<std::uint32_t>(bytes, 0), 0x84030201u);
  EXPECT_EQ(read_big_endian<std::uint32_t>(bytes, 2), std::nullopt);
}

TEST(DeadlineTest, ExpiresAtItsTime) {
  const auto now = Clock::now();
  const Deadline deadline = Deadline::at(now + std::chrono::seconds(2));
  EXPECT_FALSE(deadline.expired(now));
  EXPECT_EQ(seconds(deadline.remaining(now)), 2.0);
  EXPECT_TRUE(deadline.expired(now + std::chrono::seconds(2)));
  EXPECT_EQ(deadline.remaining(now + std::chrono::seconds(3)), Clock::duration::zero());
  EXPECT_TRUE(Deadline::never().is_never());
  EXPECT_FALSE(Deadline::never().expired());
}

// The test vectors of FIPS 180-2.
TEST(HashTest, Sha256) {
  EXPECT_EQ(sha256_hex({}), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(sha256_hex(as_byte_span("abc")),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_NE(error_of([] { sha256_hex_of_file("/nonexistent"); }).find("/nonexistent"),
            std::string::npos);
}

// The test vectors of RFC 3720, B.4.
TEST(HashTest, Base64) {
  EXPECT_EQ(to_base64("foobar"), "Zm9vYmFy");
  for (std::size_t size = 0; size < 20; ++size) {
    std::string bytes(size, 0);
    for (std::size_t i = 0; i < size; ++i) bytes[i] = static_cast<char>(mix({size, i}));
    EXPECT_EQ(from_base64(to_base64(bytes)), bytes) << size;
  }
  EXPECT_THROW(from_base64("Zm9vYmF"), Error);
  EXPECT_THROW(from_base64("Zm9v*mFy"), Error);
}

TEST(HashTest, Crc32c) {
  EXPECT_EQ(crc32c({}), 0u);
  EXPECT_EQ(crc32c(as_byte_span("123456789")), 0xe3069283u);
  std::vector<std::byte> bytes(32, std::byte{0});
  EXPECT_EQ(crc32c(bytes), 0x8a9136aau);
  for (int i = 0; i < 32; ++i) bytes[i] = std::byte(i);
  EXPECT_EQ(crc32c(bytes), 0x46dd794eu);
}

// Results of jobs depend on these values: they may never change.
TEST(HashTest, MixIsFixed) {
  static_assert(mix({}) == 0x9e3779b97f4a7c15);
  EXPECT_EQ(mix({0}), 0x6e789e6aa1b965f4);
  EXPECT_EQ(mix({1, 2, 3}), 0xd306214c1fe59365);
  EXPECT_NE(mix({1, 2}), mix({2, 1}));
}

TEST_F(FileTest, WritesAndReadsBack) {
  const fs::path path = folder_ / "file";
  std::vector<std::byte> large(300'001);
  for (std::size_t i = 0; i < large.size(); ++i) large[i] = std::byte(i * 7);
  const std::span<const std::byte> pieces[] = {large, as_byte_span("tail")};
  write_file_atomically(path, pieces);
  auto bytes = read_file(path);
  ASSERT_EQ(bytes.size(), large.size() + 4);
  EXPECT_TRUE(std::equal(large.begin(), large.end(), bytes.begin()));
  EXPECT_EQ(sha256_hex_of_file(path), sha256_hex(bytes));

  write_file_atomically(path, "short");
  EXPECT_EQ(read_text_file(path), "short");
  write_file_atomically(path, "");
  EXPECT_TRUE(read_file(path).empty());
  EXPECT_EQ(files(), 1);
  struct stat status {};
  ASSERT_EQ(::stat(path.c_str(), &status), 0);
  const mode_t mask = ::umask(0);
  ::umask(mask);
  EXPECT_EQ(status.st_mode & 0777, 0666 & ~mask);
}

TEST_F(FileTest, ReadsFilesWithoutASize) {
  EXPECT_FALSE(read_text_file("/proc/self/status").empty());
}

TEST_F(FileTest, ErrorsNamePathActionAndReason) {
  const fs::path missing = folder_ / "missing";
  EXPECT_EQ(error_of([&] { read_file(missing); }),
            "cannot read " + missing.string() + ": No such file or directory");
  EXPECT_EQ(error_of([&] { read_text_file(folder_); }),
            "cannot read " + folder_.string() + ": Is a directory");
  EXPECT_EQ(error_of([&] { write_file_atomically(missing / "x", "text"); }),
            "cannot write " + (missing / "x").string() + ": No such file or directory");
}

TEST_F(FileTest, AFailedWriteLeavesTheOldContentAndNothingElse) {
  const fs::path path = folder_ / "file";
  write_file_atomically(path, "old");
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  rlimit old_limit{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old_limit), 0);
  const rlimit small{1000, old_limit.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const std::string error = error_of([&] { write_file_atomically(path, std::string(5000, 'x')); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old_limit), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_EQ(error, "cannot write " + path.string() + ": File too large");
  EXPECT_EQ(read_text_file(path), "old");
  EXPECT_EQ(files(), 1);

  fs::create_directory(folder_ / "sub");
  EXPECT_NE(error_of([&] { write_file_atomically(folder_ / "sub", "text"); }), "");
  EXPECT_EQ(files(), 2);
}

TEST_F(FileTest, UniqueFdClosesOnce) {
  const int fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  {
    UniqueFd first(fd);
    UniqueFd second(std::move(first));
    EXPECT_FALSE(first);
    EXPECT_EQ(second.get(), fd);
  }
  EXPECT_EQ(::fcntl(fd, F_GETFD), -1);
  const int kept = ::open("/dev/null", O_RDONLY | O_CLOEXEC);
  EXPECT_EQ(UniqueFd(kept).release(), kept);
  EXPECT_EQ(::close(kept), 0);
}

}  // namespace
}  // namespace lockstep
