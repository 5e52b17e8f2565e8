// Connections that break, and messages that never come, at every point of a call: all ranks end
// with a named CommError, in time.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lockstep/collective/backends_test.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::AnyOf;
using ::testing::HasSubstr;

// From its n-th send on, it is broken or silent.
class FaultyTransport final : public Transport {
 public:
  enum class Fault { breaks, falls_silent };
  FaultyTransport(std::unique_ptr<Transport> inner, Fault fault, int after)
      : inner_(std::move(inner)), fault_(fault), left_(after) {}
  std::string_view name() const override { return "faulty"; }
  int rank() const override { return inner_->rank(); }
  int size() const override { return inner_->size(); }
  std::string describe(int peer) const override { return inner_->describe(peer); }
  Ticket send(int to, std::uint16_t channel, std::span<const std::byte> bytes) override {
    if (left_-- > 0) return inner_->send(to, channel, bytes);
    if (fault_ == Fault::falls_silent) return kSilent;
    inner_->abort();
    throw TransportError(to, "faulty: the link was cut");
  }
  Ticket receive(int from, std::uint16_t channel, std::span<std::byte> bytes) override {
    return inner_->receive(from, channel, bytes);
  }
  bool done(Ticket ticket) override { return ticket == kSilent || inner_->done(ticket); }
  void wait(Clock::duration at_most) override { inner_->wait(at_most); }
  void abort() noexcept override { inner_->abort(); }

 private:
  static constexpr Ticket kSilent = ~Ticket{0};
  const std::unique_ptr<Transport> inner_;
  const Fault fault_;
  int left_;
};

constexpr int kRanks = 3;

// All ranks' errors when rank 1's transport fails after so many sends.
std::vector<std::string> errors_of(FaultyTransport::Fault fault, int after) {
  const LoopbackNodes nodes(kRanks);
  std::vector<std::string> errors(kRanks);
  const auto timeout = fault == FaultyTransport::Fault::breaks ? Clock::duration(kTestTimeout)
                                                               : Clock::duration(100ms);
  run_threads(kRanks, [&](int rank) {
    errors[rank] = error_of([&] {
      auto transport = nodes.connect(rank);
      if (rank == 1)
        transport = std::make_unique<FaultyTransport>(std::move(transport), fault, after);
      auto group = make_remote_group(std::move(transport), {.timeout = timeout, .key = "key"});
      std::vector<std::byte> data(300'000);
      group->all_reduce(data, Dtype::float32, Reduction::sum, {.tag = "gradients"});
      group->broadcast(data, Dtype::float32, 1, {.tag = "weights"});
      group->barrier({.tag = "end"});
    });
  });
  return errors;
}

bool is_named(const std::string& error) {
  return error.starts_with("rank ") || error.starts_with("faulty: ");
}

TEST(RemoteFaultTest, ABrokenConnectionEndsAllRanksAtEveryPoint) {
  int after = 0;
  for (;; ++after) {
    const auto errors = errors_of(FaultyTransport::Fault::breaks, after);
    if (errors == std::vector<std::string>(kRanks, "no error")) break;  // more than it sends
    ASSERT_LT(after, 200);
    for (int rank = 0; rank < kRanks; ++rank) {
      // What was missing at the very end, notices that it leaves, nobody else needs.
      if (errors[rank] == "no error") continue;
      EXPECT_TRUE(is_named(errors[rank])) << after << ": " << errors[rank];
      EXPECT_THAT(errors[rank], AnyOf(HasSubstr("has left"), HasSubstr("the link was cut"),
                                      HasSubstr("ended the group: rank")))
          << after;
    }
  }
  EXPECT_GT(after, 20);
}

TEST(RemoteFaultTest, WhatNeverComesEndsAllRanksWithTheDeadline) {
  for (const int after : {0, 3, 9, 17, 19, 21, 22, 24}) {
    const auto errors = errors_of(FaultyTransport::Fault::falls_silent, after);
    for (int rank = 0; rank < kRanks; ++rank)
      if (errors[rank] != "no error") {
        EXPECT_TRUE(is_named(errors[rank])) << after << ": " << errors[rank];
      }
    EXPECT_THAT(errors[0] + errors[1] + errors[2], HasSubstr("gave up after")) << after;
  }
}

}  // namespace
}  // namespace lockstep
