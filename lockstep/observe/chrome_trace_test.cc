#include "lockstep/observe/chrome_trace.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

namespace lockstep {
namespace {

TEST(ChromeTraceTest, ACompleteEvent) {
  EXPECT_EQ(chrome_event({.process = 1,
                          .thread = 2,
                          .name = "barrier",
                          .start_ns = 1'234'567,
                          .duration_ns = 1'005,
                          .arguments = {{"tag", "a"}, {"bytes", std::uint64_t{40}}, {"s", 0.5}}}),
            R"({"name":"barrier","ph":"X","pid":1,"tid":2,"ts":1234.567,"dur":1.005,)"
            R"("args":{"tag":"a","bytes":40,"s":0.5}})");
}

TEST(ChromeTraceTest, NothingBreaksTheJson) {
  const auto event = nlohmann::json::parse(
      chrome_event({.name = "\"\\\n\xff",
                    .start_ns = std::numeric_limits<std::int64_t>::min(),
                    .duration_ns = -1,
                    .arguments = {{"number", std::nan("")}, {"text", "\x01\"\xc3"}}}));
  EXPECT_EQ(event.at("name"), "\"\\\n\xef\xbf\xbd");
  EXPECT_EQ(event.at("ts"), 0);
  EXPECT_EQ(event.at("dur"), 0);
  EXPECT_TRUE(event.at("args").at("number").is_null());
}

TEST(ChromeTraceTest, AWholeTraceIsJson) {
  const std::string text = std::string(kChromeTraceHead) + chrome_process_name(3, "rank 3") + "," +
                           chrome_thread_name(3, 0, "all") + "," + chrome_event({.process = 3}) +
                           std::string(kChromeTraceTail);
  const auto trace = nlohmann::json::parse(text);
  ASSERT_EQ(trace.at("traceEvents").size(), 3u);
  EXPECT_EQ(trace["traceEvents"][0]["args"]["name"], "rank 3");
  EXPECT_EQ(trace["traceEvents"][1]["name"], "thread_name");
  EXPECT_EQ(trace["traceEvents"][2]["pid"], 3);
}

}  // namespace
}  // namespace lockstep
