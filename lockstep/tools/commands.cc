#include "lockstep/tools/commands.h"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>

#include "lockstep/base/deadline.h"
#include "lockstep/cluster/flight_recorder.h"
#include "lockstep/cluster/spawn.h"
#include "lockstep/job/nearest.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

Interrupted::Interrupted(int signal)
    : Error("ended by signal " + std::to_string(signal) + " (" + signal_name(signal) + ")"),
      signal_(signal) {}

std::pair<std::string, std::string> split_range(const std::string& text) {
  const std::size_t colon = text.find(':');
  if (colon == std::string::npos) return {"", text};
  return {text.substr(0, colon), text.substr(colon + 1)};
}

int seats_for(int most, int standby, bool replaces) {
  constexpr int kDeathsInAStep = 16;  // beyond that of all: in one recovery after another
  return std::min(replaces ? 2 * most + standby + kDeathsInAStep : most + standby, kMaxSeats);
}

std::string both_spellings(std::string_view name) {
  std::string underscores(name);
  std::replace(underscores.begin() + 2, underscores.end(), '-', '_');
  return underscores == name ? underscores : std::string(name) + "," + underscores;
}

bool parse_arguments(CLI::App& app, const std::vector<std::string>& arguments) {
  const auto usage = [&] { return app.get_name() + " --help explains"; };
  app.allow_extras();
  try {
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));  // from the back
  } catch (const CLI::CallForHelp&) {
    print(app.help());
    return false;
  } catch (const CLI::ParseError& error) {
    std::string message = error.what();
    std::replace(message.begin(), message.end(), '\n', ' ');
    throw ConfigError(message, usage());
  }
  for (const CLI::Option* option : app.get_options())
    if (option->get_group() != kWithoutMeaning)
      for (const std::string& value : option->results())
        if (value.empty())
          throw ConfigError(fmt::format("{} has an empty value", option->get_name()),
                            "give it one, or leave it out");
  const std::vector<std::string> extras = app.remaining();
  if (extras.empty() || (app.get_prefix_command() && !extras[0].starts_with('-'))) return true;
  if (app.get_prefix_command() && extras[0] == "--") return true;
  const std::string word = extras[0].substr(0, extras[0].find('='));
  if (!word.starts_with('-'))
    throw ConfigError(fmt::format("unexpected argument {}", extras[0]), usage());
  std::vector<std::string> known;
  for (const CLI::Option* option : app.get_options())
    for (const std::string& name : option->get_lnames()) known.push_back("--" + name);
  const std::string near = nearest(word, known);
  throw ConfigError("unknown flag " + word, near.empty() ? usage() : "did you mean " + near + "?");
}

double monotonic_seconds() { return seconds(Clock::now().time_since_epoch()); }

Console& console() {
  static Console streams(STDOUT_FILENO, STDERR_FILENO);
  return streams;
}
void print(std::string_view text) { console().write(false, text); }
void print_error(std::string_view text) { console().write(true, text); }

void print_flight_record(Segment& segment, const std::filesystem::path& file) {
  const std::string text = dump_flight_record(segment, file);
  if (!text.empty()) print_error("lockstep: " + text + "\n");
}

}  // namespace lockstep
