#include "lockstep/cluster/world.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <barrier>
#include <numeric>
#include <thread>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/cluster/segment_exchange.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/memory/segment.h"
#include "lockstep/observe/event.h"

namespace lockstep {
namespace {

using testing::HasSubstr;
constexpr auto kBrief = std::chrono::milliseconds(100);
constexpr auto kAmple = std::chrono::seconds(60);

Place place(int rank, int size) {
  return {.launcher = Launcher::torchrun,
          .rank = rank,
          .size = size,
          .local_rank = rank,
          .local_size = size,
          .job_id = "test " + std::to_string(::getpid()) + " " +
                    testing::UnitTest::GetInstance()->current_test_info()->name()};
}

std::string refusal(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

// Calls body(rank) in a thread for each place; what each threw, "" for nothing.
std::vector<std::string> in_threads(const std::vector<Place>& places,
                                    const std::function<void(const Place&)>& body) {
  std::vector<std::string> refusals(places.size());
  std::vector<std::thread> threads;
  for (std::size_t i = 0; i < places.size(); ++i)
    threads.emplace_back([&, i] { refusals[i] = refusal([&] { body(places[i]); }); });
  for (std::thread& thread : threads) thread.join();
  return refusals;
}

TEST(World, AloneIsAWorldOfOne) {
  const World world = init_from(Place{}, {});
  EXPECT_EQ(world.size(), 1);
  EXPECT_EQ(world.group().size(), 1);
  EXPECT_FALSE(world.has_agent());
  EXPECT_EQ(world.segment()->seats(), 1);
  world.group().barrier();
}

TEST(World, RanksWithoutAnAgentMeet) {
  const auto refusals = in_threads({place(0, 3), place(1, 3), place(2, 3)}, [](const Place& mine) {
    const World world = init_from(mine, {.timeout = kAmple});
    float value = static_cast<float>(world.rank() + 1);
    world.group().all_reduce(std::as_writable_bytes(std::span(&value, 1)), Dtype::float32,
                             Reduction::sum);
    EXPECT_EQ(value, 6);
  });
  EXPECT_THAT(refusals, testing::Each(""));
}

// Ranks as threads, on nodes with so many each; what they tell each other goes through memory.
std::vector<std::string> on_nodes(const std::vector<int>& local_sizes,
                                  const std::function<void(const World&)>& body) {
  std::vector<Place> places;
  const int size = std::accumulate(local_sizes.begin(), local_sizes.end(), 0);
  for (std::size_t node = 0; node < local_sizes.size(); ++node)
    for (int local = 0; local < local_sizes[node]; ++local) {
      Place mine = place(int(places.size()), size);
      mine.local_rank = local;
      mine.local_size = local_sizes[node];
      mine.job_id += " node " + std::to_string(node);
      mine.key = "a secret";
      places.push_back(mine);
    }
  std::vector<std::string> told(places.size());
  std::barrier everybody(size);
  const Exchange exchange = [&](const Place& place, const std::string& text) {
    told[std::size_t(place.rank)] = text;
    everybody.arrive_and_wait();
    return told;
  };
  return in_threads(places, [&](const Place& mine) {
    body(init_from(mine, {.timeout = kAmple, .exchange = exchange}));
  });
}

TEST(World, SpansNodes) {
  for (const std::vector<int>& sizes : {std::vector{1, 1}, {2, 2}, {1, 3, 2}}) {
    const int size = std::accumulate(sizes.begin(), sizes.end(), 0);
    const auto refusals = on_nodes(sizes, [&](const World& world) {
      EXPECT_EQ(world.size(), size);
      EXPECT_EQ(world.local_sizes(), sizes);
      EXPECT_EQ(world.local_group().size(), sizes[std::size_t(world.node())]);
      EXPECT_EQ(world.local_group().rank(), world.local_rank());
      const int least = *std::ranges::min_element(sizes);
      ASSERT_EQ(world.across_group() != nullptr, world.local_rank() < least);
      if (world.across_group() != nullptr) {
        EXPECT_EQ(world.across_group()->rank(), world.node());
      }
      std::vector<float> values(3000, 1.0f / static_cast<float>(world.rank() + 3));
      const auto bytes = std::as_writable_bytes(std::span(values));
      world.group().all_reduce(bytes, Dtype::float32, Reduction::sum);
      std::vector<float> sums(std::size_t(size), 0.0f);
      world.group().all_gather(bytes.first(sizeof(float)), std::as_writable_bytes(std::span(sums)),
                               Dtype::float32);
      EXPECT_THAT(values, testing::Each(sums[0]));
      EXPECT_THAT(sums, testing::Each(sums[0]));
      world.group().barrier();
    });
    EXPECT_THAT(refusals, testing::Each(""));
  }
}

TEST(World, RefusesNodesThatAreNotInOrder) {
  Place mine = place(1, 2);
  mine.local_rank = 0;
  mine.local_size = 1;
  const auto told = [&](const std::string& first) {
    const Exchange exchange = [&](const Place&, const std::string& text) {
      return std::vector<std::string>{first, text};
    };
    return refusal([&] { init_from(mine, {.exchange = exchange}); });
  };
  EXPECT_THAT(told(R"({"local_rank": 1, "local_size": 2, "address": ""})"),
              HasSubstr("rank 0 is local rank 1 of 2"));
  EXPECT_THAT(told(R"({"local_rank": 0, "local_size": 2, "address": ""})"),
              HasSubstr("rank 1 is local rank 0 of 1"));
  EXPECT_THAT(told(R"({"local_rank": "x"})"), HasSubstr("rank 0 told nothing that can be read"));
  EXPECT_THAT(told("]"), HasSubstr("rank 0 told nothing that can be read"));
}

TEST(World, RefusesSeveralNodes) {
  Place two_nodes = place(1, 4);
  two_nodes.local_size = 2;
  EXPECT_THAT(refusal([&] { init_from(two_nodes, {}); }),
              HasSubstr("torchrun started 4 workers, of which 2 on this node"));
}

TEST(World, RefusesDescriptorsThatAreNone) {
  Place mine{.launcher = Launcher::lockstep};
  mine.segment_fd = 987654;
  EXPECT_THAT(refusal([&] { init_from(mine, {}); }), HasSubstr("LOCKSTEP_SEGMENT_FD=987654"));
  int ends[2];
  ASSERT_EQ(::pipe(ends), 0);
  const UniqueFd write_end(ends[1]);
  mine.segment_fd = ends[0];  // a pipe is no segment
  EXPECT_NE(refusal([&] { init_from(mine, {}); }), "");
}

TEST(World, RefusesASegmentForOtherRanks) {
  Place mine{.launcher = Launcher::lockstep};
  mine.segment_fd = ::dup(Segment::create({.seats = 2, .arena_bytes = 1 << 20})->fd());
  EXPECT_THAT(refusal([&] { init_from(mine, {}); }), HasSubstr("is for 2 ranks, not 1"));
}

// Workers as threads at the seats of one segment, and an agent that the test is.
class Generations : public testing::Test {
 protected:
  Place at_seat(int seat) const {
    Place mine{.launcher = Launcher::lockstep};
    mine.seat = seat;
    mine.segment_fd = ::dup(segment_->fd());
    return mine;
  }
  void say(std::uint64_t number, std::vector<int> seats, bool at_once, const std::string& reason) {
    publish(*segment_, {.number = number, .seats = std::move(seats), .reason = reason}, at_once);
  }
  std::shared_ptr<Segment> segment_ = Segment::create({.seats = 4, .arena_bytes = 16 << 20});
};

std::string place_text(const World& world) {
  return fmt::format("rank {} of {} in {}", world.rank(), world.size(), world.generation());
}

TEST_F(Generations, FollowEachOther) {
  say(0, {0, 1}, true, "the first");
  std::vector<std::string> places(4);
  std::barrier all(3);
  const auto member = [&](int seat) {
    const World world = init_from(at_seat(seat), {.timeout = kAmple});
    EXPECT_THROW(world.group().barrier({.tag = "that rank 1 never reaches"}), CommError);
    ASSERT_TRUE(world.next_generation("it ended"));
    all.arrive_and_wait();
    world.group().barrier();
    places[std::size_t(seat)] = place_text(world);
    EXPECT_EQ(world.next_generation(), seat != 0);  // agreed on between two steps
    if (seat != 0) world.group().barrier();
  };
  std::jthread zero([&] { member(0); });
  std::jthread one([&] {
    const World world = init_from(at_seat(1), {.timeout = kAmple});
    say(1, {3, 0}, true, "rank 1 (pid 7): killed by signal 9 (SIGKILL)");
  });
  std::jthread three([&] {
    const World world = init_from(at_seat(3), {.timeout = kAmple, .join = false});
    world.join();
    all.arrive_and_wait();
    world.group().barrier();
    places[3] = place_text(world);
    EXPECT_TRUE(world.next_generation());
    EXPECT_EQ(place_text(world), "rank 0 of 1 in 2");
  });
  all.arrive_and_wait();
  say(2, {3}, false, "scaled to 1");
  zero.join(), three.join();
  EXPECT_EQ(places[0], "rank 1 of 2 in 1");
  EXPECT_EQ(places[3], "rank 0 of 2 in 1");
}

// It may not have seen yet that all have made the last call.
TEST_F(Generations, OneThatIsPlannedBeginsWhenAllHaveLeft) {
  say(0, {0, 1}, true, "the first");
  std::atomic<bool> leaves = false;
  std::jthread one([&] {
    const World world = init_from(at_seat(1), {.timeout = kAmple});
    world.group().barrier();
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    leaves = true;
  });
  const World world = init_from(at_seat(0), {.timeout = kAmple});
  world.group().barrier();
  say(1, {0}, false, "scaled to 1");
  EXPECT_TRUE(world.next_generation());
  EXPECT_TRUE(leaves);
}

TEST_F(Generations, WaitsEndWithTheReason) {
  say(0, {0, 1}, true, "the first");
  std::jthread one([&] {
    const World world = init_from(at_seat(1), {.timeout = kAmple});
    say(1, {0}, true, "rank 1 (pid 7): killed by signal 9 (SIGKILL)");
  });
  const World world = init_from(at_seat(0), {.timeout = kAmple});
  EXPECT_THAT(refusal([&] { world.group().barrier({.tag = "a"}); }),
              testing::AnyOf(HasSubstr("generation 0 is over: rank 1 (pid 7): killed by signal 9"),
                             HasSubstr("rank 1 has left")));
  EXPECT_TRUE(world.next_generation("it ended"));
  EXPECT_EQ(world.size(), 1);
}

TEST_F(Generations, WhoMissesOneEntersTheNext) {
  say(0, {0, 1}, true, "the first");
  say(1, {0, 1, 2}, true, "seat 2, which never comes");
  std::jthread zero([&] {
    const World world = init_from(at_seat(0), {.timeout = kAmple});
    EXPECT_EQ(place_text(world), "rank 0 of 1 in 2");
  });
  say(2, {0}, true, "seats 1 and 2 are lost");
}

TEST_F(Generations, HaveADeadline) {
  say(0, {0}, true, "the first");
  const World world = init_from(at_seat(0), {.timeout = kBrief});
  EXPECT_THAT(refusal([&] { world.next_generation("why"); }), HasSubstr("no generation after 1"));
  segment_->abort("the job is over");
  EXPECT_THAT(refusal([&] { world.next_generation(); }), HasSubstr("the job is over"));
}

TEST_F(Generations, MemoryLastsFromOneToTheNext) {
  say(0, {0}, true, "the first");
  const World world = init_from(at_seat(0), {.timeout = kAmple});
  const auto memory = world.lasting("a test", 100);
  memory[0] = std::byte{7};
  say(1, {0}, true, "again");
  EXPECT_TRUE(world.next_generation());
  EXPECT_EQ(world.lasting("a test", 100).data(), memory.data());
  EXPECT_EQ(memory[0], std::byte{7});
}

TEST(SegmentExchange, SaysWhoDidNotCome) {
  EXPECT_THAT(refusal([] { exchange_segment(place(0, 3), Deadline::after(kBrief)); }),
              HasSubstr("of 3 local ranks, 1, 2 did not come in time"));
  EXPECT_THAT(refusal([] { exchange_segment(place(1, 3), Deadline::after(kBrief)); }),
              HasSubstr("local rank 0 of 3 did not come in time"));
}

TEST(SegmentExchange, TheOthersAreToldWhenOneIsMissing) {
  const auto refusals = in_threads({place(0, 3), place(2, 3)}, [](const Place& mine) {
    exchange_segment(mine, Deadline::after(mine.rank == 0 ? kBrief * 5 : kAmple));
  });
  EXPECT_THAT(refusals, testing::Each(HasSubstr("of 3 local ranks, 1 did not come in time")));
}

TEST(SegmentExchange, TwoJobsOfOneNameAreNotMixed) {
  // Rank 1 twice: one of each job.
  const auto twice = in_threads({place(0, 3), place(1, 3), place(1, 3)}, [](const Place& mine) {
    exchange_segment(mine, Deadline::after(kAmple));
  });
  EXPECT_THAT(twice, testing::Each(HasSubstr("local rank 1 of 3 came twice")));
  // Of another size.
  const auto other = in_threads({place(0, 2), place(1, 4)}, [](const Place& mine) {
    exchange_segment(mine, Deadline::after(kAmple));
  });
  EXPECT_THAT(other, testing::Each(HasSubstr("local rank 1 of 4 came to a job of 2")));
  // A second local rank 0, while the first job runs.
  std::array<SharedSegment, 2> first;
  const auto met = in_threads({place(0, 2), place(1, 2)}, [&](const Place& mine) {
    first[std::size_t(mine.rank)] = exchange_segment(mine, Deadline::after(kAmple));
  });
  EXPECT_THAT(met, testing::Each(""));
  EXPECT_THAT(refusal([] { exchange_segment(place(0, 2), Deadline::after(kBrief)); }),
              HasSubstr("does another job started by torchrun with the same id run here?"));
}

// A planned generation may leave out somebody who is still at work in the one that failed.
TEST_F(Generations, APlannedOneIsNotForWhoFailed) {
  say(0, {0}, true, "the first");
  const World world = init_from(at_seat(0), {.timeout = std::chrono::milliseconds(50)});
  say(1, {0}, false, "planned");
  EXPECT_THROW(world.next_generation("it failed"), CommError);
  segment_->board().over.store(2);  // a member is lost; what follows is not known yet
  EXPECT_THROW(world.next_generation("it failed"), CommError);
  say(2, {0}, true, "rank 1 (pid 7): killed by signal 9 (SIGKILL)");
  EXPECT_TRUE(world.next_generation("it failed"));
  EXPECT_EQ(world.generation(), 2u);
}

}  // namespace
}  // namespace lockstep
