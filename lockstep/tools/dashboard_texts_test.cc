#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lockstep/observe/status.h"
#include "lockstep/tools/dashboard.h"

namespace lockstep {
namespace {

using testing::HasSubstr;
using testing::Not;

constexpr const char* kHostile = "</script><script>alert(1)</script>\"\\\n<!-- {{data}}";

nlohmann::json status(const std::string& title) {
  Status job({.title = title, .folder = "runs/a", .workers = 2, .started = 100});
  job.on_event(0,
               {{"event", "rank"},
                {"rank", 0},
                {"seconds", {{"data", 1.5}, {"forward", 2.0}}},
                {"total_s", 4.0},
                {"cpu_s", 3.0},
                {"peak_memory_bytes", 1000}},
               101);
  return job.json(110);
}

TEST(DashboardTexts, Prometheus) {
  const std::string text = prometheus_text(status(kHostile));
  EXPECT_THAT(text, HasSubstr("# TYPE lockstep_healthy gauge\nlockstep_healthy 1\n"));
  EXPECT_THAT(text, HasSubstr("\nlockstep_uptime_seconds 10\n"));
  EXPECT_THAT(text, HasSubstr("# TYPE lockstep_steps_total counter\nlockstep_steps_total 0\n"));
  EXPECT_THAT(text, HasSubstr(R"(lockstep_phase_seconds_total{rank="0",phase="data"} 1.5)"));
  EXPECT_THAT(text, HasSubstr(R"(title="</script><script>alert(1)</script>\"\\\n<!--)"));
  EXPECT_THAT(text, Not(HasSubstr("lockstep_generation")));  // not known: not there
}

TEST(DashboardTexts, DataCannotLeaveItsElement) {
  const std::string empty = status_page(nullptr), page = status_page(status(kHostile));
  const auto count = [](const std::string& text, const std::string& part) {
    int found = 0;
    for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos; ++at) ++found;
    return found;
  };
  for (const char* mark : {"<script", "</script", "<!--"})
    EXPECT_EQ(count(page, mark), count(empty, mark)) << mark;
  const std::size_t begin = page.find("id=\"data\">") + 10;
  const auto data = nlohmann::json::parse(page.substr(begin, page.find("</script>") - begin));
  EXPECT_EQ(data.at("title"), kHostile);
  EXPECT_THAT(empty, HasSubstr("id=\"data\">null</script>"));
}

TEST(DashboardTexts, ThePolicyNamesThePagesOwnScriptAndStyle) {
  const std::string policy = page_policy();
  EXPECT_THAT(policy, HasSubstr("default-src 'none'"));
  EXPECT_THAT(policy, testing::ContainsRegex("script-src 'sha256-[A-Za-z0-9+/]+='"));
  EXPECT_THAT(policy, testing::ContainsRegex("style-src 'sha256-[A-Za-z0-9+/]+='"));
  EXPECT_THAT(status_page(nullptr), HasSubstr("content=\"" + policy + "\""));
}

}  // namespace
}  // namespace lockstep
