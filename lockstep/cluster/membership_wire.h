// Reports and assignments as JSON, for nodes that are not the coordinator's. Who reads one trusts
// nothing in it: numbers are in bounds, what a list names exists once. Pure functions; any thread.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "lockstep/cluster/membership.h"

namespace lockstep {

nlohmann::json to_json(const NodeReport& report);
nlohmann::json to_json(const Assignment& assignment);
// Both throw ConfigError: a member is missing, of another type, or out of bounds.
NodeReport node_report_from(const nlohmann::json& object);
Assignment assignment_from(const nlohmann::json& object);

}  // namespace lockstep
