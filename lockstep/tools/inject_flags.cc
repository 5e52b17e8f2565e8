#include "lockstep/tools/inject_flags.h"

#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"

namespace lockstep {

void add_inject_flags(CLI::App& app, InjectFlags& flags) {
  app.add_option("--inject", flags.faults,
                 "a fault to survive, such as \"kill rank=1 step=37\"; repeatable")
      ->take_all()
      ->expected(1)
      ->allow_extra_args(false);  // what follows may be the program
  app.add_option("--inject-file", flags.file, "a file with a fault a line");
}

std::vector<TimedKills> inject(const InjectFlags& flags, int ranks, Environment& environment) {
  std::vector<std::string> lines = flags.faults;
  if (!flags.file.empty()) {
    std::istringstream text;
    try {
      text.str(read_text_file(flags.file));
    } catch (const Error& error) {
      throw ConfigError(std::string("--inject-file: ") + error.what(),
                        "a text file with a fault a line");
    }
    for (std::string line; std::getline(text, line);) lines.push_back(line);
  }
  FaultPlan plan = parse_faults(lines, ranks);
  if (!plan.faults.empty()) environment["LOCKSTEP_INJECT"] = to_text(plan.faults);
  return std::move(plan.timed);
}

}  // namespace lockstep
