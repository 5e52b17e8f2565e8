#include "lockstep/cluster/job_commands.h"

#include <limits>

#include "lockstep/cluster/control.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/cluster/json_reading.h"

namespace lockstep {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(JobStatus, workers, wanted, least, most, generation, first_step,
                                   step, reason)

namespace {

using nlohmann::json;

int count_in(const json& object, const char* member) {
  const std::uint64_t count = whole_in(object, member);
  if (count > static_cast<std::uint64_t>(std::numeric_limits<int>::max()))
    throw ConfigError(fmt::format("'{}' is too large", member));
  return static_cast<int>(count);
}

JobStatus status_from(const json& object) {
  try {
    return read_json<JobStatus>(object);
  } catch (const ConfigError& error) {
    throw Error(fmt::format("the job's answer cannot be read: {}", error.what()));
  }
}

void scale(ControlHandler& handler, int workers) {
  const JobStatus status = handler.status();
  if (status.least == status.most)
    throw ConfigError(
        fmt::format("this job always has {} worker{}", status.most, status.most == 1 ? "" : "s"),
        "start it with --workers MIN:MAX");
  if (workers < status.least || workers > status.most)
    throw ConfigError(
        fmt::format("{} workers: this job has {} to {}", workers, status.least, status.most),
        "its --workers MIN:MAX says so");
  handler.scale(workers);
}

}  // namespace

json answer_command(ControlHandler& handler, const ControlRequest& request) {
  if (request.action == "stop") {
    handler.stop();
    return json::object();
  }
  if (request.action == "scale")
    scale(handler, count_in(request.arguments, "workers"));
  else if (request.action != "status")
    throw ConfigError(fmt::format("there is no action '{:.40}'", request.action));
  return handler.status();
}

JobStatus ask_status(ControlClient& client, const Deadline& deadline) {
  return status_from(client.request("status", json::object(), deadline));
}

JobStatus ask_scale(ControlClient& client, int workers, const Deadline& deadline) {
  return status_from(client.request("scale", {{"workers", workers}}, deadline));
}

void ask_stop(ControlClient& client, const Deadline& deadline) {
  client.request("stop", json::object(), deadline);
}

}  // namespace lockstep
