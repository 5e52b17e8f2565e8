#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "lockstep/base/error.h"
#include "lockstep/data/dataset.h"

namespace lockstep {
namespace {

using testing::EndsWith;
using testing::HasSubstr;

Dataset parse(const std::string& content, CsvOptions options = {.target = "y"}) {
  return parse_csv(content, "t.csv", options);
}
std::string error_of(const std::string& content, const CsvOptions& options = {.target = "y"}) {
  try {
    parse(content, options);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "no error";
}

TEST(Csv, ColumnsRowsAndTarget) {
  const Dataset data = parse("a,y,b\n1,2,3\n-4.5,+5e1,.25\n");
  EXPECT_EQ(data.rows, 2u);
  EXPECT_EQ(data.sample_shape, (std::vector<std::int64_t>{2}));
  EXPECT_EQ(data.feature_names, (std::vector<std::string>{"a", "b"}));
  EXPECT_EQ(data.values, (std::vector<float>{1, 3, -4.5f, .25f}));
  EXPECT_EQ(data.targets, (std::vector<float>{2, 50}));
  EXPECT_TRUE(data.classes.empty());
  EXPECT_EQ(data.class_count, 0);
}

TEST(Csv, TakesWhatEditorsAndSpreadsheetsWrite) {
  const std::vector<float> expected = {1, 3};
  for (const char* text : {"a,y\r\n1,2\r\n3,4\r\n",
                           "\xef\xbb\xbf"
                           "a,y\n1,2\n3,4",
                           "a , y\n\n 1 ,2 \n\n3,\t4\n\n", "\"a\",\"y\"\n\"1\",\"2\"\n3,\"4\"\r\n",
                           "\"a\" , y\n1,2\n3,4\n"}) {
    EXPECT_EQ(parse(text).values, expected) << text;
    EXPECT_EQ(parse(text).targets, (std::vector<float>{2, 4})) << text;
  }
  for (const char separator : {';', '\t', ' ', '|'}) {
    std::string text = "a,y\n1,2\n3,4\n";
    std::replace(text.begin(), text.end(), ',', separator);
    EXPECT_EQ(parse(text, {.target = "y", .delimiter = separator}).values, expected);
  }
  const Dataset quoted = parse("\"a,\"\"b\"\"\nc\",y\n1,2\n");
  EXPECT_EQ(quoted.feature_names[0], "a,\"b\"\nc");
}

TEST(Csv, Classes) {
  const CsvOptions options{.target = "y", .classification = true};
  const Dataset data = parse("a,y\n1,0\n2,2\n3,1.0\n", options);
  EXPECT_EQ(data.classes, (std::vector<std::int64_t>{0, 2, 1}));
  EXPECT_EQ(data.class_count, 3);
  EXPECT_TRUE(data.targets.empty());
  EXPECT_EQ(error_of("a,y\n1,0\n2,1.5\n", options),
            "t.csv:3: column \"y\": \"1.5\" is not one of the classes; hint: classes are the whole "
            "numbers 0 to 65535");
  EXPECT_THAT(error_of("a,y\n1,-1\n", options), HasSubstr("\"-1\" is not one of the classes"));
  EXPECT_EQ(
      error_of("a,y\n1,0\n2,cat\n", options),
      "t.csv:3: column \"y\": \"cat\" is not a number; hint: classes are whole numbers 0, 1, …");
  EXPECT_THAT(error_of("a,y\n1,70000\n", options), HasSubstr("not one of the classes"));
  EXPECT_THAT(error_of("a,y\n1,3\n", {.target = "y", .classification = true, .class_count = 3}),
              HasSubstr("whole numbers 0 to 2"));
}

TEST(Csv, ForPredictionTheTargetMayBeMissingAndColumnsAreFoundByName) {
  const CsvOptions options{.target = "y", .target_optional = true, .features = {"b", "a"}};
  const Dataset data = parse("note,a,b\nhello,1,2\n", options);
  EXPECT_EQ(data.values, (std::vector<float>{2, 1}));
  EXPECT_TRUE(data.targets.empty());
  EXPECT_EQ(parse("a,y,b\n1,5,2\n", options).targets, std::vector<float>{5});
  EXPECT_EQ(error_of("a,bb\n1,2\n", options),
            "t.csv:1: there is no feature column \"b\"; hint: did you mean \"bb\"?");
}

TEST(Csv, ForPredictionAnEmptyTargetIsAsGoodAsNone) {
  for (const bool classification : {false, true}) {
    CsvOptions options{.target = "y", .classification = classification, .target_optional = true};
    const Dataset data = parse("a,y\n1,1\n2,\n3,1\n", options);
    EXPECT_EQ(data.values, (std::vector<float>{1, 2, 3}));
    EXPECT_TRUE(data.targets.empty());
    EXPECT_TRUE(data.classes.empty());
    EXPECT_EQ(data.class_count, 0);
    options.target_optional = false;
    EXPECT_THAT(error_of("a,y\n1,1\n2,\n", options), HasSubstr("t.csv:3: column \"y\": \"\" is"));
  }
}

TEST(Csv, NumbersTooSmallAreZero) {
  EXPECT_EQ(parse("a,b,y\n1e-400,-1e-50,2\n").values, (std::vector<float>{0, 0}));
}

TEST(Csv, AnotherDelimiterIsHintedAt) {
  EXPECT_THAT(error_of("a;y\n1;2\n"), EndsWith("; hint: dataset.delimiter = \";\""));
  EXPECT_THAT(error_of("a\ty\n1\t2\n"), EndsWith("; hint: dataset.delimiter = \"\\t\""));
  EXPECT_THAT(error_of("a,y\n1,2\n", {.target = "y", .delimiter = ';'}),
              EndsWith("; hint: dataset.delimiter = \",\""));
  EXPECT_THAT(error_of("a,Y\n1,2\n"), EndsWith("; hint: did you mean \"Y\"?"));
}

TEST(Csv, MessagesAreTextWhateverTheFile) {
  EXPECT_EQ(error_of("a,y\n\x01\xff\xc3\xa9\xed\xa0\x80\xc3,1\n"),
            "t.csv:2: column \"a\": \"\\x01\\xffé\\xed\\xa0\\x80\\xc3\" is not a number");
  // Cut between characters.
  const std::string cut = error_of("a,y\n" + std::string(39, 'x') + "ééé,1\n");
  EXPECT_THAT(cut, HasSubstr("xé…\""));
}

TEST(Csv, ErrorsNameLineAndColumn) {
  EXPECT_EQ(error_of(""), "t.csv: empty; hint: the first line names the columns");
  EXPECT_THAT(error_of("\n\n"), HasSubstr("t.csv: empty"));
  EXPECT_EQ(error_of("a,y\n"), "t.csv: there are no rows below the header");
  EXPECT_EQ(error_of("a,why\n1,2\n", {.target = "wyh"}),
            "t.csv:1: there is no target column \"wyh\"; hint: did you mean \"why\"?");
  EXPECT_THAT(error_of("a,b\n1,2\n", {.target = "price"}), HasSubstr("the first column is \"a\""));
  EXPECT_EQ(error_of("a,y\n1,2\n3\n"), "t.csv:3: 1 columns, but the header names 2");
  EXPECT_EQ(error_of("a,y\n1,2,3\n"), "t.csv:2: 3 columns, but the header names 2");
  EXPECT_EQ(error_of("a,y\n1,2\n\n\nx,2\n"), "t.csv:5: column \"a\": \"x\" is not a number");
  EXPECT_THAT(error_of("\"a\nb\",y\n1,2\n1,2z\n"), HasSubstr("t.csv:4: column \"y\": \"2z\" is"));
  EXPECT_EQ(error_of("a,y\n,2\n"),
            "t.csv:2: column \"a\": \"\" is not a number; hint: fill the gap or drop the row");
  EXPECT_THAT(error_of("a,y\nnan,2\n"), HasSubstr("\"nan\" is not finite"));
  EXPECT_THAT(error_of("a,y\n1,-inf\n"), HasSubstr("\"-inf\" is not finite"));
  EXPECT_THAT(error_of("a,y\n1,1e39\n"), HasSubstr("beyond what a float holds"));
  EXPECT_THAT(error_of("a,y\n1,1e999\n"), HasSubstr("beyond what a float holds"));
  EXPECT_THAT(error_of("a,y\n+-1,1\n"), HasSubstr("is not a number"));
  EXPECT_THAT(error_of("a,y\n0x1,1\n"), HasSubstr("is not a number"));
  EXPECT_THAT(error_of("a,a,y\n1,1,1\n"), HasSubstr("two columns are named \"a\""));
  EXPECT_THAT(error_of("a,,y\n1,1,1\n"), HasSubstr("column 2 has no name"));
  EXPECT_THAT(error_of("y\n1\n"), HasSubstr("no column but the target; hint: is \",\" what"));
  EXPECT_THAT(error_of("a,y\n\"1,2\n"), HasSubstr("t.csv:2: a quote is opened and never closed"));
  EXPECT_THAT(error_of("a,y\n\"1\"2,2\n"), HasSubstr("after a closing quote"));
  const std::string long_one = error_of("a,y\n" + std::string(1000, 'x') + "\x01,2\n");
  EXPECT_LT(long_one.size(), 200u);
}

TEST(Csv, File) {
  const auto path = std::filesystem::path(testing::TempDir()) / "lockstep_csv_test.csv";
  std::ofstream(path) << "a,y\n1,2\n";
  EXPECT_EQ(load_csv(path, {.target = "y"}).rows, 1u);
  EXPECT_EQ(load_csv(path, {.target = "y"}).source, path.string());
  std::filesystem::remove(path);
  EXPECT_THROW(load_csv(path, {.target = "y"}), ConfigError);
  EXPECT_THROW(load_csv("/", {.target = "y"}), ConfigError);
}

}  // namespace
}  // namespace lockstep
