#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zlib.h>

#include <cstdlib>
#include <fstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/data/dataset.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::EndsWith;
using testing::HasSubstr;

using Bytes = std::vector<std::uint8_t>;

Bytes idx(const std::vector<std::uint32_t>& shape, const Bytes& elements) {
  Bytes result = {0, 0, 8, static_cast<std::uint8_t>(shape.size())};
  for (const std::uint32_t extent : shape)
    for (int shift = 24; shift >= 0; shift -= 8)
      result.push_back(static_cast<std::uint8_t>(extent >> shift));
  result.insert(result.end(), elements.begin(), elements.end());
  return result;
}

Bytes gzip(const Bytes& content) {
  z_stream stream{};
  EXPECT_EQ(deflateInit2(&stream, 6, Z_DEFLATED, 15 + 16, 8, Z_DEFAULT_STRATEGY), Z_OK);
  Bytes result(deflateBound(&stream, content.size()));
  stream.next_in = const_cast<Bytef*>(content.data());
  stream.avail_in = static_cast<uInt>(content.size());
  stream.next_out = result.data();
  stream.avail_out = static_cast<uInt>(result.size());
  EXPECT_EQ(deflate(&stream, Z_FINISH), Z_STREAM_END);
  result.resize(stream.total_out);
  deflateEnd(&stream);
  return result;
}

template <typename F>
std::string error_of(F action) {
  try {
    action();
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

std::string parse_error(const Bytes& content) {
  return error_of([&] { parse_idx(content, "FILE"); });
}

class IdxFolder : public testing::Test {
 protected:
  void SetUp() override {
    std::string pattern = (fs::path(testing::TempDir()) / "lockstep_idx_XXXXXX").string();
    ASSERT_NE(mkdtemp(pattern.data()), nullptr);
    folder_ = pattern;
    write("train-images-idx3-ubyte", idx({4, 2, 3}, Bytes(24, 7)));
    write("train-labels-idx1-ubyte", idx({4}, {0, 1, 2, 9}));
    write("t10k-images-idx3-ubyte", idx({2, 2, 3}, Bytes(12, 8)));
    write("t10k-labels-idx1-ubyte", idx({2}, {5, 6}));
  }
  void TearDown() override { fs::remove_all(folder_); }
  void write(const std::string& name, const Bytes& content) {
    std::ofstream(folder_ / name, std::ios::binary)
        .write(reinterpret_cast<const char*>(content.data()),
               static_cast<std::streamsize>(content.size()));
  }
  std::string load_error() {
    return error_of([&] { load_idx_folder(folder_, 10); });
  }
  fs::path folder_;
};

TEST(Idx, ParsesShapeAndElements) {
  const IdxArray array = parse_idx(idx({2, 3}, {1, 2, 3, 4, 5, 6}), "FILE");
  EXPECT_EQ(array.shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(array.bytes, (Bytes{1, 2, 3, 4, 5, 6}));
}

TEST(Idx, RefusesWhatIsNotWhole) {
  EXPECT_EQ(parse_error({}), "FILE: 0 bytes are too few for an IDX file");
  EXPECT_THAT(parse_error({0, 0, 8}), HasSubstr("3 bytes are too few"));
  EXPECT_EQ(parse_error({1, 2, 3, 4}),
            "FILE: not an IDX file of unsigned bytes: its magic is 0x01020304; hint: images have "
            "0x00000803, labels 0x00000801");
  EXPECT_THAT(parse_error({0, 0, 0x0d, 1, 0, 0, 0, 1, 0, 0, 0, 0}), HasSubstr("0x00000d01"));
  EXPECT_THAT(parse_error({0, 0, 8, 0}), HasSubstr("0x00000800"));
  EXPECT_THAT(parse_error({0, 0, 8, 9}), HasSubstr("0x00000809"));
  EXPECT_THAT(parse_error({0, 0, 8, 2, 0, 0, 0, 1}), HasSubstr("truncated within its header"));
  EXPECT_THAT(parse_error(idx({0}, {})), HasSubstr("holds nothing"));
  EXPECT_EQ(parse_error(idx({2, 3}, {1, 2, 3})),
            "FILE: truncated: its header says 2×3, 3 bytes follow");
  EXPECT_EQ(parse_error(idx({2}, {1, 2, 3})), "FILE: 1 bytes too many after its 2 elements");
  const std::uint32_t most = 0xffffffff;
  EXPECT_THAT(parse_error(idx({most, most, most, most}, {1})), HasSubstr("truncated"));
}

TEST_F(IdxFolder, LoadsBothParts) {
  const TrainTest data = load_idx_folder(folder_, 10);
  EXPECT_EQ(data.train.rows, 4u);
  EXPECT_EQ(data.test.rows, 2u);
  EXPECT_EQ(data.train.sample_shape, (std::vector<std::int64_t>{2, 3}));
  EXPECT_EQ(data.train.classes, (std::vector<std::int64_t>{0, 1, 2, 9}));
  EXPECT_EQ(data.test.bytes, Bytes(12, 8));
  EXPECT_EQ(data.train.class_count, 10);
}

TEST_F(IdxFolder, TrainingImagesNeedNoOthers) {
  fs::remove(folder_ / "t10k-images-idx3-ubyte");
  fs::remove(folder_ / "t10k-labels-idx1-ubyte");
  EXPECT_EQ(load_idx_training(folder_, 10).rows, 4u);
  EXPECT_EQ(load_idx_training(folder_, 10).source, folder_.string());
  EXPECT_THAT(load_error(), HasSubstr("t10k-images-idx3-ubyte"));
  fs::remove(folder_ / "train-labels-idx1-ubyte");
  EXPECT_THAT(error_of([&] { load_idx_training(folder_, 10); }),
              EndsWith("nor train-labels-idx1-ubyte.gz"));
}

TEST_F(IdxFolder, ReadsGzipByContentAndFindsTheOtherName) {
  const Bytes images = idx({4, 2, 3}, Bytes(24, 3));
  fs::remove(folder_ / "train-images-idx3-ubyte");
  write("train-images-idx3-ubyte.gz", gzip(images));
  EXPECT_EQ(load_idx_folder(folder_, 10).train.bytes, Bytes(24, 3));
  write("train-images-idx3-ubyte", gzip(images));  // packed in spite of its name
  EXPECT_EQ(load_idx_folder(folder_, 10).train.bytes, Bytes(24, 3));
  // Two members, one after the other, as `cat a.gz b.gz` makes them.
  Bytes members = gzip(Bytes(images.begin(), images.begin() + 10));
  const Bytes rest = gzip(Bytes(images.begin() + 10, images.end()));
  members.insert(members.end(), rest.begin(), rest.end());
  write("train-images-idx3-ubyte", members);
  EXPECT_EQ(load_idx_folder(folder_, 10).train.bytes, Bytes(24, 3));
}

TEST_F(IdxFolder, DamagedGzip) {
  const Bytes good = gzip(idx({4, 2, 3}, Bytes(24, 3)));
  const auto error_with = [&](const Bytes& content) {
    write("train-images-idx3-ubyte", content);
    return load_error();
  };
  EXPECT_EQ(error_with(good), "no error");
  EXPECT_THAT(error_with(Bytes(good.begin(), good.end() - 5)), HasSubstr("it ends too early"));
  EXPECT_THAT(error_with(Bytes(good.begin(), good.begin() + 12)), HasSubstr("damaged gzip file"));
  EXPECT_THAT(error_with({0x1f, 0x8b}), HasSubstr("damaged gzip file"));
  Bytes wrong_sum = good;
  wrong_sum[good.size() - 6] ^= 1;
  EXPECT_THAT(error_with(wrong_sum), HasSubstr("incorrect data check"));
  Bytes wrong_size = good;
  wrong_size[good.size() - 1] ^= 0x40;  // promises 1 GiB
  EXPECT_THAT(error_with(wrong_size), HasSubstr("incorrect length check"));
  Bytes garbage = good;
  garbage.insert(garbage.end(), {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12});
  EXPECT_THAT(error_with(garbage), AllOf(HasSubstr("damaged"), HasSubstr(folder_.string())));
}

TEST_F(IdxFolder, MissingFilesAndFolders) {
  fs::remove(folder_ / "t10k-labels-idx1-ubyte");
  EXPECT_EQ(load_error(), "cannot read " + (folder_ / "t10k-labels-idx1-ubyte").string() +
                              ": there is neither this file nor t10k-labels-idx1-ubyte.gz; hint: "
                              "split.test = 0.2 holds out some of the training images");
  const auto error = error_of([&] { load_idx_folder(folder_ / "nowhere", 10); });
  EXPECT_THAT(error, HasSubstr("cannot read the data folder " + (folder_ / "nowhere").string() +
                               ": No such file or directory; hint: "));
  EXPECT_THAT(error_of([&] { load_idx_folder(folder_ / "train-images-idx3-ubyte", 10); }),
              HasSubstr("not a folder"));
  write("t10k-labels-idx1-ubyte", {});
  EXPECT_THAT(load_error(), HasSubstr("t10k-labels-idx1-ubyte: 0 bytes are too few"));
}

TEST_F(IdxFolder, CountsLabelsAndShapesThatDisagree) {
  write("train-labels-idx1-ubyte", idx({3}, {0, 1, 2}));
  EXPECT_EQ(load_error(), (folder_ / "train-images-idx3-ubyte").string() + " holds 4 images, but " +
                              (folder_ / "train-labels-idx1-ubyte").string() + " holds 3 labels");
  write("train-labels-idx1-ubyte", idx({4}, {0, 1, 10, 2}));
  EXPECT_EQ(load_error(), (folder_ / "train-labels-idx1-ubyte").string() +
                              ": row 2: label 10 is not one of the classes 0 to 9");
  write("train-labels-idx1-ubyte", idx({4, 1}, {0, 1, 1, 2}));
  EXPECT_THAT(load_error(), HasSubstr("holds no labels (shape 4×1)"));
  write("train-labels-idx1-ubyte", idx({4}, {0, 1, 1, 2}));
  write("train-images-idx3-ubyte", idx({4}, {0, 1, 1, 2}));
  EXPECT_THAT(load_error(), HasSubstr("holds labels, not images"));
  write("train-images-idx3-ubyte", idx({4, 2, 2}, Bytes(16, 1)));
  EXPECT_THAT(load_error(), HasSubstr("training images are 2×2, test images 2×3"));
}

TEST_F(IdxFolder, ImagesForPrediction) {
  Dataset data = load_idx_images(folder_);
  EXPECT_EQ(data.rows, 2u);
  EXPECT_EQ(data.classes, (std::vector<std::int64_t>{5, 6}));
  EXPECT_EQ(data.class_count, 7);
  fs::remove(folder_ / "t10k-labels-idx1-ubyte");
  data = load_idx_images(folder_);
  EXPECT_TRUE(data.classes.empty());
  EXPECT_EQ(data.class_count, 0);
  data = load_idx_images(folder_ / "train-images-idx3-ubyte");
  EXPECT_EQ(data.rows, 4u);
  EXPECT_TRUE(data.classes.empty());
  EXPECT_THAT(error_of([&] { load_idx_images(folder_ / "nowhere"); }), HasSubstr("cannot read"));
}

// In a child of its own, as nobody: root may read everything.
TEST_F(IdxFolder, NoPermission) {
  ASSERT_EQ(chmod(folder_.c_str(), 0), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (geteuid() == 0 && setuid(65534) != 0) _exit(2);
    const std::string error = load_error();
    _exit(error.find("Permission denied") != std::string::npos &&
                  error.find(folder_.string()) != std::string::npos
              ? 0
              : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
  ASSERT_EQ(chmod(folder_.c_str(), 0700), 0);
}

TEST_F(IdxFolder, UnreadableFile) {
  ASSERT_EQ(chmod(folder_.c_str(), 0755), 0);
  ASSERT_EQ(chmod((folder_ / "train-images-idx3-ubyte").c_str(), 0), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    if (geteuid() == 0 && setuid(65534) != 0) _exit(2);
    _exit(load_error().find("train-images-idx3-ubyte: Permission denied") != std::string::npos ? 0
                                                                                               : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

}  // namespace
}  // namespace lockstep
