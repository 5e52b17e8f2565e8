#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <string_view>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/data/dataset.h"
#include "lockstep/job/nearest.h"

namespace lockstep {
namespace {

constexpr std::int64_t kMostClasses = 65536;
constexpr std::size_t kMostColumns = std::size_t{1} << 20;

std::string_view trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(" \t");
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(" \t") - first + 1);
}

// For messages: one line of UTF-8, whatever the text; not too long.
std::string shown(std::string_view text) {
  std::size_t end = std::min<std::size_t>(text.size(), 40);
  while (end < text.size() && (text[end] & 0xc0) == 0x80) ++end;  // a whole character
  std::string result = fmt::format("{:?}", text.substr(0, end));
  if (end < text.size()) result.insert(result.size() - 1, "…");
  return result;
}

// Splits a text into records as RFC 4180 has them, and counts lines as an editor does. (libcsv
// would do the splitting, but loses the lines that messages have to name.)
class Records {
 public:
  Records(std::string_view text, const std::string& name, char delimiter)
      : rest_(text), name_(name), delimiter_(delimiter) {
    if (rest_.starts_with("\xef\xbb\xbf")) rest_.remove_prefix(3);
  }

  // False at the end. Fields stay valid until the next call. Blank lines are skipped.
  bool next() {
    while (!rest_.empty()) {
      line_ = next_line_;
      count_ = 0;
      bool more = true;
      while (more) more = field();
      if (count_ > 1 || !fields_[0].empty()) return true;
    }
    return false;
  }
  std::size_t size() const { return count_; }
  std::string_view operator[](std::size_t i) const { return fields_[i]; }
  std::string place() const { return fmt::format("{}:{}", name_, line_); }

 private:
  // Reads one field and what ends it; true if a delimiter did.
  bool field() {
    if (count_ == kMostColumns)
      throw ConfigError(fmt::format("{}: more than {} columns", place(), kMostColumns));
    if (count_ == fields_.size()) fields_.emplace_back();
    std::string& out = fields_[count_++];
    const std::size_t first = delimiter_ == ' ' ? 0 : rest_.find_first_not_of(' ');
    const bool quoted = first < rest_.size() && rest_[first] == '"';
    if (quoted) {
      rest_.remove_prefix(first + 1);
      read_quoted(out);
    }
    const char ends[] = {delimiter_, '\n'};
    const std::size_t end = std::min(rest_.find_first_of({ends, 2}), rest_.size());
    std::string_view plain = rest_.substr(0, end);
    const bool delimited = end < rest_.size() && rest_[end] == delimiter_;
    if (!delimited && plain.ends_with('\r')) plain.remove_suffix(1);
    if (!quoted) out = trimmed(plain);
    if (quoted && !trimmed(plain).empty())
      throw ConfigError(fmt::format("{}: {} after a closing quote", place(), shown(plain)));
    if (end < rest_.size() && !delimited) ++next_line_;
    rest_.remove_prefix(std::min(end + 1, rest_.size()));
    return delimited;
  }

  void read_quoted(std::string& out) {
    out.clear();
    for (;;) {
      const std::size_t quote = rest_.find('"');
      if (quote == std::string_view::npos)
        throw ConfigError(fmt::format("{}: a quote is opened and never closed", place()));
      out += rest_.substr(0, quote);
      next_line_ += static_cast<std::size_t>(std::ranges::count(rest_.substr(0, quote), '\n'));
      rest_.remove_prefix(quote + 1);
      if (!rest_.starts_with('"')) return;
      out += '"';  // doubled: one of the field's own
      rest_.remove_prefix(1);
    }
  }

  std::string_view rest_;
  const std::string& name_;
  char delimiter_;
  std::vector<std::string> fields_;
  std::size_t count_ = 0;
  std::size_t line_ = 1;  // where the record begins
  std::size_t next_line_ = 1;
};

// A header of a single column that holds what usually separates columns; "" otherwise.
std::string delimiter_hint(const std::vector<std::string>& header) {
  if (header.size() != 1) return "";
  const std::size_t found = header[0].find_first_of(";\t,|");
  if (found == std::string::npos) return "";
  const std::string delimiter = header[0][found] == '\t' ? "\\t" : header[0].substr(found, 1);
  return fmt::format("dataset.delimiter = \"{}\"", delimiter);
}

// Where a column lies; throws with the nearest column as a hint.
std::size_t find_column(const std::vector<std::string>& header, const std::string& column,
                        const std::string& place, std::string_view what) {
  const auto found = std::find(header.begin(), header.end(), column);
  if (found != header.end()) return static_cast<std::size_t>(found - header.begin());
  const std::string near = nearest(column, header), delimiter = delimiter_hint(header);
  throw ConfigError(fmt::format("{}: there is no {} column {}", place, what, shown(column)),
                    !delimiter.empty() ? delimiter
                    : near.empty()     ? fmt::format("the first column is {}", shown(header[0]))
                                       : fmt::format("did you mean {}?", shown(near)));
}

std::vector<std::string> read_header(Records& records, const std::string& name) {
  if (!records.next()) throw ConfigError(name + ": empty", "the first line names the columns");
  std::vector<std::string> header;
  for (std::size_t i = 0; i < records.size(); ++i) {
    if (records[i].empty())
      throw ConfigError(fmt::format("{}: column {} has no name", records.place(), i + 1));
    header.emplace_back(records[i]);
  }
  auto sorted = header;
  std::ranges::sort(sorted);
  const auto twice = std::ranges::adjacent_find(sorted);
  if (twice != sorted.end())
    throw ConfigError(fmt::format("{}: two columns are named {}", records.place(), shown(*twice)));
  return header;
}

float read_number(const Records& records, std::size_t column, const std::string& column_name,
                  std::string_view hint_for_words = "") {
  const auto bad = [&](std::string_view why, std::string_view hint = "") {
    return ConfigError(fmt::format("{}: column {}: {} {}", records.place(), shown(column_name),
                                   shown(records[column]), why),
                       std::string(hint));
  };
  std::string_view text = records[column];
  if (text.starts_with('+') && !text.starts_with("+-")) text.remove_prefix(1);
  double value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::invalid_argument || end != text.data() + text.size())
    throw bad("is not a number", text.empty() ? "fill the gap or drop the row" : hint_for_words);
  // from_chars does not tell too large from too small, which is 0.
  const bool too_large = error == std::errc::result_out_of_range &&
                         std::isinf(std::strtod(std::string(text).c_str(), nullptr));
  if (too_large || (std::isfinite(value) && std::abs(value) > std::numeric_limits<float>::max()))
    throw bad("is beyond what a float holds");
  if (!std::isfinite(value)) throw bad("is not finite");
  return static_cast<float>(value);
}

std::int64_t read_class(const Records& records, std::size_t column, const std::string& column_name,
                        std::int64_t class_count) {
  const float value =
      read_number(records, column, column_name, "classes are whole numbers 0, 1, …");
  const std::int64_t most = class_count > 0 ? class_count : kMostClasses;
  if (!(value >= 0 && value < static_cast<float>(most) && value == std::floor(value)))
    throw ConfigError(fmt::format("{}: column {}: {} is not one of the classes", records.place(),
                                  shown(column_name), shown(records[column])),
                      fmt::format("classes are the whole numbers 0 to {}", most - 1));
  return static_cast<std::int64_t>(value);
}

}  // namespace

Dataset parse_csv(const std::string& content, const std::string& name, const CsvOptions& options) {
  Records records(content, name, options.delimiter);
  const std::vector<std::string> header = read_header(records, name);
  const bool has_target = std::find(header.begin(), header.end(), options.target) != header.end();
  std::size_t target = header.size();  // none
  if (has_target || !options.target_optional)
    target = find_column(header, options.target, records.place(), "target");
  std::vector<std::size_t> columns;
  for (const std::string& feature : options.features)
    columns.push_back(find_column(header, feature, records.place(), "feature"));
  if (options.features.empty())
    for (std::size_t i = 0; i < header.size(); ++i)
      if (i != target) columns.push_back(i);
  if (columns.empty())
    throw ConfigError(fmt::format("{}: there is no column but the target", records.place()),
                      fmt::format("is {} what separates columns?", shown({&options.delimiter, 1})));

  Dataset data;
  data.source = name;
  data.sample_shape = {static_cast<std::int64_t>(columns.size())};
  for (const std::size_t column : columns) data.feature_names.push_back(header[column]);
  std::int64_t largest = -1;
  while (records.next()) {
    if (records.size() != header.size())
      throw ConfigError(fmt::format("{}: {} columns, but the header names {}", records.place(),
                                    records.size(), header.size()));
    for (const std::size_t column : columns)
      data.values.push_back(read_number(records, column, header[column]));
    if (target < header.size() && options.target_optional && records[target].empty()) {
      target = header.size();
      data.classes.clear();
      data.targets.clear();
      largest = -1;
    }
    if (target < header.size() && options.classification) {
      data.classes.push_back(read_class(records, target, header[target], options.class_count));
      largest = std::max(largest, data.classes.back());
    } else if (target < header.size()) {
      data.targets.push_back(read_number(records, target, header[target]));
    }
    ++data.rows;
  }
  if (data.rows == 0) throw ConfigError(name + ": there are no rows below the header");
  if (options.classification)
    data.class_count = options.class_count > 0 ? options.class_count : largest + 1;
  return data;
}

Dataset load_csv(const std::filesystem::path& path, const CsvOptions& options) {
  return parse_csv(as_input([&] { return read_text_file(path); }), path.string(), options);
}

}  // namespace lockstep
