#include "lockstep/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>

#include "lockstep/base/bytes.h"
#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

using testing::HasSubstr;
using testing::StartsWith;

class Safetensors : public testing::Test {
 protected:
  Safetensors() : floats_(24) { std::iota(floats_.begin(), floats_.end(), 0.5f); }
  ~Safetensors() override { std::filesystem::remove(path_); }

  std::span<const std::byte> bytes(std::size_t count) const {
    return std::as_bytes(std::span(floats_)).first(count);
  }
  std::vector<TensorView> some() const {
    return {{"weight", Dtype::float32, {2, 3}, bytes(24)},
            {"bias", Dtype::bfloat16, {4}, bytes(8)},
            {"empty", Dtype::int8, {0, 7}, bytes(0)},
            {"naïve \"name\"\n", Dtype::int64, {}, bytes(8)}};
  }
  const std::filesystem::path path_ =
      std::filesystem::path(testing::TempDir()) / "lockstep_safetensors_test";
  std::vector<float> floats_;
};

TEST_F(Safetensors, RoundTrip) {
  const std::string sha = write_safetensors(path_, some());
  EXPECT_EQ(sha, sha256_hex_of_file(path_.string()));
  const SafetensorsFile file = SafetensorsFile::read(path_);
  ASSERT_EQ(file.tensors().size(), 4u);
  EXPECT_EQ(file.tensors()[0].name, "bias");
  for (const TensorView& expected : some()) {
    const TensorView* found = file.find(expected.name);
    ASSERT_NE(found, nullptr) << expected.name;
    EXPECT_EQ(found->dtype, expected.dtype);
    EXPECT_EQ(found->shape, expected.shape);
    EXPECT_TRUE(std::ranges::equal(found->bytes, expected.bytes)) << expected.name;
  }
  EXPECT_EQ(file.find("weigh"), nullptr);
  EXPECT_EQ(file.find("zzz"), nullptr);
}

TEST_F(Safetensors, SameTensorsSameBytesWhateverTheirOrder) {
  const std::string sha = write_safetensors(path_, some());
  const auto first = read_file(path_);
  auto tensors = some();
  std::reverse(tensors.begin(), tensors.end());
  EXPECT_EQ(write_safetensors(path_, tensors), sha);
  EXPECT_EQ(read_file(path_), first);
  EXPECT_EQ((8 + *read_little_endian<std::uint64_t>(first, 0)) % 64, 0u);
  tensors[0].shape = {1};
  EXPECT_NE(write_safetensors(path_, tensors), sha);
}

TEST_F(Safetensors, TheFormatToTheByte) {
  write_safetensors(path_,
                    {{"b", Dtype::uint8, {3}, bytes(3)}, {"a", Dtype::float32, {1}, bytes(4)}});
  const std::string header = R"({"a":{"data_offsets":[0,4],"dtype":"F32","shape":[1]},)"
                             R"("b":{"data_offsets":[4,7],"dtype":"U8","shape":[3]}})";
  const std::string text = read_text_file(path_);
  EXPECT_EQ(text.substr(8, header.size()), header);
  const std::size_t data = (8 + header.size() + 63) / 64 * 64;
  EXPECT_EQ(text.substr(8 + header.size(), data - 8 - header.size()),
            std::string(data - 8 - header.size(), ' '));
  EXPECT_EQ(text.size(), data + 7);
}

TEST_F(Safetensors, NoTensorsAndWrongNames) {
  write_safetensors(path_, {});
  EXPECT_TRUE(SafetensorsFile::read(path_).tensors().empty());
  const TensorView one{"a", Dtype::uint8, {3}, bytes(3)};
  EXPECT_THROW(write_safetensors(path_, {one, one}), Error);
  EXPECT_THROW(write_safetensors(path_, {{"__metadata__", Dtype::uint8, {3}, bytes(3)}}), Error);
  EXPECT_THROW(write_safetensors(path_, {{"\xff", Dtype::uint8, {3}, bytes(3)}}), Error);
  EXPECT_THROW(write_safetensors("/nowhere/x", {one}), Error);
  EXPECT_TRUE(SafetensorsFile::read(path_).tensors().empty()) << "the old file is still whole";
}

std::vector<std::byte> file_of(const std::string& header, std::size_t data_bytes,
                               std::int64_t length_off_by = 0) {
  std::vector<std::byte> result(8);
  write_little_endian<std::uint64_t>(header.size() + static_cast<std::uint64_t>(length_off_by),
                                     result.data());
  for (const char c : header) result.push_back(static_cast<std::byte>(c));
  result.resize(result.size() + data_bytes);
  return result;
}

std::string error_of(std::vector<std::byte> bytes) {
  try {
    SafetensorsFile::parse(std::move(bytes), "FILE");
  } catch (const ConfigError& error) {
    EXPECT_THAT(error.what(), StartsWith("FILE: not a whole safetensors file: "));
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos);
    return error.what();
  }
  return "no error";
}

TEST_F(Safetensors, ReadsForeignHeaders) {
  EXPECT_EQ(error_of(file_of(R"({"__metadata__":{"format":"pt"},
      "x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]},
      "a":{"dtype":"I64","shape":[0],"data_offsets":[4,4]},
      "y":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]}}   )",
                             8)),
            "no error");
}

TEST_F(Safetensors, HostileHeaders) {
  const auto tensor = [](const std::string& body, std::size_t data_bytes = 8) {
    return error_of(file_of(R"({"x":)" + body + "}", data_bytes));
  };
  EXPECT_THAT(error_of({}), HasSubstr("0 bytes are too few"));
  EXPECT_THAT(error_of(std::vector<std::byte>(7)), HasSubstr("too few"));
  EXPECT_THAT(error_of(std::vector<std::byte>(8)), HasSubstr("not a JSON object"));
  EXPECT_THAT(error_of(std::vector<std::byte>(8, std::byte{255})), HasSubstr("a header of 184467"));
  EXPECT_THAT(error_of(file_of("{}", 0, 1)), HasSubstr("should have 3 bytes, 2 follow"));
  EXPECT_THAT(error_of(file_of("[]", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(error_of(file_of("{", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(error_of(file_of(std::string(100000, '['), 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(error_of(file_of("{}", 1)), HasSubstr("1 bytes belong to no tensor"));
  EXPECT_THAT(tensor("3"), HasSubstr("tensor \"x\": needs a dtype"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[2]})"), HasSubstr("needs a dtype"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0]})"), HasSubstr("needs a"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[-2],"data_offsets":[0,8]})"), HasSubstr("needs a"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[2.0],"data_offsets":[0,8]})"), HasSubstr("needs"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,8]})"),
              HasSubstr("needs a"));
  EXPECT_THAT(tensor(R"({"dtype":"F3\n","shape":[2],"data_offsets":[0,8]})"),
              HasSubstr("unknown dtype \"F3\\n\""));
  EXPECT_THAT(tensor(R"({"dtype":"float32","shape":[2],"data_offsets":[0,8]})"),
              HasSubstr("unknown dtype \"float32\""));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[0,12]})"),
              HasSubstr("lie outside the file's 8 bytes"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[2],"data_offsets":[8,0]})"), HasSubstr("outside"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[3],"data_offsets":[0,8]})"),
              HasSubstr("8 bytes do not fit its shape [3] of F32"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[4611686018427387904,4,0],"data_offsets":[0,0]})"),
              HasSubstr("do not fit"));
  EXPECT_THAT(tensor(R"({"dtype":"F32","shape":[1],"data_offsets":[4,8]})"),
              HasSubstr("follows a gap"));
  EXPECT_THAT(error_of(file_of(R"({"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                                   "y":{"dtype":"U8","shape":[6],"data_offsets":[2,8]}})",
                               8)),
              HasSubstr("tensor \"y\": overlaps another"));
}

TEST_F(Safetensors, EveryTruncationIsRefused) {
  write_safetensors(path_, some());
  const auto whole = read_file(path_);
  for (std::size_t size = 0; size < whole.size(); ++size)
    EXPECT_NE(error_of({whole.begin(), whole.begin() + static_cast<std::ptrdiff_t>(size)}),
              "no error")
        << size;
  EXPECT_THROW(SafetensorsFile::read("/nowhere/x"), ConfigError);
}

TEST_F(Safetensors, ViewsSurviveAMove) {
  write_safetensors(path_, some());
  SafetensorsFile file = SafetensorsFile::read(path_);
  const std::byte* before = file.find("weight")->bytes.data();
  const SafetensorsFile moved = std::move(file);
  EXPECT_EQ(moved.find("weight")->bytes.data(), before);
  EXPECT_TRUE(std::ranges::equal(moved.find("weight")->bytes, bytes(24)));
}

}  // namespace
}  // namespace lockstep
