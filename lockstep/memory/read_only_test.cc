#include "lockstep/memory/read_only.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>

namespace lockstep {
namespace {

struct ReadOnlyTest : ::testing::Test {
  const std::size_t page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  std::shared_ptr<Segment> segment = Segment::create({.seats = 1, .arena_bytes = 8 << 20});
  std::span<std::byte> memory = segment->allocate(0, 3 * page, "memory");
  ReadOnlyView view{segment, memory, {{"'a'", 0}, {"'b'", 4000}}, "shared weights", "edit_weights"};
};

TEST_F(ReadOnlyTest, ShowsWhatIsWrittenThroughTheSegment) {
  memory[4001] = std::byte{7};
  EXPECT_EQ(view.bytes()[4001], std::byte{7});
  EXPECT_EQ(view.bytes().size(), memory.size());
}

TEST_F(ReadOnlyTest, AWriteIsNamed) {
  EXPECT_DEATH(view.bytes()[4010] = std::byte{1},
               "lockstep: shared weights: 'b' was written to, at byte 10, while it is read-only; "
               "hint: edit_weights");
  EXPECT_DEATH(std::memset(view.bytes().data(), 1, 10), "'a' was written to, at byte ");
}

TEST_F(ReadOnlyTest, AFaultElsewhereIsNotOurs) {
  void* elsewhere = ::mmap(nullptr, page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(elsewhere, MAP_FAILED);
  EXPECT_DEATH(*static_cast<volatile char*>(elsewhere) = 1,
               ::testing::Not(::testing::HasSubstr("was written to")));
  ::munmap(elsewhere, page);
}

TEST_F(ReadOnlyTest, ASignalThatWasSentIsNotLost) {
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // their handlers end it
  EXPECT_DEATH(::kill(::getpid(), SIGSEGV), "SIGNAL|SEGV");
#else
  EXPECT_EXIT(::kill(::getpid(), SIGSEGV), testing::KilledBySignal(SIGSEGV), "");
#endif
}

TEST_F(ReadOnlyTest, CanBeWritableForAWhile) {
  view.set_writable(true);
  view.bytes()[5] = std::byte{9};
  view.set_writable(false);
  EXPECT_EQ(memory[5], std::byte{9});
  EXPECT_DEATH(view.bytes()[5] = std::byte{1}, "'a' was written to, at byte 5");
}

TEST_F(ReadOnlyTest, CanBecomePrivate) {
  memory[5] = std::byte{1};
  view.make_private();
  view.bytes()[5] = std::byte{2};
  EXPECT_EQ(memory[5], std::byte{1});
  EXPECT_EQ(view.bytes()[5], std::byte{2});
}

}  // namespace
}  // namespace lockstep
