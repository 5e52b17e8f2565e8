#include "lockstep/collective/wire_kernels.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "lockstep/collective/naive_test.h"

namespace lockstep {
namespace {

constexpr WireFormat kFormats[] = {WireFormat::bf16, WireFormat::int8};
constexpr std::size_t kCounts[] = {0, 1, 255, 256, 257, 1037};

std::vector<float> numbers(std::uint64_t seed, std::size_t count) {
  std::vector<float> values(count);
  for (std::size_t i = 0; i < count; ++i) values[i] = naive::input<float>(seed, i);
  return values;
}

struct Sent {
  std::vector<std::byte> wire;
  std::vector<float> error, arrived;
};
Sent send(const WireKernels& set, WireFormat format, const std::vector<float>& values,
          std::vector<float> error) {
  Sent sent{std::vector<std::byte>(wire_bytes(format, values.size())), std::move(error),
            std::vector<float>(values.size())};
  set.encode(format, sent.wire.data(), values.data(), sent.error.data(), values.size());
  set.decode(format, sent.arrived.data(), sent.wire.data(), values.size());
  return sent;
}

// What one block of an int8 wire says, by the definition.
void expect_block(const Sent& sent, const std::vector<float>& sums, std::size_t first,
                  std::size_t count) {
  float largest = 0;
  for (std::size_t i = first; i < first + count; ++i)
    largest = std::max(largest, std::fabs(sums[i]));
  const float scale = largest / 127;
  const std::byte* block = sent.wire.data() + first + first / kWireBlock * 4;
  EXPECT_EQ(std::memcmp(block, &scale, 4), 0);
  for (std::size_t i = 0; i < count; ++i) {
    const float value = sums[first + i];
    const auto step = std::nearbyint(value * (127 / largest));
    EXPECT_EQ(static_cast<std::int8_t>(block[4 + i]), static_cast<int>(step)) << first + i;
    EXPECT_EQ(sent.arrived[first + i], step * scale);
    EXPECT_LE(std::fabs(sent.error[first + i]), scale * 0.5001f);
  }
}

TEST(WireKernels, EveryInstructionSetSendsWhatTheDefinitionSays) {
  for (const WireFormat format : kFormats)
    for (const std::size_t count : kCounts) {
      SCOPED_TRACE(std::string(name_of(format)) + " × " + std::to_string(count));
      const std::vector<float> values = numbers(1, count), before = numbers(2, count);
      const Sent first = send(all_wire_kernels()[0], format, values, before);
      std::vector<float> sums;
      for (std::size_t i = 0; i < count; ++i) {
        sums.push_back(values[i] + before[i]);
        EXPECT_EQ(first.error[i], sums[i] - first.arrived[i]);
        if (format == WireFormat::bf16) {
          EXPECT_EQ(first.arrived[i], naive::Bfloat16::of(sums[i]).value());
        }
      }
      for (std::size_t i = 0; format == WireFormat::int8 && i < count; i += kWireBlock)
        expect_block(first, sums, i, std::min(kWireBlock, count - i));
      for (const WireKernels& set : all_wire_kernels()) {
        if (!set.usable) continue;
        const Sent same = send(set, format, values, before);
        EXPECT_EQ(same.wire, first.wire) << set.name;
        EXPECT_EQ(same.error, first.error) << set.name;
        EXPECT_EQ(same.arrived, first.arrived) << set.name;
      }
    }
}

TEST(WireKernels, WhatIsNoNumberArrivesAsNoneAndLeavesNoError) {
  const float infinity = std::numeric_limits<float>::infinity();
  for (const WireKernels& set : all_wire_kernels()) {
    if (!set.usable) continue;
    for (const WireFormat format : kFormats)
      for (const float bad : {infinity, -infinity, std::nanf("")}) {
        std::vector<float> values = numbers(1, 600);
        values[300] = bad;
        const Sent sent = send(set, format, values, std::vector<float>(600, 0.5f));
        EXPECT_FALSE(std::isfinite(sent.arrived[300]));
        EXPECT_TRUE(std::isfinite(sent.arrived[255]) && std::isfinite(sent.arrived[512]));
        for (const float error : sent.error) EXPECT_TRUE(std::isfinite(error));
      }
    // Rounds to infinity.
    const Sent sent = send(set, WireFormat::bf16, {std::numeric_limits<float>::max()}, {0});
    EXPECT_EQ(sent.arrived[0], infinity);
    EXPECT_EQ(sent.error[0], 0);
  }
}

TEST(WireKernels, SmallAndLargeMagnitudes) {
  for (const WireKernels& set : all_wire_kernels()) {
    if (!set.usable) continue;
    for (const float magnitude : {0x1p-140f, 0x1p-101f}) {  // waits until it has grown
      const Sent sent = send(set, WireFormat::int8, {magnitude, -magnitude / 2}, {0, 0});
      EXPECT_EQ(sent.arrived, (std::vector<float>{0, 0}));
      EXPECT_EQ(sent.error, (std::vector<float>{magnitude, -magnitude / 2}));
    }
    for (const float magnitude : {0x1p-100f, 0x1.fffffep126f}) {
      const Sent sent = send(set, WireFormat::int8, {magnitude, -magnitude, 0}, {0, 0, 0});
      EXPECT_NEAR(sent.arrived[0] / magnitude, 1, 1e-6);
      EXPECT_EQ(sent.arrived[1], -sent.arrived[0]);
      EXPECT_EQ(sent.arrived[2], 0);
    }
  }
}

}  // namespace
}  // namespace lockstep
