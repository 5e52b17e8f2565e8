#include "lockstep/observe/run_log.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/resource.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/observe/append_file.h"

namespace lockstep {
namespace {

using nlohmann::json;
using testing::HasSubstr;
namespace fs = std::filesystem;

class RunLogTest : public testing::Test {
 protected:
  RunLogTest() {
    char name[] = "/tmp/lockstep-run-log-test-XXXXXX";
    folder_ = ::mkdtemp(name);
  }
  ~RunLogTest() override { fs::remove_all(folder_); }

  RunLogOptions options(bool terminal = false, bool quiet = false) {
    return {.output = folder_,
            .report_copy = folder_ / "copy.json",
            .quiet = quiet,
            .terminal = terminal,
            .columns = 80,
            .workers = 2,
            .start_clock = 100,
            .start_time = 1700000000,
            .title = "a title",
            .clock = [] { return 107.0; },
            .print = [this](std::string_view text) { printed_ += text; }};
  }
  static json ready(int rank) {
    return {{"event", "ready"}, {"rank", rank},         {"train_samples", 40}, {"test_samples", 0},
            {"parameters", 5},  {"steps_per_epoch", 2}, {"epochs", 1}};
  }
  static void train(RunLog& log) {
    log.on_event(0, ready(0));
    log.on_event(0, {{"event", "first_step"}, {"rank", 0}, {"clock", 101.5}});
    log.on_event(0, {{"event", "step"},
                     {"epoch", 1},
                     {"step", 1},
                     {"steps_per_epoch", 2},
                     {"loss", nullptr},
                     {"grad_norm", 1.0},
                     {"lr", 0.1},
                     {"samples", 20},
                     {"clock", 102.0}});
    log.on_tick();
    log.on_event(0, {{"event", "message"}, {"text", "a message"}});
    log.on_event(0, {{"event", "epoch"},
                     {"epoch", 1},
                     {"step", 2},
                     {"train_loss", 0.5},
                     {"grad_norm", 1.0},
                     {"lr", 0.1},
                     {"samples", 40},
                     {"seconds", 4.0},
                     {"eval_seconds", 0.0}});
    log.on_event(0, {{"event", "finished"}, {"reason", "1 epoch"}, {"epochs", 1}, {"steps", 2}});
  }
  json report() { return json::parse(read_text_file(folder_ / "report.json")); }

  fs::path folder_;
  std::string printed_;
};

TEST_F(RunLogTest, PlainLines) {
  RunLog log(options());
  EXPECT_FALSE(log.files_made());
  EXPECT_TRUE(fs::is_empty(folder_));
  train(log);
  log.finish("abc", {folder_ / "model.safetensors"});
  EXPECT_THAT(printed_,
              testing::StartsWith("a title\n40 training samples, 5 parameters, 2 steps an epoch\n"
                                  "a message\n"
                                  "epoch 1/1  train loss 0.5000  4.00 s  10 samples/s\n"));
  EXPECT_THAT(printed_, testing::Not(HasSubstr("\r")));
  EXPECT_THAT(printed_, HasSubstr("7.00 s in all, 1.50 s to the first step, 10 samples/s"));
  for (const char* name : {"model.safetensors", "report.json", "metrics.jsonl", "copy.json"})
    EXPECT_THAT(printed_, HasSubstr("  " + (folder_ / name).string()));
  EXPECT_EQ(report(), json::parse(read_text_file(folder_ / "copy.json")));
  EXPECT_EQ(report()["weights_sha256"], "abc");

  const std::string metrics = read_text_file(folder_ / "metrics.jsonl");
  ASSERT_EQ(std::count(metrics.begin(), metrics.end(), '\n'), 2);
  const json first = json::parse(metrics.substr(0, metrics.find('\n')));
  EXPECT_EQ(first["event"], "step");
  EXPECT_TRUE(first["loss"].is_null());
}

TEST_F(RunLogTest, ABarOnATerminal) {
  RunLog log(options(/*terminal=*/true));
  EXPECT_EQ(printed_, "\r\x1b[Kstarting 2 workers …");
  train(log);
  // The line of the message replaces the bar, which the next tick draws anew.
  EXPECT_THAT(printed_, HasSubstr("\r\x1b[Kepoch 1/1 ["));
  EXPECT_THAT(printed_, HasSubstr("\r\x1b[Ka message\n"));
  log.on_tick();
  log.fail("why", "");
  EXPECT_THAT(printed_, testing::EndsWith("\r\x1b[K"));
}

TEST_F(RunLogTest, QuietPrintsNothing) {
  RunLog log(options(/*terminal=*/true, /*quiet=*/true));
  train(log);
  log.on_tick();
  log.finish("abc", {});
  EXPECT_EQ(printed_, "");
}

TEST_F(RunLogTest, AFailureIsReported) {
  RunLog log(options());
  train(log);
  log.fail("rank 1 (pid 7): killed by signal 9 (SIGKILL)", "abc");
  EXPECT_EQ(report()["failed"], "rank 1 (pid 7): killed by signal 9 (SIGKILL)");
  EXPECT_EQ(report()["epochs"].size(), 1u);
}

TEST_F(RunLogTest, AFailureBeforeTheFilesLeavesNone) {
  RunLog log(options());
  log.fail("why", "");
  EXPECT_TRUE(fs::is_empty(folder_));
}

TEST_F(RunLogTest, StepsBeforeReadyAreRefused) {
  RunLog log(options());
  EXPECT_THROW(log.on_event(0, {{"event", "epoch"},
                                {"epoch", 1},
                                {"step", 2},
                                {"train_loss", 0.5},
                                {"samples", 40},
                                {"seconds", 4.0},
                                {"eval_seconds", 0.0}}),
               Error);
}

TEST_F(RunLogTest, WhatDoesNotFitIsTakenBack) {
  AppendFile file(folder_ / "records");
  file.append(as_byte_span("whole\n"));
  // A limit on file sizes stands for a full disk.
  ::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit small{10, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  std::string message;
  try {
    file.append(as_byte_span("too long for it\n"));
  } catch (const Error& error) {
    message = error.what();
  }
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_THAT(message, HasSubstr("cannot write " + (folder_ / "records").string()));
  EXPECT_THAT(message, HasSubstr(" free)"));
  EXPECT_EQ(read_text_file(folder_ / "records"), "whole\n");
}

TEST_F(RunLogTest, AFileThatCannotBeMadeIsNamed) {
  try {
    AppendFile file(folder_ / "nowhere" / "records");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("nowhere/records: No such file or directory"));
  }
}

// What metrics.jsonl has not, from the program's start on, each with its time and whom it is from.
TEST_F(RunLogTest, TheHistory) {
  RunLog log(options());
  log.on_event(-1, {{"event", "worker"}, {"seat", 0}, {"state", "starting"}});
  EXPECT_FALSE(fs::exists(folder_ / kHistoryFile));
  train(log);
  log.on_event(1, {{"event", "message"}, {"text", "\xff"}});
  log.on_event(1, {{"event", "rank"},
                   {"rank", 1},
                   {"seconds", json::object()},
                   {"total_s", 1.0},
                   {"cpu_s", 1.0},
                   {"peak_memory_bytes", 5}});
  log.fail("it broke", "");
  std::istringstream lines(read_text_file(folder_ / kHistoryFile));
  std::vector<std::pair<int, std::string>> found;
  for (std::string line; std::getline(lines, line);) {
    const json event = json::parse(line);
    EXPECT_EQ(event.at("time"), 1700000007.0);
    found.emplace_back(event.at("from"), event.at("event"));
  }
  using Row = std::pair<int, std::string>;
  EXPECT_THAT(found, testing::ElementsAre(Row{-1, "run"}, Row{-1, "worker"}, Row{0, "ready"},
                                          Row{0, "first_step"}, Row{0, "message"},
                                          Row{0, "finished"}, Row{1, "message"}, Row{-1, "end"}));
}

// The checkpoint of step 3 knows epoch 1; a line of it is missing, one of step 4 is there.
TEST_F(RunLogTest, AResumedRunGoesOnWithItsFiles) {
  const json epoch = {{"event", "epoch"},  {"epoch", 1},       {"step", 2},
                      {"train_loss", 0.5}, {"grad_norm", 1.0}, {"lr", 0.1},
                      {"samples", 40},     {"seconds", 4.0},   {"eval_seconds", 0.0}};
  write_file_atomically(folder_ / kHistoryFile, "{\"event\":\"run\"}\n{\"event\":\"wo");
  write_file_atomically(folder_ / "metrics.jsonl",
                        "{\"event\":\"step\",\"step\":1}\n{\"event\":\"step\",\"step\":3}\n"
                        "{\"event\":\"step\",\"step\":4}\n{\"event\":\"st");
  RunLogOptions with = options();
  with.resume = true;
  RunLog log(with);
  json first = ready(0);
  first["epochs"] = 2;
  first["resumed"] = {
      {"step", 3}, {"samples", 60}, {"epochs", {epoch}}, {"loss", 10.0}, {"weight", 20.0}};
  log.on_event(0, first);
  json second = epoch;
  second["epoch"] = 2;
  second["step"] = 4;
  second["samples"] = 80;
  log.on_event(0, second);
  log.on_event(0, {{"event", "finished"}, {"reason", "2 epochs"}, {"epochs", 2}, {"steps", 4}});
  log.finish("sum", {});
  second["time"] = 1700000007.0;
  EXPECT_EQ(read_text_file(folder_ / "metrics.jsonl"),
            "{\"event\":\"step\",\"step\":1}\n" + epoch.dump() +
                "\n{\"event\":\"step\",\"step\":3}\n" + second.dump() + "\n");
  EXPECT_THAT(read_text_file(folder_ / kHistoryFile),
              testing::StartsWith("{\"event\":\"run\"}\n{\"event\":\"wo\n{\"event\":\"run\","));
  EXPECT_EQ(report().at("resumed_step"), 3);
  ASSERT_EQ(report().at("epochs").size(), 2u);
  EXPECT_EQ(report().at("epochs")[1].at("samples_per_s"), 10.0);
  EXPECT_EQ(report().at("samples_per_s"), 10.0);
}

}  // namespace
}  // namespace lockstep
