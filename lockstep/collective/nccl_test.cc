#include "lockstep/collective/nccl_group.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lockstep/collective/ranks_test.h"

namespace lockstep {
namespace {

using ::testing::HasSubstr;

TEST(NcclTest, WithoutADeviceItSaysWhy) {
  const std::string why = nccl_unavailable();
  if (why.empty()) GTEST_SKIP() << "this machine has a CUDA device";
  EXPECT_THAT(error_of([] { make_nccl_group(make_solo_group()); }),
              HasSubstr("no group of CUDA devices: " + why + "; hint: "));
}

// Of one rank: more need a device each.
TEST(NcclTest, ADeviceAlone) {
  if (const std::string why = nccl_unavailable(); !why.empty()) GTEST_SKIP() << why;
  auto group = make_nccl_group(make_solo_group(), {.exact = false});
  auto memory = group->allocate(1024, "data");
  group->all_reduce(memory.first(512), Dtype::float32, Reduction::sum);
  group->all_gather(memory.first(512), memory.last(512), Dtype::float32);
  group->barrier();
  EXPECT_EQ(group->statistics().operations, 3u);
}

}  // namespace
}  // namespace lockstep
