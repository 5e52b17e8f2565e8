#include "lockstep/observe/event.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <nlohmann/json.hpp>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using nlohmann::json;

std::vector<std::byte> frame(std::string_view text) {
  std::vector<std::byte> bytes(4 + text.size());
  write_little_endian(static_cast<std::uint32_t>(text.size()), bytes.data());
  std::memcpy(bytes.data() + 4, text.data(), text.size());
  return bytes;
}

TEST(Event, TravelsThroughAPipe) {
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  UniqueFd read_end(ends[0]);
  const json sent = {{"event", "step"}, {"loss", 0.25}, {"text", "café \xff"}};
  {
    PipeEventSink sink{UniqueFd(ends[1])};
    sink.emit(sent);
    sink.emit({{"event", "finished"}});
  }
  std::vector<std::byte> bytes(4096);
  const ssize_t count = ::read(read_end.get(), bytes.data(), bytes.size());
  ASSERT_GT(count, 0);
  bytes.resize(static_cast<std::size_t>(count));

  // In every cut: one byte at a time.
  EventReader reader;
  std::vector<json> events;
  for (std::byte byte : bytes) {
    for (json& event : reader.feed(std::span(&byte, 1))) events.push_back(std::move(event));
  }
  ASSERT_EQ(events.size(), 2u);
  EXPECT_EQ(events[0]["loss"], 0.25);
  EXPECT_EQ(events[0]["text"], "café \xef\xbf\xbd");  // the byte that is no UTF-8 is replaced
  EXPECT_EQ(events[1]["event"], "finished");
  EXPECT_FALSE(reader.in_the_middle());
}

TEST(Event, KnowsThatAFrameHasBegun) {
  EventReader reader;
  const auto bytes = frame(R"({"event":"ready"})");
  EXPECT_TRUE(reader.feed(std::span(bytes).first(bytes.size() - 1)).empty());
  EXPECT_TRUE(reader.in_the_middle());
}

TEST(Event, RefusesWhatIsNoEvent) {
  for (const char* text :
       {"", "{", "[]", "1", R"({"event":1})", R"({"kind":"step"})", R"({"event":"step"} x)"}) {
    EventReader reader;
    EXPECT_THROW(reader.feed(frame(text)), Error) << text;
  }
  std::byte header[4];
  write_little_endian(static_cast<std::uint32_t>(kMaxEventBytes + 1), header);
  EventReader reader;
  EXPECT_THROW(reader.feed(header), Error);
}

TEST(Event, AClosedPipeIsAnError) {
  ::signal(SIGPIPE, SIG_IGN);
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  ::close(ends[0]);
  PipeEventSink sink{UniqueFd(ends[1])};
  EXPECT_THROW(sink.emit({{"event", "step"}}), Error);
}

}  // namespace
}  // namespace lockstep
