// The schema of a job file: one table that drives parsing, hints, checks, writing and the
// documentation. For job/ and the commands. Constant data; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "lockstep/job/job.h"

namespace lockstep::job {

// Where in a Job a key's value lives.
using Field =
    std::variant<bool& (*)(Job&), std::int64_t& (*)(Job&), std::uint64_t& (*)(Job&),
                 double& (*)(Job&), std::string& (*)(Job&), std::vector<std::int64_t>& (*)(Job&)>;

// A number's range (a list's: of each element), or the words a string may be (none: any text).
struct Limits {
  double low = 0;
  double high = 0;
  bool low_excluded = false;
  bool high_excluded = false;
  std::vector<std::string> words = {};

  bool contain(double value) const;
  std::string text() const;  // ">= 0 and < 1"
};

struct Key {
  std::string_view name;  // "train.epochs"
  Field field;
  Limits limits;
  std::string_view meaning;
  bool written = true;  // part of the resolved job
};

struct Recipe {
  std::string name;
  bool images = false;        // IDX images with a test set of their own
  bool text = false;          // any files, as bytes
  bool needs_data = false;    // no default folder
  std::string_view defaults;  // TOML, applied before the user's settings
};

const std::vector<Key>& schema();
const std::vector<Recipe>& recipes();
const Key* find_key(std::string_view name);  // nullptr: unknown
bool is_section(std::string_view name);

std::string_view type_of(const Key& key);  // "an integer", as messages say it
std::string value_as_toml(const Key& key, const Job& job);
std::string toml_string(std::string_view text);  // a TOML basic string; one line, whatever the text
// For messages: one line, control characters escaped, cut when very long.
std::string printable(std::string_view text);

// "did you mean train.batch_size?" for a key or section that does not exist; "" when none is near.
std::string hint_for_key(std::string_view name);
std::string hint_for_word(std::string_view word, const std::vector<std::string>& allowed);

}  // namespace lockstep::job
