#include "lockstep/cluster/job_nodes.h"

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/cluster/control_message.h"
#include "lockstep/memory/segment.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr int kMost = 1 << 30;
constexpr std::size_t kMostShown = 60;

int number(const json& object, const char* member, int least = 0, int most = kMost) {
  const auto found = object.find(member);
  if (found == object.end() || !found->is_number_integer() || found->get<std::int64_t>() < least ||
      found->get<std::int64_t>() > most)
    throw ConfigError(fmt::format("it has no '{}' from {} to {}", member, least, most));
  return found->get<int>();
}

std::string shown(const std::string& text) {
  return text.empty()                ? "not given"
         : text.size() <= kMostShown ? text
                                     : text.substr(0, kMostShown) + "…";
}

// "workers = 2" and "workers = 3" of two texts of many lines: the first lines that differ.
std::pair<std::string, std::string> difference(const std::string& one, const std::string& other) {
  std::istringstream left(one), right(other);
  std::string a, b;
  do {
    a.clear(), b.clear();
    std::getline(left, a);
    std::getline(right, b);
  } while (a == b && (left || right));
  return {shown(a), shown(b)};
}

}  // namespace

json to_json(const NodeIntroduction& node) {
  return {{"rank", node.rank},   {"host", node.host},   {"agent", node.agent},
          {"after", node.after}, {"least", node.least}, {"workers", node.workers},
          {"same", node.same}};
}

json to_json(const NodeWelcome& welcome) {
  json object{{"node", welcome.node},
              {"first_rank", welcome.first_rank},
              {"workers", welcome.workers},
              {"least", welcome.least},
              {"most", welcome.most},
              {"nodes", welcome.nodes},
              {"restarts", welcome.restarts},
              {"master_addr", welcome.master_addr},
              {"master_port", welcome.master_port},
              {"run_id", welcome.run_id}};
  object["lease_ms"] = std::chrono::duration_cast<std::chrono::milliseconds>(welcome.lease).count();
  return object;
}

NodeIntroduction introduction_from(const json& object) {
  NodeIntroduction node{.rank = number(object, "rank"),
                        .host = text_in(object, "host"),
                        .agent = text_in(object, "agent"),
                        .after = number(object, "after", -1),
                        .least = number(object, "least", 1, kMaxSeats),
                        .workers = number(object, "workers", 1, kMaxSeats)};
  const auto same = object.find("same");
  if (same == object.end() || !same->is_object()) throw ConfigError("it has no object 'same'");
  for (const auto& [name, value] : same->items()) node.same[name] = text_in(*same, name.c_str());
  return node;
}

NodeWelcome welcome_from(const json& object) {
  return {.node = number(object, "node"),
          .first_rank = number(object, "first_rank"),
          .workers = number(object, "workers", 1),
          .least = number(object, "least", 1),
          .most = number(object, "most", 1),
          .nodes = number(object, "nodes", 1),
          .restarts = number(object, "restarts"),
          .lease = std::chrono::milliseconds(number(object, "lease_ms", 1)),
          .master_addr = text_in(object, "master_addr"),
          .run_id = text_in(object, "run_id"),
          .master_port = number(object, "master_port", 0, 65535)};
}

void check_same(const NodeIntroduction& there, const NodeIntroduction& here) {
  std::map<std::string, std::string> all = here.same;
  all.insert(there.same.begin(), there.same.end());
  for (const auto& [name, any] : all) {
    const auto value = [&name = name](const NodeIntroduction& node) {
      const auto found = node.same.find(name);
      return found == node.same.end() ? std::string() : found->second;
    };
    if (value(there) == value(here)) continue;
    const auto [a, b] = difference(value(there), value(here));
    throw ConfigError(fmt::format("node {} ({}) has another {} than node 0: {} there, {} here",
                                  there.rank, there.host, name, a, b),
                      "give all nodes the same");
  }
}

}  // namespace lockstep
