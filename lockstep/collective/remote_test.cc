// What only ranks of different nodes have: joining with a key, connections that break, several
// groups over one transport. What every group does, conformance_test.cc holds them to.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <barrier>
#include <memory>

#include "lockstep/collective/backends_test.h"
#include "lockstep/collective/operation_record.h"
#include "lockstep/collective/remote_group.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::AllOf;
using ::testing::HasSubstr;

// What each of `size` ranks ends with; "no error" where body returns.
std::vector<std::string> errors_of(int size,
                                   const std::function<void(const LoopbackNodes&, int)>& body) {
  const LoopbackNodes nodes(size);
  std::vector<std::string> errors(size);
  run_threads(size, [&](int rank) { errors[rank] = error_of([&] { body(nodes, rank); }); });
  return errors;
}

std::unique_ptr<Group> join(const LoopbackNodes& nodes, int rank, GroupOptions options = {}) {
  if (options.timeout == kDefaultTimeout) options.timeout = kTestTimeout;
  return make_remote_group(nodes.connect(rank, options.generation), options);
}

TEST(RemoteJoinTest, WhoDoesNotKnowTheKeyIsRefusedByBoth) {
  const std::string keys[] = {"secret", "guess"};
  for (const std::string& error :
       errors_of(2, [&](const auto&nodes, int rank) { join(nodes, rank, {.key = keys[rank]}); }))
    EXPECT_THAT(error, AllOf(HasSubstr("cannot join generation 0: rank"),
                             HasSubstr("has another key for this job")));
  for (const std::string& error : errors_of(2, [&](const auto&nodes, int rank) {
         join(nodes, rank, {.key = rank == 0 ? "secret" : ""});
       }))
    EXPECT_THAT(error, HasSubstr("key for this job, this rank has"));
  for (const std::string& error : errors_of(
           3, [&](const auto&nodes, int rank) { join(nodes, rank, {.key = "secret"})->barrier(); }))
    EXPECT_EQ(error, "no error");
}

TEST(RemoteJoinTest, OtherOptionsAreRefused) {
  for (const std::string& error :
       errors_of(2, [&](const auto&nodes, int rank) { join(nodes, rank, {.exact = rank == 0}); }))
    EXPECT_THAT(error, HasSubstr("has exact ="));
}

TEST(RemoteJoinTest, WhoDoesNotComeIsNamed) {
  EXPECT_THAT(error_of([] {
                const LoopbackNodes nodes(3);
                join(nodes, 0, {.timeout = 20ms});
              }),
              HasSubstr("waiting for rank 1 (loopback:1), rank 2 (loopback:2), which has not"));
}

// Two ranks that call differently after a barrier; both errors.
std::vector<std::string> errors_of_two(const Body& rank_0, const Body& rank_1) {
  return errors_of(2, [&](const LoopbackNodes& nodes, int rank) {
    auto group = join(nodes, rank);
    group->barrier({.tag = "start"});
    (rank == 0 ? rank_0 : rank_1)(*group);
  });
}

Body sum_of(std::size_t bytes) {
  return [bytes](Group& group) {
    std::vector<std::byte> data(bytes);
    group.all_reduce(data, Dtype::float32, Reduction::sum, {.tag = "gradients"});
  };
}

TEST(RemoteErrorTest, BothRanksQuoteBothCalls) {
  const Body broadcast = [](Group& group) {
    std::vector<std::byte> data(40);
    group.broadcast(data, Dtype::float32, 0, {.tag = "weights"});
  };
  // Of lengths that travel on different lanes, and in a frame against behind it.
  for (const std::size_t bytes : {40, 400, 4000, 400'000})
    for (const std::string& error : errors_of_two(sum_of(bytes), broadcast))
      EXPECT_THAT(error, AllOf(HasSubstr("the ranks' calls differ: rank 0 called all_reduce"),
                               HasSubstr("tag 'gradients'), rank 1 called broadcast(float32"),
                               HasSubstr("tag 'weights')")));
  for (const std::string& error : errors_of_two(sum_of(40), sum_of(400'000)))
    EXPECT_THAT(error, AllOf(HasSubstr("× 10, sum"), HasSubstr("× 100000, sum")));
}

TEST(RemoteErrorTest, CountsThatDiffer) {
  const auto exchange = [](std::uint64_t in, std::uint64_t out) {
    return [=](Group& group) {
      std::vector<std::byte> input(2 * in), output(2 * out);
      group.all_to_all_uneven(input, std::vector(2, in), output, std::vector(2, out), Dtype::int8);
    };
  };
  for (const std::string& error : errors_of_two(exchange(7, 7), exchange(8, 7)))
    EXPECT_THAT(error, HasSubstr("rank 1 sends 8 bytes to rank 0, which expects 7"));
}

TEST(RemoteErrorTest, MessagesThatDoNotMeet) {
  std::vector<std::byte> data(16);
  const auto send = [&](Group& group) { group.send(data, Dtype::float32, 1 - group.rank()); };
  for (const std::string& error : errors_of_two(send, send))
    EXPECT_THAT(error, HasSubstr("the calls of two ranks differ: rank 0 called send(float32 × 4, "
                                 "to rank 1), rank 1 called send(float32 × 4, to rank 0)"));
  for (const std::string& error :
       errors_of_two(send, [](Group& group) { group.barrier({.tag = "end"}); }))
    EXPECT_THAT(error, AllOf(HasSubstr("called send(float32 × 4, to rank 1)"),
                             HasSubstr("called barrier(tag 'end')")));
}

TEST(RemoteErrorTest, ALateRankIsNamedAndTheGroupIsOver) {
  std::barrier<> gave_up(2);
  const auto errors = errors_of_two(
      [&](Group& group) {
        const auto late = [&] { group.barrier({.tag = "end", .timeout = 20ms}); };
        EXPECT_THAT(error_of(late),
                    AllOf(HasSubstr("rank 0, operation 1 of generation 0, barrier(tag 'end'): gave "
                                    "up after 0.0"),
                          HasSubstr("waiting for rank 1, last seen in operation 0, barrier(tag "
                                    "'start'), "),
                          HasSubstr("s ago (rank 1 (loopback:1))")));
        EXPECT_THAT(error_of(late), HasSubstr("this group ended with: rank 0, operation 1"));
        gave_up.arrive_and_wait();
        group.barrier();
      },
      [&](Group& group) {
        gave_up.arrive_and_wait();
        group.barrier();
      });
  EXPECT_THAT(errors[1], HasSubstr("rank 0 ended the group: rank 0, operation 1 of generation 0"));
}

TEST(RemoteErrorTest, WhoLeavesIsNamed) {
  const auto errors = errors_of(3, [](const LoopbackNodes& nodes, int rank) {
    auto group = join(nodes, rank);
    group->barrier();
    if (rank == 1) return;
    group->barrier({.tag = "end"});
  });
  EXPECT_EQ(errors[1], "no error");
  for (const int rank : {0, 2})
    EXPECT_THAT(errors[rank], HasSubstr("rank 1 has left the group, last seen in operation 0"));
}

TEST(RemoteErrorTest, AWaitEndsWithTheGeneration) {
  std::atomic<bool> over = false;
  const auto errors = errors_of(2, [&](const LoopbackNodes& nodes, int rank) {
    auto group = join(nodes, rank,
                      {.is_over = [&] { return over ? std::string("worker 1 was killed") : ""; }});
    if (rank == 1) {
      over = true;
      return;
    }
    group->barrier({.tag = "end"});
  });
  EXPECT_THAT(errors[0], AnyOf(HasSubstr("generation 0 is over: worker 1 was killed"),
                               HasSubstr("rank 1 has left the group")));
}

TEST(RemoteSplitTest, AFailureStaysInItsGroup) {
  run_remote_threads(4, [](Group& group) {
    auto half = group.split(group.rank() % 2, 0);
    auto again = group.split(group.rank() / 2, -group.rank());
    if (group.rank() % 2 == 0) {
      const std::string error = error_of([&] {
        std::vector<std::byte> data(4);
        if (half->rank() == 0) half->barrier();
        half->broadcast(data, Dtype::int8, 0);
      });
      EXPECT_THAT(error, HasSubstr("the ranks' calls differ"));
      EXPECT_THAT(error, HasSubstr("ranks 0,2"));
    } else {
      half->barrier();
    }
    again->barrier();
    EXPECT_EQ(again->rank(), 1 - group.rank() % 2);
    group.barrier();
  });
}

TEST(RemoteTest, EveryPlanSumsOnEveryNumberOfRanks) {
  for (const int size : {2, 3, 4, 5})
    run_remote_threads(size, [](Group& group) {
      auto& remote = dynamic_cast<RemoteGroup&>(group);
      constexpr std::size_t kCount = 30'001;
      const auto check = [&]<typename T>(T, Dtype dtype, Reduction reduction, bool exact) {
        const auto expected = naive::reduced<T>(group.size(), kCount, reduction);
        using enum AllReducePlan;
        for (const AllReducePlan plan : {to_all, direct, doubling, halving, tree, ring}) {
          const bool is_power = (group.size() & (group.size() - 1)) == 0;
          if (exact && (plan == ring || ((plan == doubling || plan == halving) && !is_power)))
            continue;
          auto data = naive::inputs<T>(group.rank(), kCount);
          remote.all_reduce_by(plan, data, dtype, reduction, {});
          EXPECT_TRUE(data == expected) << name_of(plan) << " of " << name_of(dtype) << ", rank "
                                        << group.rank() << " of " << group.size();
        }
      };
      check(float{}, Dtype::float32, Reduction::mean, true);
      check(double{}, Dtype::float64, Reduction::product, true);
      check(std::int32_t{}, Dtype::int32, Reduction::mean, false);
    });
}

TEST(RemoteTest, ThePlanAndItsReasonAreToldOnce) {
  const LoopbackNodes nodes(2);
  run_threads(2, [&](int rank) {
    std::vector<std::string> choices;
    auto group =
        join(nodes, rank, {.on_choice = [&](const auto& text) { choices.push_back(text); }});
    for (int i = 0; i < 3; ++i) sum_of(40'000'000)(*group);
    ASSERT_EQ(choices.size(), 1u);
    EXPECT_THAT(choices[0], AllOf(HasSubstr("all_reduce: "), HasSubstr("40000000 bytes")));
  });
}

// Two ranks join; what each says of its choice among plans.
std::vector<std::string> choices_of_two(const LoopbackNodes& nodes, std::uint64_t generation,
                                        const std::shared_ptr<KnownLinkCosts> (&known)[2],
                                        bool exact = true) {
  std::vector<std::string> choices(2);
  run_threads(2, [&](int rank) {
    auto group = join(nodes, rank,
                      {.generation = generation,
                       .exact = exact,
                       .known_costs = known[rank],
                       .on_choice = [&](const auto& text) { choices[rank] = text; }});
    sum_of(40'000'000)(*group);
  });
  return choices;
}

TEST(RemoteTest, WhatLinksCostIsKnownInLaterGenerations) {
  const LoopbackNodes nodes(2);
  const std::shared_ptr<KnownLinkCosts> known[] = {std::make_shared<KnownLinkCosts>(),
                                                   std::make_shared<KnownLinkCosts>()};
  choices_of_two(nodes, 1, known);
  ASSERT_EQ(known[0]->by_members.size(), 1u);
  EXPECT_EQ(known[0]->by_members, known[1]->by_members);
  for (const auto& each : known) each->by_members.begin()->second.latency_s = 0.125;
  for (const std::string& choice : choices_of_two(nodes, 2, known))
    EXPECT_THAT(choice, HasSubstr("1.25e+05 us latency"));
  // Not where other plans may run, or one rank knows otherwise.
  for (const std::string& choice : choices_of_two(nodes, 3, known, false))
    EXPECT_THAT(choice, Not(HasSubstr("e+05 us latency")));
  EXPECT_EQ(known[0]->by_members.size(), 2u);
  known[1]->by_members.begin()->second.latency_s = 0.25;
  for (const std::string& choice : choices_of_two(nodes, 4, known))
    EXPECT_THAT(choice, Not(HasSubstr("e+05 us latency")));
  EXPECT_EQ(known[0]->by_members, known[1]->by_members);
}

// Under mpirun: MPI's own all_reduce, of all and of some.
TEST(Mpi, ReducesByItself) {
  if (std::getenv("OMPI_COMM_WORLD_SIZE") == nullptr) GTEST_SKIP() << "only under mpirun";
  std::string choice;
  const GroupOptions options{.timeout = kTestTimeout,
                             .exact = false,
                             .known_costs = std::make_shared<KnownLinkCosts>(),
                             .on_choice = [&](const auto& text) { choice = text; }};
  const auto check = [](Group& group) {
    auto& remote = dynamic_cast<RemoteGroup&>(group);
    const auto check_sum = [&]<typename T>(T, Dtype dtype, Reduction reduction) {
      auto data = naive::inputs<T>(group.rank(), 30'001);
      remote.all_reduce_by(AllReducePlan::engine, data, dtype, reduction, {});
      EXPECT_TRUE(data == naive::reduced<T>(group.size(), 30'001, reduction))
          << name_of(dtype) << ' ' << name_of(reduction);
    };
    for (const Reduction reduction : kReductions) {
      check_sum(std::int32_t{}, Dtype::int32, reduction);
      check_sum(std::int64_t{}, Dtype::int64, reduction);
    }
    for (const Reduction reduction : {Reduction::min, Reduction::max}) {
      check_sum(float{}, Dtype::float32, reduction);
      check_sum(double{}, Dtype::float64, reduction);
    }
  };
  run_mpi(
      3,
      [&](Group& group) {
        check(group);
        EXPECT_GT(options.known_costs->by_members.begin()->second.engine_bytes_per_s, 0);
        check(*group.split(group.rank() % 2, 0));
      },
      options);
  // Chosen where it is the fastest.
  auto& costs = options.known_costs->by_members.begin()->second;
  costs = {.engine_s = 1e-9, .engine_bytes_per_s = 1e15};
  run_mpi(3, sum_of(1'000'000), options);
  EXPECT_THAT(choice, HasSubstr("all_reduce: engine: "));
  choice.clear();
  run_mpi(
      3,
      [](Group& group) {
        auto data = naive::inputs<std::int8_t>(group.rank(), 100'000);
        group.all_reduce(data, Dtype::int8, Reduction::sum);
        EXPECT_TRUE(data == naive::reduced<std::int8_t>(3, 100'000, Reduction::sum));
      },
      options);
  EXPECT_EQ(choice, "");
}

TEST(RemoteTest, TheFlightRecorderHasEveryCall) {
  const LoopbackNodes nodes(2);
  auto segment = make_segment(2, 16 << 20);
  run_threads(2, [&](int rank) {
    auto group = join(nodes, rank, {.recorder = &segment->recorder(rank)});
    sum_of(40)(*group);
    const auto records = recorded_operations(*segment, rank);
    ASSERT_EQ(records.size(), 1u);
    EXPECT_EQ(describe(records[0]),
              "across nodes: operation 0 of generation 0, all_reduce(float32 × 10, sum, tag "
              "'gradients')");
    EXPECT_EQ(records[0].state, OperationState::done);
  });
}

}  // namespace
}  // namespace lockstep
