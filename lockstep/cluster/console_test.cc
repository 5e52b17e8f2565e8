#include "lockstep/cluster/console.h"

#include <gtest/gtest.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace lockstep {
namespace {

struct Ends {
  UniqueFd ours, theirs;
};

Ends ends_of(bool socket) {
  int fds[2] = {-1, -1};
  EXPECT_EQ(socket ? ::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) : ::pipe(fds), 0);
  return {UniqueFd(fds[1]), UniqueFd(fds[0])};
}

std::string read_some(const UniqueFd& fd) {
  char bytes[5000];
  const ssize_t count = ::read(fd.get(), bytes, sizeof bytes);
  return {bytes, count < 0 ? 0 : std::size_t(count)};
}

TEST(Console, KeepsWhatIsNotReadAndThatInOrder) {
  for (const bool socket : {false, true}) {
    const Ends output = ends_of(socket), error = ends_of(socket);
    Console console(output.ours.get(), error.ours.get());
    std::string all;
    for (int line = 0; !console.full(); ++line) {
      const std::string text = std::to_string(line) + "\n";
      console.write(false, text);
      all += text;
      console.pass_on();
    }
    console.write(true, "aside");
    console.flush(Deadline::after(std::chrono::milliseconds(1)));  // nobody reads: it ends
    EXPECT_FALSE(console.idle());
    EXPECT_EQ(read_some(error.theirs), "aside");
    std::string got;
    while (got.size() < all.size()) {
      got += read_some(output.theirs);
      console.pass_on();
    }
    EXPECT_TRUE(got == all);
    EXPECT_TRUE(console.idle());
  }
}

TEST(Console, DropsWhatNobodyCanReadAnyMore) {
  Ends output = ends_of(true);
  Console console(output.ours.get(), output.ours.get());
  output.theirs = UniqueFd();
  console.write(true, "lost");
  console.flush(Deadline::never());
  EXPECT_EQ(console.failure(false), EPIPE);
  console.write(false, "lost too");
  EXPECT_TRUE(console.idle());
}

}  // namespace
}  // namespace lockstep
