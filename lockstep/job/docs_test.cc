// docs/job-file.md holds every key of a job file.
#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <toml++/toml.h>

#include "lockstep/base/file.h"
#include "lockstep/job/schema.h"

namespace lockstep::job {
namespace {

// The key's value where a recipe has a default of its own for it, else the general one.
std::string default_of(const Key& key, const toml::table& defaults) {
  Job job;
  if (const auto node = defaults.at_path(key.name))
    std::visit(
        [&](auto field) {
          using T = std::remove_reference_t<decltype(field(job))>;
          if constexpr (std::is_same_v<T, std::vector<std::int64_t>>) {
            EXPECT_TRUE(node.as_array()->empty());
            field(job).clear();
          } else {
            field(job) = node.value<T>().value();
          }
        },
        key.field);
  return value_as_toml(key, job);
}

// Key, type, default, meaning. The defaults of a recipe stand beside the general one where they
// differ.
std::string table_of_keys() {
  std::string result = "| key | type | default | meaning |\n|---|---|---|---|\n";
  for (const Key& key : schema()) {
    const std::string general = value_as_toml(key, Job{});
    std::string defaults = general == "\"\"" ? "" : fmt::format("`{}`", general);
    for (const Recipe& recipe : recipes()) {
      const std::string own = default_of(key, toml::parse(recipe.defaults));
      if (own != general)
        defaults += fmt::format("{}{}: `{}`", defaults.empty() ? "" : "; ", recipe.name, own);
    }
    if (key.name == "loss.name") defaults += "; regression: `\"mean_squared_error\"`";
    if (key.name == "train.global_batch_size" || key.name == "train.virtual_ranks") defaults = "";
    std::string type(type_of(key));
    if (type.starts_with("a")) type = type.substr(type.find(' ') + 1);
    const Limits& limits = key.limits;
    if (!limits.words.empty())
      type = fmt::format("`{}`", fmt::join(limits.words, "`, `"));
    else if (type != "text" && type != "true or false")
      type += ' ' + limits.text();
    result += fmt::format("| `{}` | {} | {} | {} |\n", key.name, type, defaults, key.meaning);
  }
  return result;
}

TEST(JobFile, DocumentationHoldsEveryKey) {
  const auto source = std::filesystem::path(__FILE__).parent_path() / "../..";
  EXPECT_THAT(read_text_file(source / "docs/job-file.md"), testing::HasSubstr(table_of_keys()))
      << "docs/job-file.md should hold this table:\n"
      << table_of_keys();
}

}  // namespace
}  // namespace lockstep::job
