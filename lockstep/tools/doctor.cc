// lockstep doctor: what this machine can do, and what stands in the way.
#include "lockstep/tools/doctor.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lockstep/tools/commands.h"

namespace lockstep {
namespace {

struct DoctorFlags {
  bool json = false;
};

}  // namespace

int doctor_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app(
      "Says what this machine can do and what stands in a job's way, with a hint for each\n"
      "finding. Ends with 1 if one is an error.",
      "lockstep doctor");
  DoctorFlags flags;
  app.add_flag("--json", flags.json, "as one JSON object, for programs");
  if (!parse_arguments(app, arguments)) return 0;
  const Facts facts = read_facts("/", process_environment(), "");
  const std::vector<Finding> findings = findings_of(facts);
  const auto worst = std::max_element(findings.begin(), findings.end(),
                                      [](auto& a, auto& b) { return a.verdict < b.verdict; });
  if (flags.json) {
    nlohmann::ordered_json list = nlohmann::ordered_json::array();
    for (const Finding& one : findings) list.push_back(json_of(one));
    print(nlohmann::ordered_json{{"host", facts.host},
                                 {"worst", name_of(worst->verdict)},
                                 {"traits", traits_of(facts)},
                                 {"findings", list}}
              .dump(2) +
          "\n");
  } else {
    print(text_of(findings));
  }
  return worst->verdict == Verdict::error ? kExitFailedRun : 0;
}

}  // namespace lockstep
