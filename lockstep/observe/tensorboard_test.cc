#include "lockstep/observe/tensorboard.h"

#include <gtest/gtest.h>

#include <iomanip>
#include <sstream>

namespace lockstep {
namespace {

std::string hex(const std::string& bytes) {
  std::ostringstream text;
  for (const unsigned char byte : bytes)
    text << std::hex << std::setw(2) << std::setfill('0') << int(byte);
  return text.str();
}

// Expected bytes: made by TensorBoard's own writer (tensorboard 2.16, RecordWriter) from the same
// times, steps, tags and values.
TEST(TensorBoard, Header) {
  EXPECT_EQ(hex(tensorboard_header(1.5)),
            "1800000000000000a37f4b2209000000000000f83f1a0d627261696e2e4576656e743a322a28646c");
}

TEST(TensorBoard, Scalars) {
  EXPECT_EQ(hex(tensorboard_scalars(2.25, 300, {{"loss/train", 0.5}, {"lr", 0.001}})),
            "2c00000000000000f4aecc4509000000000000024010ac022a1e0a110a0a6c6f73732f747261696e150000"
            "003f0a090a026c72156f12833a7e2c8920");
}

TEST(TensorBoard, FileName) {
  EXPECT_EQ(tensorboard_file_name(1700000000.9, "node7", 42),
            "events.out.tfevents.1700000000.node7.42");
  EXPECT_EQ(tensorboard_file_name(5, "", 1), "events.out.tfevents.0000000005.localhost.1");
}

}  // namespace
}  // namespace lockstep
