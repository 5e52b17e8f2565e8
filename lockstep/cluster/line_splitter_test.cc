#include "lockstep/cluster/line_splitter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <vector>

namespace lockstep {
namespace {

std::vector<std::string> split(const std::string& text, std::size_t chunk) {
  std::vector<std::string> lines;
  const auto keep = [&](std::string_view line) { lines.emplace_back(line); };
  LineSplitter splitter;
  for (std::size_t at = 0; at < text.size(); at += chunk)
    splitter.feed(text.substr(at, chunk), keep);
  splitter.finish(keep);
  return lines;
}

TEST(LineSplitter, AnyCutGivesTheSameLines) {
  const std::string text = "one\n\nthree\nlast";
  for (std::size_t chunk = 1; chunk <= text.size(); ++chunk)
    EXPECT_THAT(split(text, chunk), testing::ElementsAre("one", "", "three", "last")) << chunk;
}

TEST(LineSplitter, ALongLineComesInPieces) {
  for (std::size_t chunk : {std::size_t{1000}, kMaxLineBytes, 10 * kMaxLineBytes}) {
    EXPECT_THAT(split(std::string(kMaxLineBytes + 5, 'x') + "\nnext\n", chunk),
                testing::ElementsAre(std::string(kMaxLineBytes, 'x'), "xxxxx", "next"));
    EXPECT_THAT(split(std::string(2 * kMaxLineBytes, 'x') + "\nnext\n\n", chunk),
                testing::ElementsAre(std::string(kMaxLineBytes, 'x'),
                                     std::string(kMaxLineBytes, 'x'), "next", ""));
  }
}

}  // namespace
}  // namespace lockstep
