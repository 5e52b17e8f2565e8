#include "lockstep/memory/segment.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <fstream>
#include <set>
#include <thread>

#include "lockstep/base/error.h"
#include "lockstep/memory/available_memory.h"
#include "lockstep/memory/control_block.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

template <typename Function>
std::string error_of(Function&& function) {
  try {
    function();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

UniqueFd duplicate(const Segment& segment) {
  return UniqueFd(::fcntl(segment.fd(), F_DUPFD_CLOEXEC, 0));
}

// A memfd with the bytes given, sized and sealed as told.
UniqueFd forged(const std::vector<std::byte>& bytes, std::uint64_t size, int seals) {
  UniqueFd fd(::memfd_create("forged", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  EXPECT_EQ(::ftruncate(fd.get(), static_cast<off_t>(size)), 0);
  if (!bytes.empty()) {
    EXPECT_EQ(::pwrite(fd.get(), bytes.data(), bytes.size(), 0),
              static_cast<ssize_t>(bytes.size()));
  }
  EXPECT_EQ(::fcntl(fd.get(), F_ADD_SEALS, seals), 0);
  return fd;
}

constexpr int kAllSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
constexpr std::uint64_t kArena = 4 << 20;

struct Genuine {
  std::vector<std::byte> header = std::vector<std::byte>(64);
  std::uint64_t size = 0;
  Genuine() {
    auto segment = Segment::create({.seats = 2, .arena_bytes = kArena});
    EXPECT_EQ(::pread(segment->fd(), header.data(), header.size(), 0), 64);
    size = static_cast<std::uint64_t>(::lseek(segment->fd(), 0, SEEK_END));
  }
  std::string error_with(std::size_t offset, std::uint64_t value, std::size_t bytes) const {
    auto changed = header;
    std::memcpy(changed.data() + offset, &value, bytes);
    return error_of([&] { Segment::attach(forged(changed, size, kAllSeals)); });
  }
};

TEST(SegmentTest, ArenasAreZeroedAlignedAndApart) {
  auto segment = Segment::create({.seats = 3, .arena_bytes = kArena});
  EXPECT_EQ(segment->seats(), 3);
  for (int rank = 0; rank < 3; ++rank) {
    auto first = segment->allocate(rank, 100, "first");
    auto second = segment->allocate(rank, 5000, "second");
    EXPECT_EQ(first.size(), 100u);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first.data()) % 64, 0u);
    EXPECT_EQ(second.data() - first.data(), 128);
    EXPECT_TRUE(std::ranges::all_of(second, [](std::byte byte) { return byte == std::byte{0}; }));
    std::memset(first.data(), rank + 1, first.size());
    std::memset(second.data(), rank + 1, second.size());
    EXPECT_EQ(segment->arena_owner(first.data()), rank);
    EXPECT_EQ(segment->arena_owner(&second.back()), rank);
    const auto offset = static_cast<std::uint64_t>(segment->offset_of(first.data()));
    EXPECT_EQ(segment->at(rank, offset, 100).data(), first.data());
  }
  int elsewhere = 0;
  EXPECT_EQ(segment->arena_owner(&elsewhere), -1);
  EXPECT_EQ(segment->offset_of(&elsewhere), -1);
  EXPECT_EQ(segment->offset_of(&segment->control(0)), -1);
}

TEST(SegmentTest, ReleasedMemoryIsReusedAndZeroAgain) {
  auto segment = Segment::create({.seats = 1, .arena_bytes = kArena});
  auto first = segment->allocate(0, 10'000, "first");
  auto second = segment->allocate(0, 10'001, "second");
  std::memset(first.data(), 1, first.size());
  std::memset(second.data(), 1, second.size());
  segment->release(0, second);
  EXPECT_EQ(first[9'999], std::byte{1});
  auto third = segment->allocate(0, 20'000, "third");
  EXPECT_EQ(third.data(), second.data());
  EXPECT_TRUE(std::ranges::all_of(third, [](std::byte byte) { return byte == std::byte{0}; }));
}

TEST(SegmentTest, AChildSeesTheSameMemory) {
  auto segment = Segment::create({.seats = 2, .arena_bytes = kArena});
  auto mine = segment->allocate(0, 64, "mine");
  const auto place = static_cast<std::uint64_t>(segment->offset_of(mine.data()));
  const int fd = duplicate(*segment).release();
  const pid_t child = ::fork();
  if (child == 0) {
    auto attached = Segment::attach(UniqueFd(fd));
    *attached->at(0, place, 64).data() = std::byte{42};
    attached->abort("the child says so");
    ::_exit(attached->seats() == 2 ? 0 : 1);
  }
  ::close(fd);
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_EQ(mine[0], std::byte{42});
  EXPECT_EQ(segment->abort_reason(), "the child says so");
}

TEST(SegmentTest, TheFirstAbortReasonStays) {
  auto segment = Segment::create({.seats = 1, .arena_bytes = kArena});
  EXPECT_EQ(segment->abort_reason(), "");
  EXPECT_EQ(segment->abort_word().load(), 0u);
  segment->abort("first\nline");
  segment->abort("second");
  EXPECT_EQ(segment->abort_reason(), "first?line");
  EXPECT_NE(segment->abort_word().load(), 0u);
  auto other = Segment::create({.seats = 1, .arena_bytes = kArena});
  other->abort(std::string(100'000, 'x'));
  EXPECT_EQ(other->abort_reason(), std::string(1000, 'x'));
}

TEST(SegmentTest, AbortWakesASleeper) {
  auto segment = Segment::create({.seats = 2, .arena_bytes = kArena});
  auto& block = segment->control(1);
  const std::uint32_t bell = block.bell.load();
  std::thread sleeper([&] {
    while (segment->abort_word().load() == 0)
      sleep_on(block.bell, bell, std::chrono::hours(1));  // returns at once when the bell has rung
  });
  segment->abort("wake up");
  sleeper.join();
}

TEST(SegmentTest, OptionsOutOfRangeAreRefused) {
  EXPECT_THAT(error_of([] { Segment::create({.seats = 0}); }), HasSubstr("0 ranks is impossible"));
  EXPECT_THAT(error_of([] { Segment::create({.seats = 1025}); }), HasSubstr("1 to 1024"));
  EXPECT_THAT(error_of([] { Segment::create({.seats = 2, .arena_bytes = ~0ull}); }),
              HasSubstr("too large"));
}

TEST(SegmentTest, LackOfRoomOrMemoryIsAnErrorThatNamesTheSizes) {
  auto segment = Segment::create({.seats = 1, .arena_bytes = kArena});
  const std::string room = error_of([&] { segment->allocate(0, kArena + 1, "the gradients"); });
  EXPECT_THAT(room, HasSubstr("the gradients"));
  EXPECT_THAT(room, HasSubstr("4.00 MiB left"));
  EXPECT_THAT(room, HasSubstr("hint: "));
  EXPECT_EQ(segment->allocate(0, kArena, "all of it").size(), kArena);

  auto vast = Segment::create({.seats = 1, .arena_bytes = 4 * total_memory()});
  const std::string memory = error_of([&] { vast->allocate(0, 3 * total_memory(), "a giant"); });
  EXPECT_THAT(memory, HasSubstr("not enough memory for a giant: " + byte_text(3 * total_memory()) +
                                " needed"));
  EXPECT_THAT(memory, HasSubstr("free (limited by "));
  EXPECT_THAT(memory, HasSubstr("hint: fewer workers"));
}

// What `function` throws in a child of this process that has the limit; how the child ended, if it
// was killed.
template <typename Function>
std::string error_under(__rlimit_resource resource, std::uint64_t limit, Function&& function) {
  int ends[2];
  EXPECT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const rlimit both{limit, limit};
    const std::string error =
        ::setrlimit(resource, &both) == 0 ? error_of(function) : "setrlimit was refused";
    write_all(ends[1], as_byte_span(error));
    ::_exit(0);
  }
  ::close(ends[1]);
  const UniqueFd from(ends[0]);
  std::string text(4096, ' ');
  text.resize(
      static_cast<std::size_t>(std::max<ssize_t>(::read(from.get(), text.data(), 4096), 0)));
  int status = -1;
  EXPECT_EQ(::waitpid(child, &status, 0), child);
  return WIFSIGNALED(status) ? "killed by signal " + std::to_string(WTERMSIG(status)) : text;
}

constexpr std::uint64_t kGiB = std::uint64_t{1} << 30;

// The kernel's own answer to a file too large is SIGXFSZ.
TEST(SegmentTest, ALimitOfFileSizesIsAnErrorAndNoSignal) {
  const auto create = [] { Segment::create({.seats = 2, .arena_bytes = kGiB}); };
  const std::string error = error_under(RLIMIT_FSIZE, kGiB, create);
  EXPECT_THAT(error, HasSubstr("no room for the shared memory segment: 3.00 GiB needed, 1.00 GiB "
                               "left of this process's largest file size (RLIMIT_FSIZE)"));
  EXPECT_THAT(error, HasSubstr("hint: ulimit -f unlimited"));
  EXPECT_EQ(error_under(RLIMIT_FSIZE, 4 * kGiB, create), "no error");
  // What was sized before is not affected.
  auto segment = Segment::create({.seats = 1, .arena_bytes = kArena});
  EXPECT_EQ(error_under(RLIMIT_FSIZE, 1, [&] { segment->allocate(0, 1 << 20, "memory")[9] = {}; }),
            "no error");
}

// A gibibyte more than this process has mapped.
std::uint64_t tight_address_space() {
  std::uint64_t pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  return pages * static_cast<std::uint64_t>(::getpagesize()) + kGiB;
}

TEST(SegmentTest, ALimitOfAddressSpaceIsAnError) {
  const auto create = [] { Segment::create({.seats = 1, .arena_bytes = 2 * kGiB}); };
  const std::string error = error_under(RLIMIT_AS, tight_address_space(), create);
  EXPECT_THAT(error, HasSubstr("no room for the shared memory segment: 4.00 GiB needed, "));
  EXPECT_THAT(error, HasSubstr(" left of this process's address space (RLIMIT_AS) of "));
  EXPECT_THAT(error, HasSubstr("hint: ulimit -v unlimited"));
  // A worker is told the same when it attaches what somebody else made.
  auto segment = Segment::create({.seats = 1, .arena_bytes = 2 * kGiB});
  EXPECT_THAT(
      error_under(RLIMIT_AS, tight_address_space(), [&] { Segment::attach(duplicate(*segment)); }),
      HasSubstr("4.00 GiB needed, "));
}

TEST(SegmentTest, PlacesOutsideAnArenaAreErrors) {
  auto segment = Segment::create({.seats = 2, .arena_bytes = kArena});
  const auto start =
      static_cast<std::uint64_t>(segment->offset_of(segment->allocate(1, 64, "memory").data()));
  EXPECT_EQ(segment->at(1, start, kArena).size(), kArena);
  struct Place {
    std::uint64_t offset, bytes;
  };
  for (const Place place :
       {Place{start - 64, 64}, Place{start, kArena + 1}, Place{start + kArena, 1}, Place{0, 8},
        Place{~0ull, 1}, Place{start, ~0ull}, Place{~0ull - 7, 16}})
    EXPECT_THAT(error_of([&] { segment->at(1, place.offset, place.bytes); }),
                HasSubstr("outside its arena"));
}

TEST(SegmentTest, ACorruptControlBlockIsAnError) {
  auto segment = Segment::create({.seats = 1, .arena_bytes = kArena});
  for (const std::uint64_t used : {kArena + 64, std::uint64_t{3}, ~std::uint64_t{0} - 63}) {
    segment->control(0).arena_used.store(used);
    EXPECT_THAT(error_of([&] { segment->allocate(0, 64, "memory"); }), HasSubstr("corrupt"));
  }
}

TEST(SegmentAttachTest, WrongDescriptorsAreNamed) {
  const Genuine genuine;
  EXPECT_THAT(error_of([] { Segment::attach(UniqueFd()); }), HasSubstr("not a memfd"));
  EXPECT_THAT(error_of([] { Segment::attach(UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC))); }),
              HasSubstr("not a memfd"));
  int ends[2];
  ASSERT_EQ(::pipe2(ends, O_CLOEXEC), 0);
  EXPECT_THAT(error_of([&] { Segment::attach(UniqueFd(ends[0])); }), HasSubstr("not a memfd"));
  ::close(ends[1]);
  for (const int seals : {0, F_SEAL_SHRINK, F_SEAL_SHRINK | F_SEAL_GROW})
    EXPECT_THAT(error_of([&] { Segment::attach(forged(genuine.header, genuine.size, seals)); }),
                HasSubstr("not sealed"));
  EXPECT_THAT(error_of([] { Segment::attach(forged({}, 0, kAllSeals)); }),
              HasSubstr("0 bytes, too few"));
  EXPECT_THAT(error_of([] { Segment::attach(forged({}, 39, kAllSeals)); }),
              HasSubstr("39 bytes, too few"));
  EXPECT_THAT(error_of([] { Segment::attach(forged({}, 1 << 20, kAllSeals)); }),
              HasSubstr("magic"));
  EXPECT_THAT(error_of([&] { Segment::attach(forged(genuine.header, 4096, kAllSeals)); }),
              HasSubstr("it has 4096 bytes, its header says"));
  EXPECT_EQ(error_of([&] { Segment::attach(forged(genuine.header, genuine.size, kAllSeals)); }),
            "no error");
}

// Preamble: magic 0, version 8, ranks 12, arena bytes 16, total bytes 24, control block size 32.
TEST(SegmentAttachTest, HostileHeadersAreNamed) {
  const Genuine genuine;
  EXPECT_THAT(genuine.error_with(0, 1, 8), HasSubstr("magic"));
  EXPECT_THAT(genuine.error_with(8, 1, 4), HasSubstr("layout is version 1, this program's is 3"));
  EXPECT_THAT(genuine.error_with(12, 0, 4), HasSubstr("claims 0 seats"));
  EXPECT_THAT(genuine.error_with(12, 1025, 4), HasSubstr("claims 1025 seats"));
  EXPECT_THAT(genuine.error_with(12, 0xffffffff, 4), HasSubstr("claims 4294967295 seats"));
  EXPECT_THAT(genuine.error_with(12, 3, 4), HasSubstr("its header says"));
  EXPECT_THAT(genuine.error_with(16, 0, 8), HasSubstr("arenas of 0 bytes"));
  EXPECT_THAT(genuine.error_with(16, ~0ull, 8), HasSubstr("claims 2 seats"));
  EXPECT_THAT(genuine.error_with(16, kArena + 1, 8), HasSubstr("claims 2 seats"));
  EXPECT_THAT(genuine.error_with(16, 2 * kArena, 8), HasSubstr("its header says"));
  EXPECT_THAT(genuine.error_with(24, 1, 8), HasSubstr("its header says"));
  EXPECT_THAT(genuine.error_with(32, 1, 8), HasSubstr("same release"));
}

// Every single corrupt byte of the header is refused, or is one of those that attach() ignores.
TEST(SegmentAttachTest, EveryByteOfThePreambleCounts) {
  const Genuine genuine;
  for (std::size_t offset = 0; offset < 40; ++offset) {
    const auto changed = std::to_integer<std::uint64_t>(genuine.header[offset] ^ std::byte{0x40});
    EXPECT_NE(genuine.error_with(offset, changed, 1), "no error") << "byte " << offset;
  }
}

}  // namespace
}  // namespace lockstep
