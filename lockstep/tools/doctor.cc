// lockstep doctor: what this machine, or several of them, can do, and what stands in the way.
#include "lockstep/tools/doctor.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "lockstep/tools/commands.h"
#include "lockstep/tools/doctor_links.h"
#include "lockstep/tools/doctor_meeting.h"
#include "lockstep/tools/node_flags.h"
#include "lockstep/transport/transport.h"

namespace lockstep {
namespace {

using nlohmann::json;

constexpr int kMostNodes = 256;         // the whole report is one control message
constexpr double kLargestSkew_s = 0.1;  // beyond it logs and traces of nodes don't fit together
constexpr auto kPatience = std::chrono::seconds(10);  // with a peer, while a link is measured

struct DoctorFlags {
  bool json = false;
  int timeout = 60;
  NodeFlags nodes;
  ControlFlags control;
};

// What is known of a node.
struct Node {
  std::string host, engine, address;  // "": no engine to measure with
  Traits traits;
  std::vector<Finding> findings;
  double clock_skew_s = 0, clock_skew_uncertainty_s = 0;
};

NLOHMANN_DEFINE_TYPE_NON_INTRUSIVE(Node, host, engine, address, traits, clock_skew_s,
                                   clock_skew_uncertainty_s, findings)

struct Report {
  std::vector<Node> nodes;
  std::vector<Link> links;
  std::vector<Finding> findings;  // of all nodes together
};

Verdict worst_of(const Report& report) {
  Verdict worst = Verdict::ok;
  const auto look = [&](const std::vector<Finding>& findings) {
    for (const Finding& one : findings) worst = std::max(worst, one.verdict);
  };
  look(report.findings);
  for (const Node& node : report.nodes) look(node.findings);
  return worst;
}

// The first that this machine has, unless one is asked for. The choice is a finding.
std::unique_ptr<Endpoint> choose_engine(const DoctorFlags& flags, const EndpointOptions& options,
                                        Node& node) {
  std::string why = "asked for";
  for (const Engine engine : {Engine::ucx, Engine::zmq}) {
    if (!flags.nodes.backend.empty() && engine != engine_from(flags.nodes.backend)) continue;
    if (flags.nodes.backend.empty() && !unavailable(engine).empty()) {
      why = fmt::format("as {} is not to be had", name_of(engine));
      continue;
    }
    if (flags.nodes.backend.empty() && engine == Engine::ucx) why = "the fastest";
    try {
      auto endpoint = make_endpoint(engine, options);
      node.engine = endpoint->name();
      node.address = endpoint->address();
      node.findings.push_back({Verdict::ok, "engine", fmt::format("{}: {}", node.engine, why)});
      return endpoint;
    } catch (const Error& error) {
      why = error.what();
    }
    break;
  }
  node.findings.push_back({Verdict::error, "engine", "none: " + why, "see ucx and zmq above"});
  return nullptr;
}

std::vector<Finding> compare(const std::vector<Node>& nodes) {
  std::vector<Traits> traits;
  std::size_t whose = 0;  // the largest skew
  for (const Node& node : nodes) {
    traits.push_back(node.traits);
    if (std::abs(node.clock_skew_s) > std::abs(nodes[whose].clock_skew_s))
      whose = traits.size() - 1;
  }
  const double skew_s = nodes[whose].clock_skew_s;
  const double uncertainty_s = nodes[whose].clock_skew_uncertainty_s;
  std::vector<Finding> findings = differences(traits);
  const bool far = std::abs(skew_s) - uncertainty_s > kLargestSkew_s;
  findings.push_back({far ? Verdict::warning : Verdict::ok, "clock skew",
                      fmt::format("at most {:.3g} ms (± {:.2g}), node {}'s", skew_s * 1e3,
                                  uncertainty_s * 1e3, whose),
                      far ? "chrony or another NTP client on every node; results don't depend on "
                            "it, logs do"
                          : ""});
  return findings;
}

// Those of this node, as the others take it up too; all broken if it can't connect.
std::vector<Link> measure(Endpoint& endpoint, const std::vector<std::string>& addresses, int node) {
  try {
    return measure_links(
        endpoint.connect(addresses, node, {.deadline = Deadline::after(kPatience)}), kPatience);
  } catch (const CommError& error) {
    std::vector<Link> links;
    for (int peer = 0; peer < static_cast<int>(addresses.size()); ++peer)
      if (peer != node)
        links.push_back({std::min(node, peer), std::max(node, peer), 0, 0, 0, error.what()});
    return links;
  }
}

// Node 0 and all others call it together.
Report examine_nodes(const DoctorFlags& flags, const NodePlace& place, Node node) {
  const int count = place.options.most, own = place.options.rank;
  const ControlKey key = read_control_key(flags.control.key_file);
  Meeting meeting(
      {.nodes = count,
       .node = own,
       .address = own == 0 ? flags.control.address : place.options.coordinator->endpoint,
       .key = key,
       .patience = std::chrono::seconds(flags.timeout)});
  const ClockSkew skew = meeting.clock_skew();
  node.clock_skew_s = skew.seconds;
  node.clock_skew_uncertainty_s = skew.uncertainty_s;
  const std::unique_ptr<Endpoint> endpoint = choose_engine(
      flags,
      {.interface = flags.nodes.interface, .towards = place.host, .key = key.client.secret_key},
      node);
  Report report;
  std::vector<std::string> addresses;
  bool same = true;
  for (const json& one : meeting.gather(node)) {
    report.nodes.push_back(received<Node>(one));
    addresses.push_back(report.nodes.back().address);
    same =
        same && !addresses.back().empty() && report.nodes.back().engine == report.nodes[0].engine;
  }
  report.findings = compare(report.nodes);
  if (!same) {
    report.findings.push_back({Verdict::error, "links", "not measured: no engine is everywhere",
                               "see each node's engine"});
    return report;
  }
  std::vector<std::vector<Link>> links;
  for (const json& one : meeting.gather(measure(*endpoint, addresses, own))) {
    links.emplace_back();
    for (const json& link : one) links.back().push_back(link_from(link, count));
  }
  report.links = merged(links);
  const std::vector<Finding> found = findings_of(report.links);
  report.findings.insert(report.findings.end(), found.begin(), found.end());
  return report;
}

void show(const Report& report, bool as_json) {
  const int count = static_cast<int>(report.nodes.size());
  if (as_json) {
    print(json{{"worst", worst_of(report)},
               {"nodes", report.nodes},
               {"links", report.links},
               {"findings", report.findings}}
              .dump(2) +
          "\n");
    return;
  }
  if (count > 1) print(fmt::format("node 0: {}\n", report.nodes[0].host));
  print(text_of(report.nodes[0].findings));
  for (int node = 1; node < count; ++node) {
    const std::vector<Finding>& first = report.nodes[0].findings;
    std::vector<Finding> other;
    for (const Finding& one : report.nodes[node].findings)
      if (std::find(first.begin(), first.end(), one) == first.end()) other.push_back(one);
    print(fmt::format("\nnode {}: {}, where it differs from node 0\n{}", node,
                      report.nodes[node].host, text_of(other)));
  }
  if (count > 1) print(fmt::format("\nall {} nodes\n", count));
  print(text_of(report.findings));
  if (!report.links.empty()) print(table_of(report.links, count));
}

void add_flags(CLI::App& app, DoctorFlags& flags) {
  app.option_defaults()->take_last();
  const auto add = [&](const char* name, auto& value, const char* meaning) {
    return app.add_option(both_spellings(name), value, meaning)->capture_default_str();
  };
  app.add_flag("--json", flags.json, "as one JSON object, for programs");
  add_node_flags(app, flags.nodes);
  add("--key-file", flags.control.key_file, "the key that nodes prove (lockstep key FILE)");
  add("--timeout", flags.timeout, "seconds to wait for other nodes")->check(CLI::Range(1, 86400));
}

}  // namespace

int doctor_command(const std::vector<std::string>& arguments, const Start&) {
  CLI::App app(
      "Says what this machine can do and what stands in a job's way, with a hint for each\n"
      "finding; started on several nodes, compares them and measures the links between them.\n"
      "Ends with 1 if a finding is an error.",
      "lockstep doctor");
  DoctorFlags flags;
  add_flags(app, flags);
  if (!parse_arguments(app, arguments)) return 0;
  const auto place = node_place(flags.nodes, flags.control, process_environment());
  if (place && place->options.most > kMostNodes)
    throw ConfigError(
        fmt::format("--nnodes {}: at most {} nodes", place->options.most, kMostNodes));
  const Facts facts = read_facts(
      "/", process_environment(),
      {.interface = flags.nodes.interface, .towards = place ? place->host : "", .key = {}});
  Node node{.host = facts.host,
            .engine = {},
            .address = {},
            .traits = traits_of(facts),
            .findings = findings_of(facts)};
  const Report report =
      place ? examine_nodes(flags, *place, std::move(node)) : Report{{std::move(node)}, {}, {}};
  if (!place || place->options.rank == 0) show(report, flags.json);
  return worst_of(report) == Verdict::error ? kExitFailedRun : 0;
}

}  // namespace lockstep
