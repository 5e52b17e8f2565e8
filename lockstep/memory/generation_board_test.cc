#include "lockstep/memory/generation_board.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <thread>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using ::testing::ElementsAre;

std::shared_ptr<Segment> small_segment() {
  return Segment::create({.seats = 4, .arena_bytes = 8 << 20});
}

TEST(GenerationBoard, TellsTheNewest) {
  const auto segment = small_segment();
  EXPECT_FALSE(newest_generation(*segment));
  publish(*segment, {.number = 0, .seats = {0, 1}, .reason = "the first"}, true);
  publish(*segment, {.number = 1, .seats = {1, 3}, .reason = "rank 0 died"}, true);
  publish(*segment, {.number = 2, .seats = {1, 3, 2}, .reason = "one joins"}, false);
  const auto generation = newest_generation(*segment);
  ASSERT_TRUE(generation);
  EXPECT_EQ(generation->number, 2u);
  EXPECT_THAT(generation->seats, ElementsAre(1, 3, 2));
  EXPECT_EQ(generation->reason, "one joins");
  EXPECT_EQ(generations_over(*segment), 1u) << "its members move on by themselves";
}

TEST(GenerationBoard, TellsOfOtherNodes) {
  const auto segment = small_segment();
  const Generation one_node{.number = 0, .seats = {0}, .reason = ""};
  Generation nodes{.number = 1, .seats = {0, 3}, .reason = "a node came"};
  nodes.local_sizes = {1, 2};
  nodes.node = 1;
  nodes.addresses = {"", std::string(kMaxAddressBytes, 'a'), std::string("b\0c", 3)};
  publish(*segment, one_node, true);
  EXPECT_TRUE(newest_generation(*segment)->local_sizes.empty());
  publish(*segment, nodes, true);
  auto found = newest_generation(*segment);
  EXPECT_EQ(found->local_sizes, nodes.local_sizes);
  EXPECT_EQ(found->node, 1);
  EXPECT_EQ(found->addresses, nodes.addresses);
  nodes.number = 3;  // in the same place, more than there was
  nodes.local_sizes = {1, 2, 2};
  nodes.addresses.resize(5, std::string(1000, 'x'));
  publish(*segment, nodes, true);
  EXPECT_EQ(newest_generation(*segment)->addresses, nodes.addresses);
  // Any damage is an error, whatever a word says.
  auto& list = segment->board().generations[1];
  const auto bytes = segment->at(list.nodes.load(), list.nodes_bytes.load());
  const std::vector<std::byte> whole(bytes.begin(), bytes.end());
  for (std::size_t word = 0; word < 10; ++word)
    for (const std::uint32_t value : {0u, 1u, 7u, 0x10000u, 0xffffffffu}) {
      std::memcpy(bytes.data() + 4 * word, &value, 4);
      try {
        (void)newest_generation(*segment);
      } catch (const Error&) {
      }
      std::copy(whole.begin(), whole.end(), bytes.begin());
    }
  for (std::size_t size = 1; size < 44; ++size) {
    list.nodes_bytes.store(size);
    EXPECT_THROW(newest_generation(*segment), Error) << size;
  }
}

TEST(GenerationBoard, DamageIsFound) {
  const auto segment = small_segment();
  publish(*segment, {.number = 0, .seats = {0, 4}, .reason = ""}, true);
  EXPECT_THROW(newest_generation(*segment), Error);
  segment->board().generations[0].count.store(70000);
  EXPECT_THROW(newest_generation(*segment), Error);
  segment->board().kept[1].place.store(64);
  EXPECT_THROW(kept(*segment, 1), Error);
}

TEST(GenerationBoard, AListIsNeverReadWhileItIsReplaced) {
  const auto segment = small_segment();
  publish(*segment, {.number = 0, .seats = {0}, .reason = "0"}, true);
  std::thread agent([&] {
    for (std::uint64_t g = 1; g <= 20000; ++g)
      publish(*segment,
              {.number = g, .seats = std::vector<int>(g % 4 + 1, int(g % 4)), .reason = ""}, true);
  });
  for (std::uint64_t seen = 0; seen < 20000;) {
    const auto generation = newest_generation(*segment);
    seen = generation->number;
    EXPECT_EQ(generation->seats, std::vector<int>(seen % 4 + 1, int(seen % 4)));
  }
  agent.join();
}

TEST(GenerationBoard, WhoWaitsIsWokenByTheNextOne) {
  const auto segment = small_segment();
  std::thread worker([&] {
    while (generations_published(*segment) == 0)
      await_generation(*segment, 2, 0, std::chrono::seconds(10));
  });
  publish(*segment, {.number = 0, .seats = {2}, .reason = ""}, false);
  worker.join();
}

TEST(GenerationBoard, AFaultFiresOnce) {
  const auto segment = small_segment();
  EXPECT_TRUE(claim_fault(*segment, 255));
  EXPECT_FALSE(claim_fault(*segment, 255));
  EXPECT_TRUE(claim_fault(*segment, 191));
}

TEST(GenerationBoard, WhatIsKeptIsFoundAgain) {
  const auto segment = small_segment();
  EXPECT_FALSE(kept(*segment, 0));
  const auto begun = keep(*segment, 0, 5000, "a test");
  begun[17] = std::byte{1};
  const auto again = keep(*segment, 0, 5000, "a test");
  EXPECT_EQ(again.data(), begun.data()) << "who made it died before it was whole";
  EXPECT_EQ(again[17], std::byte{0});
  set_kept_state(*segment, 0, KeptState::whole);
  ASSERT_TRUE(kept(*segment, 0));
  EXPECT_EQ(kept(*segment, 0)->state, KeptState::whole);
  EXPECT_EQ(kept(*segment, 0)->memory.data(), begun.data());
  EXPECT_THROW(keep(*segment, kMaxKept, 1, "too much"), Error);
}

TEST(GenerationBoard, ASeatIsMadeAsItWas) {
  const auto segment = small_segment();
  const auto memory = segment->allocate(1, 100, "a test");
  const auto lasting = segment->allocate_lasting(1, 100, "a test");
  memory[0] = lasting[0] = std::byte{7};
  segment->control(1).joined.store(5);
  segment->reset(1);
  EXPECT_EQ(segment->control(1).joined.load(), 0u);
  EXPECT_EQ(segment->allocate(1, 100, "a test").data(), memory.data());
  EXPECT_EQ(memory[0], std::byte{0});
  EXPECT_EQ(lasting[0], std::byte{0});
}

}  // namespace
}  // namespace lockstep
