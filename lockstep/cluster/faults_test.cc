#include "lockstep/cluster/faults.h"

#include <gmock/gmock.h>
#include <signal.h>

#include <algorithm>
#include <set>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::ThrowsMessage;

FaultPlan parse(const std::vector<std::string>& lines, int ranks = 4) {
  return parse_faults(lines, ranks);
}
Fault parse_one(const std::string& line) { return parse({line}).faults.at(0); }

TEST(Faults, Kinds) {
  EXPECT_EQ(parse_one("kill rank=1 step=37"), (Fault{.rank = 1, .step = 37}));
  EXPECT_EQ(parse_one(" kill  step=37\trank=1 when=sealed signal=SIGSEGV # why"),
            (Fault{.rank = 1, .step = 37, .when = Point::sealed, .signal = SIGSEGV}));
  EXPECT_EQ(parse_one("kill rank=0 step=1 signal=TERM").signal, SIGTERM);
  EXPECT_EQ(
      parse_one("delay rank=2 step=3 seconds=250ms when=start"),
      (Fault{
          .kind = FaultKind::delay, .rank = 2, .step = 3, .when = Point::start, .seconds = 0.25}));
  EXPECT_EQ(parse_one("exit rank=0 step=9 code=3").code, 3);
  EXPECT_EQ(parse_one("full-disk step=9"),
            (Fault{.kind = FaultKind::full_disk, .step = 9, .when = Point::committed}));
  EXPECT_EQ(parse_one("throw rank=0 step=9").kind, FaultKind::throws);
  EXPECT_EQ(parse_one("oom-kill rank=0 step=9").kind, FaultKind::oom_kill);
}

TEST(Faults, ManyLinesWithComments) {
  const FaultPlan plan = parse({"# nothing", "", "stop rank=0 step=2", "kill every=5s seed=3",
                                "kill every=200ms seed=4 for=300s", "loop rank=1 step=3"});
  EXPECT_EQ(plan.faults.size(), 2u);
  EXPECT_EQ(plan.faults[1].kind, FaultKind::loop);
  EXPECT_EQ(plan.timed, (std::vector<TimedKills>{{.every_s = 5, .seed = 3},
                                                 {.every_s = 0.2, .for_s = 300, .seed = 4}}));
}

TEST(Faults, TextReadsBack) {
  const std::vector<Fault> faults =
      parse({"kill rank=1 step=37 signal=SEGV", "stop rank=1 step=1", "deadlock rank=0 step=5",
             "delay rank=1 step=2 seconds=0.5", "mismatch rank=0 step=3 when=committed",
             "out-of-memory rank=1 step=6", "full-disk step=4 rank=1", "exit rank=1 step=2 code=9",
             "random kills=20 seed=7 from=10 to=500"})
          .faults;
  EXPECT_EQ(faults.size(), 28u);
  EXPECT_EQ(faults_from_text(to_text(faults)), faults);
  EXPECT_THAT(faults_from_text(""), testing::IsEmpty());
}

TEST(Faults, RandomIsAFunctionOfSeedAndBounds) {
  const std::vector<Fault> faults = parse({"random kills=200 seed=7 from=10 to=60"}).faults;
  EXPECT_EQ(faults, parse({"random kills=200 seed=7 from=10 to=60"}).faults);
  EXPECT_NE(faults, parse({"random kills=200 seed=8 from=10 to=60"}).faults);
  std::set<int> ranks;
  std::set<std::uint64_t> steps;
  std::set<Point> points;
  for (const Fault& fault : faults) {
    EXPECT_EQ(fault.kind, FaultKind::kill);
    ranks.insert(fault.rank), steps.insert(fault.step), points.insert(fault.when);
  }
  EXPECT_EQ(ranks, (std::set{0, 1, 2, 3}));
  EXPECT_GE(*steps.begin(), 10u);
  EXPECT_LE(*steps.rbegin(), 60u);
  EXPECT_GT(steps.size(), 40u);
  EXPECT_EQ(points.size(), 6u);  // those that every step has
}

TEST(Faults, WrongOnesAreSaid) {
  const auto expect = [](const std::string& line, const char* what, const char* hint) {
    EXPECT_THAT([&] { parse({line}); },
                ThrowsMessage<ConfigError>(AllOf(HasSubstr(what), HasSubstr(hint))))
        << line;
  };
  expect("kil rank=1 step=3", "the fault \"kil rank=1 step=3\"", "did you mean kill?");
  expect("earthquake", "no fault of this name", "one of random, kill, stop");
  expect("kill rank=1", "step is missing", "hint: kill rank= step= [when=] [signal=]");
  expect("kill rank=1 step=3 wen=start", "kill has no wen", "did you mean when=?");
  expect("kill rank=1 step=3 when=later", "when=later is unknown", "computed, sealed");
  expect("kill rank=-1 step=3", "rank is not a whole number", "rank=0");
  expect("kill rank=1 step=0", "step is not a whole number from 1", "step=1");
  expect("kill rank=1 step=3 step=4", "step is there twice", "kill rank=");
  expect("kill rank=1 step=3 signal=BANG", "signal=BANG is unknown", "SEGV");
  expect("kill rank=1 step", "step has no value", "hint");
  expect("delay rank=1 step=3 seconds=5x", "seconds is no time", "seconds=200ms");
  expect("delay rank=1 step=3 seconds=nan", "seconds is no time", "seconds=5s");
  expect("exit rank=1 step=3 code=256", "from 0 to 255", "code=0");
  expect("random kills=3 seed=1 from=5 to=4", "to is not a whole number from 5", "to=5");
  expect("random kills=257 seed=1 from=5 to=9", "kills is not a whole number", "kills=1");
  expect("kill every=5s", "seed is missing", "kill every= seed= [for=]");
  expect("kill \x01", "kill has no ?", "hint");
  EXPECT_THAT(
      [] {
        parse({"random kills=256 seed=1 from=1 to=9", "kill rank=0 step=1"});
      },
      ThrowsMessage<ConfigError>(AllOf(HasSubstr("more than 256"), HasSubstr("kill every=5s"))));
}

TEST(Faults, TimedKillsStrikeOnceAnInterval) {
  KillTimer timer({.every_s = 5, .for_s = 60, .seed = 3});
  const Clock::time_point start = Clock::now();
  const auto at = [&](double seconds, int members = 4) {
    return timer.due(
        start + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)),
        members);
  };
  EXPECT_EQ(at(0), -1);
  EXPECT_EQ(at(4.9), -1);
  EXPECT_EQ(at(5.1, 0), -1);  // nobody is there yet
  const int victim = at(5.2);
  EXPECT_GE(victim, 0);
  EXPECT_LT(victim, 4);
  EXPECT_EQ(at(9.9), -1);
  EXPECT_GE(at(31), 0);  // what was missed is lost
  EXPECT_EQ(at(34.9), -1);
  EXPECT_EQ(at(61), -1);  // over
  std::set<int> victims;
  KillTimer endless({.every_s = 1, .seed = 3});
  for (int i = 0; i < 100; ++i) victims.insert(endless.due(start + std::chrono::seconds(i), 4));
  EXPECT_EQ(victims, (std::set{-1, 0, 1, 2, 3}));
}

}  // namespace
}  // namespace lockstep
