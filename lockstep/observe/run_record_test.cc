#include "lockstep/observe/run_record.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

namespace lockstep {
namespace {

using nlohmann::json;
using testing::HasSubstr;

json ready() {
  return {{"event", "ready"},
          {"rank", 0},
          {"train_samples", 60000},
          {"test_samples", 10000},
          {"parameters", 109386},
          {"steps_per_epoch", 100},
          {"epochs", 3}};
}

json step(int number, double clock, json loss = 0.5) {
  return {{"event", "step"},       {"epoch", (number - 1) / 100 + 1},
          {"step", number},        {"loss", loss},
          {"grad_norm", 1.5},      {"lr", 0.001},
          {"clock", clock},        {"samples", 600 * number},
          {"steps_per_epoch", 100}};
}

json epoch(int number) {
  return {{"event", "epoch"},          {"epoch", number},
          {"step", 100 * number},      {"train_loss", 0.25},
          {"test_loss", 0.125},        {"test_accuracy", 0.875},
          {"samples", 60000 * number}, {"seconds", 2.0},
          {"eval_seconds", 0.5},       {"lr", 0.001},
          {"grad_norm", 1.0}};
}

json rank(int number) {
  return {{"event", "rank"},
          {"rank", number},
          {"seconds", {{"data", 1.0}, {"forward", 2.0}, {"other", 7.0}}},
          {"total_s", 10.0},
          {"cpu_s", 9.0},
          {"peak_memory_bytes", 123456789}};
}

RunRecord trained(int epochs) {
  RunRecord run;
  run.title = "mnist: mlp";
  run.workers = 2;
  run.start_clock = 10;
  run.take(ready());
  run.take({{"event", "first_step"}, {"rank", 0}, {"clock", 10.75}});
  for (int i = 1; i <= epochs; ++i) run.take(epoch(i));
  run.take(rank(0));
  run.take(rank(1));
  run.take({{"event", "solution"}, {"values", {{"distance", 0.5}}}});
  run.take({{"event", "finished"}, {"reason", "3 epochs"}, {"epochs", 3}, {"steps", 300}});
  return run;
}

TEST(RunRecord, Start) {
  EXPECT_EQ(describe_start(trained(0)),
            "mnist: mlp\n60,000 training and 10,000 test samples, 109,386 parameters, 100 steps an "
            "epoch\n");
}

TEST(RunRecord, ProgressBeforeTheFirstStep) {
  RunRecord run;
  EXPECT_EQ(progress_line(run, 80), "starting 1 worker …");
  run.workers = 4;
  EXPECT_EQ(progress_line(run, 80), "starting 4 workers …");
}

TEST(RunRecord, Progress) {
  RunRecord run;
  run.take(ready());
  run.take({{"event", "first_step"}, {"rank", 0}, {"clock", 10.0}});
  run.take(step(1, 10.0));
  run.take(step(51, 11.0));  // 50 steps of 600 samples in a second; 249 steps to go
  EXPECT_EQ(progress_line(run, 100),
            "epoch 1/3 [===================>                   ]  51 %  loss 0.5000  30,000 "
            "samples/s  0:05 left");
  EXPECT_EQ(progress_line(run, 72),
            "epoch 1/3 [=====>     ]  51 %  loss 0.5000  30,000 samples/s  0:05 left");
  EXPECT_EQ(progress_line(run, 30), "epoch 1/3   51 %  loss 0.5000");  // without room for a bar
  run.take(step(100, 12.0, nullptr));
  EXPECT_THAT(progress_line(run, 100), HasSubstr("=] 100 %  loss nan"));
  for (int columns = 0; columns < 120; ++columns)
    EXPECT_LT(static_cast<int>(progress_line(run, columns).size()), std::max(columns, 1));
}

TEST(RunRecord, RatesLeaveEvaluationOut) {
  RunRecord run;
  run.take(ready());
  run.take({{"event", "first_step"}, {"rank", 0}, {"clock", 10.0}});
  run.take(step(1, 10.0));
  run.take(step(100, 12.0));
  run.take(epoch(1));         // half a second of evaluation
  run.take(step(150, 13.5));  // 50 steps in 1.0 s of training
  EXPECT_NEAR(run.samples_per_s, 29700 + (1 - std::exp(-1.0)) * 300, 1);
}

TEST(RunRecord, TheFirstStepTellsNoRate) {
  RunRecord run;
  run.take(ready());
  run.take({{"event", "first_step"}, {"rank", 0}, {"clock", 10.0}});
  run.take(step(1, 10.0001));  // as good as no time after the first step's own end
  EXPECT_EQ(run.samples_per_s, 0);
  run.take(step(100, 12.0001));
  EXPECT_NEAR(run.samples_per_s, 29700, 1);
}

TEST(RunRecord, EpochLine) {
  EXPECT_EQ(epoch_line(trained(2)),
            "epoch 2/3  train loss 0.2500  test loss 0.1250  accuracy 87.50 %  2.00 s  30,000 "
            "samples/s");
}

TEST(RunRecord, ClosingTables) {
  EXPECT_EQ(closing_tables(trained(2), 6.0),
            "\n"
            "epoch  train loss  test loss  accuracy  seconds  samples/s\n"
            "    1      0.2500     0.1250   87.50 %     2.00     30,000\n"
            "    2      0.2500     0.1250   87.50 %     2.00     30,000\n"
            "\n"
            "rank  data  forward  backward  communication  waiting  optimizer  evaluation  other   "
            "CPU    memory\n"
            "   0  10 %     20 %       0 %            0 %      0 %        0 %         0 %   70 %  "
            "90 %  123.5 MB\n"
            "   1  10 %     20 %       0 %            0 %      0 %        0 %         0 %   70 %  "
            "90 %  123.5 MB\n"
            "\n"
            "6.00 s in all, 0.75 s to the first step, 30,000 samples/s; stopped: 3 epochs\n");
}

TEST(RunRecord, WhatTravelledWhileARankComputed) {
  RunRecord run = trained(1);
  run.ranks[1]["queued"] = {{"hidden", 1.5}, {"exposed", 0.25}};
  run.ranks[1]["total_s"] = 6.0;
  EXPECT_THAT(closing_tables(run, 6.0), HasSubstr("other  hidden    CPU    memory\n"));
  EXPECT_THAT(closing_tables(run, 6.0), HasSubstr(" %    25 %  "));
  const auto ranks = report_of(run, 6.0, "").at("ranks");
  EXPECT_FALSE(ranks[0].contains("hidden_s"));
  EXPECT_EQ(ranks[1]["hidden_s"], 1.5);
  EXPECT_EQ(ranks[1]["exposed_s"], 0.25);
}

TEST(RunRecord, ManyEpochsAreShortened) {
  const std::string text = closing_tables(trained(100), 6.0);
  EXPECT_THAT(text, HasSubstr("\n    4 "));
  EXPECT_THAT(text, HasSubstr("\n  ...\n   81 "));
  EXPECT_THAT(text, HasSubstr("\n  100 "));
  EXPECT_THAT(text, testing::Not(HasSubstr("\n    5 ")));
  EXPECT_THAT(text, testing::Not(HasSubstr("\n   80 ")));
}

TEST(RunRecord, ColumnsWithoutAnyValueAreLeftOut) {
  RunRecord run;
  run.take({{"event", "epoch"},
            {"epoch", 1},
            {"step", 5},
            {"train_loss", nullptr},
            {"samples", 10},
            {"seconds", 0.0},
            {"eval_seconds", 0.0}});
  EXPECT_THAT(closing_tables(run, 1.0), HasSubstr("epoch  train loss  seconds  samples/s\n"
                                                  "    1         nan     0.00          0\n"));
}

TEST(RunRecord, Report) {
  const nlohmann::ordered_json report = report_of(trained(2), 6.0, "abc");
  EXPECT_EQ(report["workers"], 2);
  ASSERT_EQ(report["epochs"].size(), 2u);
  EXPECT_EQ(report["epochs"][1]["epoch"], 2);
  EXPECT_EQ(report["epochs"][1]["test_accuracy"], 0.875);
  EXPECT_EQ(report["epochs"][1]["samples_per_s"], 30000.0);
  EXPECT_EQ(report["samples_per_s"], 30000.0);
  EXPECT_EQ(report["start_to_first_step_s"], 0.75);
  EXPECT_EQ(report["weights_sha256"], "abc");
  EXPECT_EQ(report["stopped_because"], "3 epochs");
  EXPECT_EQ(report["solution"]["distance"], 0.5);
  ASSERT_EQ(report["ranks"].size(), 2u);
  EXPECT_EQ(report["ranks"][1]["rank"], 1);
  EXPECT_EQ(report["ranks"][1]["share"]["forward"], 0.2);
  EXPECT_EQ(report["ranks"][1]["share"]["backward"], 0.0);
  EXPECT_EQ(report["ranks"][1]["cpu_use"], 0.9);
  EXPECT_EQ(report["ranks"][1]["peak_memory_bytes"], 123456789);
}

TEST(RunRecord, AReportOfNothing) {
  const nlohmann::ordered_json report = report_of({}, 1.0, "");
  EXPECT_TRUE(report["weights_sha256"].is_null());
  EXPECT_TRUE(report["start_to_first_step_s"].is_null());
  EXPECT_EQ(report["samples_per_s"], 0.0);
}

TEST(RunRecord, RefusesEventsWithoutTheirMembers) {
  RunRecord run;
  EXPECT_THROW(run.take({{"event", "ready"}}), json::exception);
  EXPECT_THROW(run.take({{"event", "step"}, {"clock", "late"}}), json::exception);
  EXPECT_THROW(run.take({{"event", "finished"}, {"reason", 7}}), json::exception);
  EXPECT_NO_THROW(run.take({{"event", "of another kind"}}));
}

}  // namespace
}  // namespace lockstep
