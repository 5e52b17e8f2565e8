#include "lockstep/job/job.h"

#include <fmt/format.h>
#include <toml++/toml.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <set>
#include <type_traits>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/job/schema.h"

namespace lockstep {
namespace {

using job::Key;
using job::printable;

// Where a setting came from; a later level wins over an earlier one.
enum class Level { defaults, file, command_line };
struct Origin {
  Level level = Level::defaults;
  std::string where;  // "job.toml:12", "--set"
};

[[noreturn]] void fail(const std::string& where, std::string_view key, const std::string& message,
                       const std::string& hint = "") {
  throw ConfigError(fmt::format("{}: {}: {}", where, printable(key), message), hint);
}

toml::table parse_toml(std::string_view text, const std::string& where) {
  try {
    return toml::parse(text);
  } catch (const toml::parse_error& error) {
    throw ConfigError(
        fmt::format("{}:{}: {}", where, error.source().begin.line, printable(error.description())),
        error.description().find("64 bits") != std::string_view::npos
            ? "whole numbers are at most 2^63 - 1"
            : "job files are TOML, https://toml.io");
  }
}

std::string text_of(const toml::node& node) {
  if (const auto* text = node.as_string()) return '"' + printable(text->get()) + '"';
  if (const auto* integer = node.as_integer()) return fmt::format("{}", integer->get());
  if (const auto* number = node.as_floating_point()) return fmt::format("{:#}", number->get());
  if (const auto* boolean = node.as_boolean()) return boolean->get() ? "true" : "false";
  if (node.is_table()) return "a table";
  return node.is_array() ? "a list" : "a date or time";
}

bool is_whole_number(std::string_view text) {
  text.remove_prefix(text.starts_with('-') || text.starts_with('+') ? 1 : 0);
  return !text.empty() && text.find_first_not_of("0123456789_") == std::string_view::npos;
}

// The value of a --set, which is TOML; std::nullopt: a bare word.
std::optional<toml::table> parse_value(const std::string& value) {
  try {
    toml::table table = toml::parse("value = " + value);
    if (table.size() == 1) return table;
  } catch (const toml::parse_error&) {
  }
  return std::nullopt;
}

// One value of the job, checked by the schema.
class Setter {
 public:
  Setter(const Key& key, const std::string& where) : key_(key), where_(where) {}

  void set(const toml::node& node, bool& out) const { out = exact<bool>(node); }
  void set(const toml::node& node, std::int64_t& out) const {
    const auto value = exact<std::int64_t>(node);
    check_range(static_cast<double>(value), node);
    out = value;
  }
  void set(const toml::node& node, std::uint64_t& out) const {
    std::int64_t value = 0;
    set(node, value);  // no key allows a negative seed
    out = static_cast<std::uint64_t>(value);
  }
  void set(const toml::node& node, double& out) const {
    const double value =
        node.is_integer() ? static_cast<double>(node.as_integer()->get()) : exact<double>(node);
    if (!std::isfinite(value)) fail(where_, key_.name, text_of(node) + " is not a finite number");
    check_range(value, node);
    out = value;
  }
  void set(const toml::node& node, std::string& out) const {
    const auto& text = exact<std::string>(node);
    const auto& words = key_.limits.words;
    if (!words.empty() && std::ranges::find(words, text) == words.end())
      fail(where_, key_.name, fmt::format("unknown {} {}", leaf(), text_of(node)),
           job::hint_for_word(text, words));
    if (text.find('\0') != std::string::npos) fail(where_, key_.name, "holds a NUL character");
    out = text;
  }
  void set(const toml::node& node, std::vector<std::int64_t>& out) const {
    constexpr std::size_t kLongestList = 1024;
    if (!node.is_array()) wrong_type(node);
    const toml::array& list = *node.as_array();
    if (list.size() > kLongestList)
      fail(where_, key_.name, fmt::format("{} elements are too many", list.size()),
           fmt::format("at most {}", kLongestList));
    std::vector<std::int64_t> result(list.size());
    for (std::size_t i = 0; i < list.size(); ++i) set(list[i], result[i]);
    out = std::move(result);
  }

 private:
  template <typename T>
  const T& exact(const toml::node& node) const {
    if (const auto* value = node.as<T>()) return value->get();
    wrong_type(node);
  }
  // "recipe", "model", "normalize": what a word names.
  std::string_view leaf() const {
    const std::size_t dot = key_.name.find('.');
    if (dot == std::string_view::npos) return key_.name;
    const std::string_view leaf = key_.name.substr(dot + 1);
    return leaf == "name" ? key_.name.substr(0, dot) : leaf;
  }
  [[noreturn]] void wrong_type(const toml::node& found) const {
    const bool text = job::type_of(key_) == "text";
    fail(where_, key_.name, fmt::format("must be {}, not {}", job::type_of(key_), text_of(found)),
         text ? "put it in quotes"
              : fmt::format("for example {} = {}", key_.name, job::value_as_toml(key_, Job{})));
  }
  void check_range(double value, const toml::node& node) const {
    if (!key_.limits.contain(value))
      fail(where_, key_.name, text_of(node) + " is out of range", "allowed: " + key_.limits.text());
  }

  const Key& key_;
  const std::string& where_;
};

// A job in the making: defaults, then the file, then the command line.
class Builder {
 public:
  explicit Builder(std::string name) : name_(std::move(name)) {}

  void apply(const toml::table& table, Level level, const std::string& prefix = "") {
    apply(table, prefix, [&](const toml::key& key) {
      return Origin{level, fmt::format("{}:{}", name_, key.source().begin.line)};
    });
  }
  void apply(const Override& setting);
  Job resolve() &&;
  const Job& job() const { return job_; }

 private:
  template <typename OriginOf>
  void apply(const toml::table& table, const std::string& prefix, const OriginOf& origin_of);
  void set(std::string_view name, const toml::node& node, Origin origin);
  Level level_of(std::string_view name) const {
    const auto found = origins_.find(name);
    return found == origins_.end() ? Level::defaults : found->second.level;
  }
  // A check that involves several keys: the message points to where `key` was set.
  void require(bool holds, std::string_view key, const std::string& message,
               const std::string& hint = "leave it out") const {
    if (holds) return;
    const auto found = origins_.find(key);
    fail(found == origins_.end() ? name_ : found->second.where, key, message, hint);
  }
  void check_data(const job::Recipe& recipe) const;
  void check_partition(bool classification) const;
  void check_schedule() const;
  void check_model(const job::Recipe& recipe, bool classification) const;
  void check_strategy() const;
  void resolve_batch();

  std::string name_;
  Job job_;
  std::map<std::string_view, Origin> origins_;  // of what the user set
};

void Builder::set(std::string_view name, const toml::node& node, Origin origin) {
  const Key* key = job::find_key(name);
  if (!key && !job::is_section(name))
    fail(origin.where, name, "unknown key", job::hint_for_key(name));
  if (!key)
    fail(origin.where, name, "must be a table, not " + text_of(node),
         fmt::format("keys of the section [{}] go below it", name));
  const Setter setter(*key, origin.where);
  std::visit([&](auto field) { setter.set(node, field(job_)); }, key->field);
  if (origin.level != Level::defaults) origins_[key->name] = std::move(origin);
}

template <typename OriginOf>
void Builder::apply(const toml::table& table, const std::string& prefix,
                    const OriginOf& origin_of) {
  for (const auto& [key, node] : table) {
    const std::string name = prefix + std::string(key.str());
    if (node.is_table() && job::is_section(name)) {
      apply(*node.as_table(), name + '.', origin_of);
    } else {
      set(name, node, origin_of(key));
    }
  }
}

void Builder::apply(const Override& setting) {
  const Key* key = job::find_key(setting.key);
  const bool is_text = key && std::holds_alternative<std::string& (*)(Job&)>(key->field);
  const bool is_quoted = !setting.value.empty() &&
                         std::string_view("\"'").find(setting.value[0]) != std::string_view::npos;
  // A bare word is a string; for a text key everything is (a path may look like a date).
  std::optional<toml::table> table;
  if (!is_text || is_quoted) table = parse_value(setting.value);
  if (!table && key && !is_text && is_whole_number(setting.value))
    fail(setting.where, setting.key, printable(setting.value) + " is too large",
         "allowed: " + key->limits.text());
  if (!table) table = parse_value(job::toml_string(setting.value));
  if (!table) fail(setting.where, setting.key, "the value is not UTF-8 text");
  const toml::node& value = *table->get("value");
  const Origin origin{Level::command_line, setting.where};
  if (value.is_table() && job::is_section(setting.key))
    apply(*value.as_table(), setting.key + '.', [&](const toml::key&) { return origin; });
  else
    set(setting.key, value, origin);
}

void Builder::check_data(const job::Recipe& recipe) const {
  require(!recipe.needs_data || !job_.data.empty(), "data",
          fmt::format("recipe {} needs {}", recipe.name,
                      recipe.images ? "a folder with IDX files" : "a CSV file"),
          "--data PATH, or data = \"PATH\" in the job file");
  require(recipe.name != "linear-regression" || job_.data.empty(), "data",
          "linear-regression makes its own data", "leave it out, or use the recipe csv");
  require(recipe.name != "csv" || !job_.dataset.target.empty(), "dataset.target",
          "recipe csv needs the name of the target column", "--set dataset.target=NAME");
  const std::string& delimiter = job_.dataset.delimiter;
  require(delimiter.size() == 1 &&
              delimiter.find_first_of("\"\r\n+-.0123456789eE") == std::string::npos,
          "dataset.delimiter",
          fmt::format("{} cannot separate columns", job::toml_string(delimiter)),
          R"(one character, such as ",", ";" or "\t")");
  require(recipe.name == "csv" || job_.dataset.target.empty(), "dataset.target", "is for csv");
  require(recipe.images || job_.dataset.normalize != "unit", "dataset.normalize",
          "\"unit\" is for images", "\"standard\" or \"none\"");
  require(!recipe.text || job_.dataset.normalize == "none", "dataset.normalize",
          "text is not normalised", "\"none\"");
  const auto& classes = job_.dataset.classes;
  require(recipe.images || classes.empty(), "dataset.classes", "is for images");
  require(recipe.images || job_.dataset.augment == "none", "dataset.augment", "is for images");
  require(classes.size() != 1, "dataset.classes", "one class leaves nothing to tell apart",
          "name two or more, or none for all");
  require(std::set(classes.begin(), classes.end()).size() == classes.size(), "dataset.classes",
          "names a class twice", "name each once");
  require(static_cast<double>(job_.dataset.rows) * static_cast<double>(job_.dataset.features) <=
              (1 << 30),
          "dataset.rows", "rows × features is above 2^30", "make fewer");
}

void Builder::check_partition(bool classification) const {
  const DatasetSettings& data = job_.dataset;
  require(classification || data.keep_fraction == 1, "dataset.keep_fraction", "is for classes");
  const bool keyed = data.partition != "none" && data.partition != "range";
  require(keyed || data.partition_key.empty(), "dataset.partition_key",
          fmt::format("dataset.partition = \"{}\" has no use for it", data.partition),
          "hash, stratified or weighted, or leave it out");
  require(job_.recipe == "csv" || data.partition_key.empty(), "dataset.partition_key", "is for csv",
          "leave it out: the key is the class");
  require(!keyed || classification || !data.partition_key.empty(), "dataset.partition",
          fmt::format("{} needs a key, and there are no classes", data.partition),
          job_.recipe == "csv" ? "dataset.partition_key = \"COLUMN\"" : "\"none\" or \"range\"");
}

void Builder::check_schedule() const {
  const std::string& name = job_.schedule.name;
  require(name == "linear" || name == "cosine" || job_.schedule.warmup_steps == 0,
          "schedule.warmup_steps", fmt::format("schedule.name = \"{}\" has no warm-up", name),
          "schedule.name = \"linear\" or \"cosine\", or leave it out");
  require(name == "cosine" || job_.schedule.min_lr == 0, "schedule.min_lr",
          fmt::format("schedule.name = \"{}\" has no use for it", name),
          "schedule.name = \"cosine\", or leave it out");
}

void Builder::check_model(const job::Recipe& recipe, bool classification) const {
  const ModelSettings& model = job_.model;
  require(recipe.images || (model.name != "cnn" && model.name != "resnet18"), "model.name",
          fmt::format("{} is for images, not for {}", model.name, recipe.name),
          recipe.text ? "\"gpt\"" : "\"mlp\"");
  require(recipe.text == (model.name == "gpt"), "model.name",
          fmt::format("{} is not for {}", model.name, recipe.name),
          recipe.text ? "\"gpt\"" : "\"mlp\"");
  require(model.width % model.heads == 0, "model.width",
          fmt::format("{} does not divide into {} heads", model.width, model.heads),
          fmt::format("{}", (model.width / model.heads + 1) * model.heads));
  require(job_.model.name == "cnn" || !job_.model.batch_norm, "model.batch_norm", "is for the cnn",
          "model.name = \"cnn\", or leave it out");
  const std::string& loss = job_.loss.name;
  require(
      classification == (loss == "cross_entropy" || loss == "hinge"), "loss.name",
      fmt::format("{} does not fit {}", loss, classification ? "classes" : "regression"),
      classification ? "cross_entropy, or hinge for two classes" : "mean_squared_error or huber");
  require(loss == "cross_entropy" || !recipe.text, "loss.name", "gpt learns by cross_entropy");
  require(!recipe.text || !job_.loss.one_hot, "loss.one_hot", "is not for gpt");
  require(loss != "hinge" || !recipe.images || job_.dataset.classes.size() == 2, "loss.name",
          "hinge needs exactly two classes", "for example dataset.classes = [0, 1]");
  require(loss == "cross_entropy" || !job_.loss.one_hot, "loss.one_hot", "is for cross_entropy");
  const bool closed_form = job_.optimizer.name == "closed_form";
  require(!closed_form || recipe.name == "linear-regression", "optimizer.name",
          "closed_form is for the recipe linear-regression", "sgd or adam");
  require(!closed_form || (job_.model.widths.empty() && loss == "mean_squared_error"),
          "optimizer.name", "closed_form solves a linear model with mean_squared_error",
          "model.widths = [] and loss.name = \"mean_squared_error\"");
}

void Builder::check_strategy() const {
  const TrainSettings& train = job_.train;
  const bool replicas = train.strategy != "shared_weights";
  const auto without = [&](bool holds, std::string_view key, const std::string& hint) {
    require(!replicas || holds, key,
            fmt::format("train.strategy = \"{}\" cannot do it", train.strategy), hint);
  };
  without(train.accumulate == 1, "train.accumulate", "a smaller train.batch_size");
  without(train.virtual_ranks == job_.workers.count, "train.virtual_ranks",
          "leave it out: each worker is one");
  without(job_.workers.min == 0 || job_.workers.min == job_.workers.count, "workers.min",
          "--workers N: as many from beginning to end");
  without(job_.optimizer.name != "closed_form", "optimizer.name", "an optimizer that takes steps");
}

// batch_size (a worker's) or global_batch_size: the one set at the higher level counts.
void Builder::resolve_batch() {
  const Level own = level_of("train.batch_size");
  const Level global = level_of("train.global_batch_size");
  TrainSettings& train = job_.train;
  require(own != global || own == Level::defaults, "train.global_batch_size",
          "train.batch_size is set as well", "give one of the two");
  if (own >= global) train.global_batch_size = train.batch_size * job_.workers.count;
  train.batch_size = 0;
  if (level_of("train.virtual_ranks") == Level::defaults) train.virtual_ranks = job_.workers.count;
  require(
      job_.workers.count <= train.virtual_ranks, "workers.count",
      fmt::format("{} workers are more than the job's {} virtual ranks", job_.workers.count,
                  train.virtual_ranks),
      fmt::format("at most {} workers, or a higher train.virtual_ranks (which changes the result)",
                  train.virtual_ranks));
  require(job_.workers.min <= job_.workers.count, "workers.min",
          fmt::format("{} is more than workers.count, {}", job_.workers.min, job_.workers.count),
          "--workers MIN:MAX sets both");
  require(
      train.virtual_ranks <= train.global_batch_size,
      level_of("train.virtual_ranks") == Level::defaults ? "workers.count" : "train.virtual_ranks",
      fmt::format("{} virtual ranks cannot share a batch of {}", train.virtual_ranks,
                  train.global_batch_size),
      fmt::format("train.global_batch_size of {} or more", train.virtual_ranks));
}

Job Builder::resolve() && {
  const auto& recipes = job::recipes();
  const auto recipe = std::ranges::find(recipes, job_.recipe, &job::Recipe::name);
  LOCKSTEP_CHECK(recipe != recipes.end());  // the schema lets no other name in
  const bool classification = recipe->images || recipe->text ||
                              (job_.recipe == "csv" && job_.dataset.task == "classification");
  if (level_of("loss.name") == Level::defaults)
    job_.loss.name = classification ? "cross_entropy" : "mean_squared_error";
  if (job_.dataset.delimiter == "\\t") job_.dataset.delimiter = "\t";  // as a shell leaves it
  check_data(*recipe);
  check_partition(classification && !recipe->text);
  check_schedule();
  check_model(*recipe, classification);
  resolve_batch();
  check_strategy();
  if (!job_.data.empty())
    job_.data = std::filesystem::absolute(job_.data).lexically_normal().string();
  return std::move(job_);
}

Job build(const toml::table& file, const std::string& name,
          const std::vector<Override>& overrides) {
  const auto apply_user = [&](Builder& builder) {
    builder.apply(file, Level::file);
    for (const Override& setting : overrides) builder.apply(setting);
  };
  Builder first(name);  // finds out the recipe, whose defaults come before the user's settings
  apply_user(first);
  if (first.job().recipe.empty())
    fail(name, "recipe", "is missing", job::hint_for_word("", recipe_names()));
  Builder builder(name);
  for (const auto& recipe : job::recipes())
    if (recipe.name == first.job().recipe)
      builder.apply(parse_toml(recipe.defaults, recipe.name), Level::defaults);
  apply_user(builder);
  return std::move(builder).resolve();
}

}  // namespace

Job parse_job(std::string_view toml, const std::string& where,
              const std::vector<Override>& overrides) {
  return build(parse_toml(toml, where), where, overrides);
}

Job resolve_job(const std::string& name_or_path, const std::vector<Override>& overrides) {
  const auto& names = recipe_names();
  if (std::ranges::find(names, name_or_path) != names.end())
    return build(toml::table{{"recipe", name_or_path}}, name_or_path, overrides);

  std::error_code ignored;
  const std::filesystem::path path(name_or_path);
  if (std::filesystem::is_directory(path, ignored))
    throw ConfigError(printable(name_or_path) + ": is a folder, not a job file",
                      printable((path / "job.toml").string()));
  const bool looks_like_a_file =
      path.has_parent_path() || path.has_extension() || std::filesystem::exists(path, ignored);
  if (!looks_like_a_file)
    throw ConfigError(fmt::format("unknown recipe \"{}\"", printable(name_or_path)),
                      job::hint_for_word(name_or_path, names) + ", or a job file");
  return parse_job(
      as_input([&] { return read_text_file(path); }, "a job file or one of the recipes' names"),
      printable(name_or_path), overrides);
}

}  // namespace lockstep
