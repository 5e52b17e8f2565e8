#include "lockstep/cluster/job_nodes.h"

#include <sstream>

#include "lockstep/cluster/json_reading.h"
#include "lockstep/memory/segment.h"

namespace lockstep {

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(NodeIntroduction, rank, host, agent, after, least, workers, same)
NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(NodeWelcome, node, first_rank, workers, least, most, nodes,
                                   restarts, lease, master_addr, run_id, master_port)

namespace {

using nlohmann::json;

constexpr int kMost = 1 << 30;
constexpr std::size_t kMostShown = 60;

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

json to_json(const NodeIntroduction& introduction) { return introduction; }
json to_json(const NodeWelcome& welcome) { return welcome; }

NodeIntroduction introduction_from(const json& object) {
  auto node = read_json<NodeIntroduction>(object);
  check("rank", node.rank, kMost);
  check("after", node.after + 1, kMost);
  check("least", node.least - 1, kMaxSeats - 1);
  check("workers", node.workers - 1, kMaxSeats - 1);
  return node;
}

NodeWelcome welcome_from(const json& object) {
  auto welcome = read_json<NodeWelcome>(object);
  for (const int count : {welcome.node, welcome.first_rank, welcome.restarts, welcome.least - 1,
                          welcome.workers - 1, welcome.most - 1, welcome.nodes - 1})
    check("count", count, kMost);
  check("lease", welcome.lease.count() - 1, ~std::uint64_t{0} >> 1);
  check("master_port", welcome.master_port, 65535);
  return welcome;
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
