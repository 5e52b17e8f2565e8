#include "lockstep/parallel/gradient_buckets.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lockstep {
namespace {

using testing::ElementsAre;

constexpr std::size_t kMib = 1 << 20;

TEST(PlanBuckets, OneADtypeWithoutACap) {
  const std::vector<BucketItem> items = {
      {Dtype::float32, 5 * kMib}, {Dtype::float64, 8}, {Dtype::float32, 90 * kMib}};
  EXPECT_THAT(plan_buckets(items, {}), ElementsAre(ElementsAre(1), ElementsAre(2, 0)));
  EXPECT_TRUE(plan_buckets({}, {}).empty());
}

TEST(PlanBuckets, LastItemsFirstAndASmallFirstBucket) {
  const std::vector<BucketItem> items(7, {Dtype::float32, kMib / 2});
  EXPECT_THAT(plan_buckets(items, 5 * kMib / 2),
              ElementsAre(ElementsAre(6, 5), ElementsAre(4, 3, 2, 1, 0)));
  EXPECT_THAT(plan_buckets(items, kMib),
              ElementsAre(ElementsAre(6), ElementsAre(5, 4), ElementsAre(3, 2), ElementsAre(1, 0)));
  EXPECT_THAT(plan_buckets(items, 1), testing::SizeIs(7));
}

TEST(PlanBuckets, UnderOverlapEachIsASmallPartOfTheWhole) {
  EXPECT_EQ(overlapped_bucket_bytes(0), kMib / 4);
  EXPECT_EQ(overlapped_bucket_bytes(16 * kMib), kMib);
  EXPECT_EQ(overlapped_bucket_bytes(1000 * kMib), 4 * kMib);
}

TEST(PlanBuckets, OneDtypeABucket) {
  const std::vector<BucketItem> items = {{Dtype::float32, kMib},
                                         {Dtype::bfloat16, kMib},
                                         {Dtype::float32, kMib},
                                         {Dtype::bfloat16, 2}};
  EXPECT_THAT(plan_buckets(items, 25 * kMib),
              ElementsAre(ElementsAre(2), ElementsAre(3, 1), ElementsAre(0)));
}

}  // namespace
}  // namespace lockstep
