#include "lockstep/tools/doctor_links.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "lockstep/base/error.h"

namespace lockstep {
namespace {

using namespace std::chrono_literals;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TEST(DoctorLinksTest, EachPairOnceAndNobodyTwiceInARound) {
  for (int nodes = 1; nodes <= 33; ++nodes) {
    std::set<std::pair<int, int>> pairs;
    for (const auto& round : rounds_of_pairs(nodes)) {
      std::set<int> busy;
      for (const auto& [low, high] : round) {
        EXPECT_TRUE(0 <= low && low < high && high < nodes);
        EXPECT_TRUE(pairs.emplace(low, high).second);
        EXPECT_TRUE(busy.insert(low).second && busy.insert(high).second);
      }
    }
    EXPECT_EQ(pairs.size(), static_cast<std::size_t>(nodes * (nodes - 1) / 2));
    EXPECT_LE(static_cast<int>(rounds_of_pairs(nodes).size()), nodes);
  }
}

// The ranks but those that stay away measure, each in a thread.
std::vector<Link> measured(int ranks, const std::set<int>& away, Clock::duration patience) {
  const auto hub = make_loopback_hub();
  std::vector<std::unique_ptr<Endpoint>> endpoints;
  std::vector<std::string> addresses;
  for (int rank = 0; rank < ranks; ++rank) {
    endpoints.push_back(make_loopback_endpoint(hub));
    addresses.push_back(endpoints.back()->address());
  }
  std::vector<std::vector<Link>> links(ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank)
    if (!away.contains(rank))
      threads.emplace_back([&, rank] {
        links[rank] = measure_links(endpoints[rank]->connect(addresses, rank, {}), patience);
      });
  for (std::thread& thread : threads) thread.join();
  return merged(links);
}

TEST(DoctorLinksTest, EveryPairIsMeasured) {
  const std::vector<Link> links = measured(3, {}, 60s);
  ASSERT_EQ(links.size(), 3u);
  for (const Link& link : links) {
    EXPECT_EQ(link.failure, "");
    EXPECT_GT(link.latency_s, 0);
    EXPECT_GT(link.there_bytes_per_s, 0);
    EXPECT_GT(link.back_bytes_per_s, 0);
  }
}

TEST(DoctorLinksTest, WhoDoesNotComeIsNamedAndTheOthersGoOn) {
  int failed = 0;
  for (const Link& link : measured(3, {1}, 200ms)) {
    if (link.from == 0 && link.to == 2) continue;
    ++failed;
    EXPECT_THAT(link.failure, HasSubstr("rank 1"));
  }
  EXPECT_EQ(failed, 2);
}

TEST(DoctorLinksTest, ASlowLinkIsAFindingAndABrokenOneAnError) {
  const Link fast{0, 1, 20e-6, 2e9, 2.1e9}, half{0, 2, 20e-6, 2e9, 0.9e9},
      also{1, 2, 2e-5, 2e9, 2e9};
  const std::vector<Link> good = {fast, also}, uneven = {fast, half, also};
  EXPECT_EQ(findings_of(good).at(0).verdict, Verdict::ok);
  const Finding odd = findings_of(uneven).at(0);
  EXPECT_EQ(odd.verdict, Verdict::warning);
  EXPECT_THAT(odd.text, HasSubstr("between nodes 0 and 2, has 900 MB/s, less than half"));
  const std::vector<Link> slow = {{0, 1, 1e-3, 12e6, 12.2e6}};
  EXPECT_EQ(findings_of(slow).at(0).text, "the slowest, between nodes 0 and 1, has 12.0 MB/s");
  const std::vector<Link> broken = {{0, 1, 0, 0, 0, "cut"}};
  EXPECT_EQ(findings_of(broken).at(0).verdict, Verdict::error);
  EXPECT_EQ(findings_of(broken).size(), 1u);
}

TEST(DoctorLinksTest, TheTableHasARowAndAColumnANode) {
  const std::vector<Link> links = {{0, 1, 23.4e-6, 2301e6, 12.34e6}};
  EXPECT_EQ(table_of(links, 2),
            "\nlatency, µs, one way\n"
            "                   0         1\n"
            "         0         -      23.4\n"
            "         1      23.4         -\n"
            "\nbandwidth, MB/s, from a row's node to a column's\n"
            "                   0         1\n"
            "         0         -      2301\n"
            "         1      12.3         -\n");
}

TEST(DoctorLinksTest, ALinksJsonIsReadBackAndAnotherRefused) {
  const Link link{0, 2, 1e-5, 1e9, 2e9, "why"};
  const nlohmann::json good = link;
  EXPECT_EQ(nlohmann::json(link_from(good, 3)), good);
  EXPECT_THROW(link_from(good, 2), Error);
  for (const char* text : {"{}", "[]", "7"})
    EXPECT_THROW(link_from(nlohmann::json::parse(text), 3), Error);
  nlohmann::json wrong = good;
  wrong["from"] = 2;
  EXPECT_THROW(link_from(wrong, 3), Error);
}

}  // namespace
}  // namespace lockstep
