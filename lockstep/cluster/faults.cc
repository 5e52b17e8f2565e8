#include "lockstep/cluster/faults.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <signal.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>

#include "lockstep/base/error.h"
#include "lockstep/base/hash.h"
#include "lockstep/base/numbers.h"
#include "lockstep/job/nearest.h"

namespace lockstep {
namespace {

constexpr std::array<std::string_view, 9> kPoints = {"start",      "computed",   "sealed",
                                                     "decided",    "updating",   "committed",
                                                     "evaluating", "checkpoint", "recovering"};
constexpr int kPointsOfEveryStep = 6;  // the first ones

// By FaultKind. Settings: those that are needed, then those that may be there.
struct Form {
  std::string_view name;
  std::vector<std::string> needed, possible;
};
const std::vector<Form>& forms() {
  static const std::vector<Form> all = {
      {"kill", {"rank", "step"}, {"when", "signal"}},
      {"stop", {"rank", "step"}, {"when"}},
      {"loop", {"rank", "step"}, {"when"}},
      {"deadlock", {"rank", "step"}, {"when"}},
      {"delay", {"rank", "step", "seconds"}, {"when"}},
      {"mismatch", {"rank", "step"}, {"when"}},
      {"out-of-memory", {"rank", "step"}, {"when"}},
      {"oom-kill", {"rank", "step"}, {"when"}},
      {"full-disk", {"step"}, {"rank"}},
      {"exit", {"rank", "step", "code"}, {"when"}},
      {"throw", {"rank", "step"}, {"when"}},
  };
  return all;
}
const Form kRandom = {"random", {"kills", "seed", "from", "to"}, {}};
const Form kTimed = {"kill", {"every", "seed"}, {"for"}};

constexpr std::size_t kMostFaults = 256;
constexpr std::uint64_t kMaxStepNumber = 1'000'000'000'000;
constexpr double kMaxSeconds = 1e6;

std::string example(const Form& form) {
  std::string text(form.name);
  for (const std::string& key : form.needed) text += fmt::format(" {}=", key);
  for (const std::string& key : form.possible) text += fmt::format(" [{}=]", key);
  return text;
}

// One line: its words, and what may be asked of them.
class Line {
 public:
  explicit Line(std::string_view text) : text_(text) {
    constexpr std::string_view kBlanks = " \t\r";
    for (std::size_t at = 0; (at = text.find_first_not_of(kBlanks, at)) != text.npos;) {
      const std::size_t end = std::min(text.find_first_of(kBlanks, at), text.size());
      words_.emplace_back(text.substr(at, end - at));
      at = end;
    }
  }
  bool empty() const { return words_.empty(); }
  const std::string& name() const { return words_[0]; }
  bool has(const std::string& key) const { return values_.contains(key); }
  bool mentions(std::string_view key) const {
    return std::ranges::any_of(words_, [&](auto& word) { return word.starts_with(key); });
  }
  [[noreturn]] void fail(const std::string& what, const std::string& hint) const {
    std::string shown = text_.substr(0, 200);
    for (char& c : shown)
      if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = '?';
    throw ConfigError(fmt::format("the fault \"{}\": {}", shown, what), hint);
  }

  // The settings, which are to be those of `form`.
  void read(const Form& form) {
    for (std::size_t i = 1; i < words_.size(); ++i) {
      const std::size_t equals = words_[i].find('=');
      const std::string key = words_[i].substr(0, equals);
      std::vector<std::string> known = form.needed;
      known.insert(known.end(), form.possible.begin(), form.possible.end());
      if (std::ranges::find(known, key) == known.end()) {
        const std::string near = nearest(key, known);
        fail(fmt::format("{} has no {}", form.name, printable(key)),
             near.empty() ? example(form) : fmt::format("did you mean {}=?", near));
      }
      if (equals == std::string::npos || equals + 1 == words_[i].size())
        fail(fmt::format("{} has no value", key), example(form));
      if (!values_.emplace(key, words_[i].substr(equals + 1)).second)
        fail(fmt::format("{} is there twice", key), example(form));
    }
    for (const std::string& key : form.needed)
      if (!has(key)) fail(fmt::format("{} is missing", key), example(form));
  }
  template <typename Integer>
  Integer integer(const std::string& key, Integer least, Integer most) const {
    if (const auto value = whole_number(values_.at(key), least, most)) return *value;
    fail(fmt::format("{} is not a whole number from {} to {}", key, least, most),
         fmt::format("{}={}", key, least));
  }
  double seconds(const std::string& key) const {
    const std::string& text = values_.at(key);
    double value = 0;
    const char* const last = text.data() + text.size();
    const auto [end, error] = std::from_chars(text.data(), last, value);
    const std::string_view unit(end, last);
    if (unit == "ms") value /= 1000;
    if (error != std::errc() || (unit != "" && unit != "s" && unit != "ms") ||
        !std::isfinite(value) || value <= 0 || value > kMaxSeconds)
      fail(fmt::format("{} is no time from 0 to {:g} s", key, kMaxSeconds),
           fmt::format("{0}=5s or {0}=200ms", key));
    return value;
  }
  Point point() const {
    const std::string& text = values_.at("when");
    const auto found = std::ranges::find(kPoints, text);
    if (found == kPoints.end())
      fail(fmt::format("when={} is unknown", printable(text)),
           fmt::format("when= is one of {}", fmt::join(kPoints, ", ")));
    return static_cast<Point>(found - kPoints.begin());
  }
  int signal() const {
    const std::string& text = values_.at("signal");
    const std::string_view name = text.starts_with("SIG") ? text.c_str() + 3 : text.c_str();
    for (int number = 1; number < NSIG; ++number) {
      const char* const known = ::sigabbrev_np(number);
      if (known != nullptr && name == known) return number;
    }
    fail(fmt::format("signal={} is unknown", printable(text)), "signal=KILL, SEGV, TERM, ...");
  }

 private:
  static std::string printable(std::string text) {
    for (char& c : text)
      if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) c = '?';
    return text;
  }
  std::string text_;
  std::vector<std::string> words_;
  std::map<std::string, std::string> values_;
};

Fault parse_single(Line& line) {
  const auto form = std::ranges::find(forms(), line.name(), &Form::name);
  if (form == forms().end()) {
    std::vector<std::string> names{std::string(kRandom.name)};
    for (const Form& known : forms()) names.emplace_back(known.name);
    const std::string near = nearest(line.name(), names);
    line.fail("there is no fault of this name",
              near.empty() ? fmt::format("one of {}", fmt::join(names, ", "))
                           : fmt::format("did you mean {}?", near));
  }
  line.read(*form);
  Fault fault{.kind = static_cast<FaultKind>(form - forms().begin())};
  if (fault.kind == FaultKind::full_disk) fault.when = Point::committed;
  fault.step = line.integer<std::uint64_t>("step", 1, kMaxStepNumber);
  if (line.has("rank")) fault.rank = line.integer("rank", 0, 1 << 20);
  if (line.has("when")) fault.when = line.point();
  if (line.has("signal")) fault.signal = line.signal();
  if (line.has("seconds")) fault.seconds = line.seconds("seconds");
  if (line.has("code")) fault.code = line.integer("code", 0, 255);
  return fault;
}

void add_random(Line& line, int ranks, std::vector<Fault>& faults) {
  line.read(kRandom);
  const auto kills = line.integer<std::uint64_t>("kills", 1, kMostFaults);
  const auto seed = line.integer<std::uint64_t>("seed", 0, ~std::uint64_t{0});
  const auto from = line.integer<std::uint64_t>("from", 1, kMaxStepNumber);
  const auto to = line.integer<std::uint64_t>("to", from, kMaxStepNumber);
  for (std::uint64_t i = 0; i < kills; ++i) {
    const auto below = [&](std::uint64_t what, std::uint64_t bound) {
      return mix({seed, i, what}) % bound;
    };
    faults.push_back({.rank = static_cast<int>(below(0, static_cast<std::uint64_t>(ranks))),
                      .step = from + below(1, to - from + 1),
                      .when = static_cast<Point>(below(2, kPointsOfEveryStep))});
  }
}

}  // namespace

FaultPlan parse_faults(std::span<const std::string> lines, int ranks) {
  LOCKSTEP_CHECK(ranks > 0);
  FaultPlan plan;
  for (const std::string& text : lines) {
    Line line(std::string_view(text).substr(0, text.find('#')));
    if (line.empty()) continue;
    if (line.name() == kRandom.name) {
      add_random(line, ranks, plan.faults);
    } else if (line.name() == kTimed.name && line.mentions("every=")) {
      line.read(kTimed);
      plan.timed.push_back({.every_s = line.seconds("every"),
                            .for_s = line.has("for") ? line.seconds("for") : 0,
                            .seed = line.integer<std::uint64_t>("seed", 0, ~std::uint64_t{0})});
    } else {
      plan.faults.push_back(parse_single(line));
    }
    if (plan.faults.size() > kMostFaults)
      line.fail(fmt::format("more than {} faults in one job", kMostFaults),
                "kill every=5s seed=1 strikes as often as you like");
  }
  return plan;
}

std::string to_text(const Fault& fault) {
  std::string text =
      fmt::format("{} rank={} step={}", forms()[static_cast<std::size_t>(fault.kind)].name,
                  fault.rank, fault.step);
  if (fault.kind == FaultKind::delay) text += fmt::format(" seconds={}", fault.seconds);
  if (fault.kind == FaultKind::exit) text += fmt::format(" code={}", fault.code);
  if (fault.kind == FaultKind::kill && fault.signal != SIGKILL)
    text += fmt::format(" signal={}", ::sigabbrev_np(fault.signal));
  if (fault.kind != FaultKind::full_disk)
    text += fmt::format(" when={}", kPoints[static_cast<std::size_t>(fault.when)]);
  return text;
}

std::string to_text(std::span<const Fault> faults) {
  std::string text;
  for (const Fault& fault : faults) text += to_text(fault) + "\n";
  return text;
}

std::vector<Fault> faults_from_text(std::string_view text) {
  std::vector<std::string> lines;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t end = std::min(text.find('\n', at), text.size());
    lines.emplace_back(text.substr(at, end - at));
    at = end + 1;
  }
  return parse_faults(lines, 1).faults;
}

int KillTimer::due(Clock::time_point now, int members) {
  if (start_ == Clock::time_point{}) start_ = now;
  const double elapsed = lockstep::seconds(now - start_);
  const auto passed = static_cast<std::uint64_t>(elapsed / kills_.every_s);
  if (passed <= done_ || members < 1 || (kills_.for_s > 0 && elapsed > kills_.for_s)) return -1;
  done_ = passed;
  return static_cast<int>(mix({kills_.seed, done_}) % static_cast<std::uint64_t>(members));
}

}  // namespace lockstep
