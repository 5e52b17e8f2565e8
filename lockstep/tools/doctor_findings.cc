// What lockstep doctor says of the facts.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "lockstep/base/error.h"
#include "lockstep/tools/doctor.h"

namespace lockstep {
namespace {

constexpr std::uint64_t kMebibyte = 1 << 20;
constexpr auto kNoLimit = std::numeric_limits<std::uint64_t>::max();
constexpr std::uint64_t kFewFiles = 1024;      // pipes, pidfds and connections of tens of workers
constexpr std::uint64_t kFewProcesses = 1024;  // threads count, too

std::string amount(std::uint64_t limit) {
  return limit == kNoLimit ? "no limit" : fmt::format("{}", limit);
}

// `text` is fine, unless `wrong`: then a finding of that kind, with a hint.
Finding unless(bool wrong, Verdict kind, const char* subject, std::string text, std::string hint) {
  if (!wrong) return {Verdict::ok, subject, std::move(text)};
  return {kind, subject, std::move(text), std::move(hint)};
}

Finding about_cores(const Facts& facts) {
  std::string text = fmt::format("{}, {} of {} cores, kernels for {}", facts.processor, facts.cores,
                                 facts.all_cores, facts.instruction_set);
  const bool throttled = facts.core_quota > 0 && facts.core_quota < facts.cores;
  if (throttled)
    text += fmt::format("; the control group allows the time of {:.2g}", facts.core_quota);
  return unless(throttled, Verdict::warning, "processor", std::move(text),
                fmt::format("--nproc-per-node {}: more workers wait for each other's time",
                            std::max(1, static_cast<int>(facts.core_quota))));
}

void about_memory(const Facts& facts, std::vector<Finding>& findings) {
  findings.push_back(
      unless(facts.available_memory.bytes < 1024 * kMebibyte, Verdict::warning, "memory",
             fmt::format("{} free of {} (limited by {})", byte_text(facts.available_memory.bytes),
                         byte_text(facts.memory), facts.available_memory.limited_by),
             "end what else runs here, or raise the limit"));
  const std::string& why = facts.no_segment;
  const std::size_t hint = std::min(why.find("; hint: "), why.size());
  findings.push_back(
      unless(!why.empty(), Verdict::error, "shared memory",
             why.empty() ? "a job's can be made" : "a job's cannot be made: " + why.substr(0, hint),
             hint < why.size() ? why.substr(hint + 8) : "the limits of a container or this shell"));
  findings.push_back(unless(
      facts.shmem_huge_pages == "never" || facts.shmem_huge_pages == "deny", Verdict::warning,
      "huge pages",
      facts.shmem_huge_pages.empty() ? "this kernel has none for shared memory"
                                     : "for shared memory: " + facts.shmem_huge_pages,
      "as root: echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled; large models "
      "meet fewer page faults"));
  findings.push_back(
      unless(facts.shm_folder < 64 * kMebibyte + 1, Verdict::warning, "/dev/shm",
             byte_text(facts.shm_folder) + "; lockstep uses none of it, Open MPI and NCCL do",
             "containers: --shm-size 1g, in Kubernetes an emptyDir with medium: Memory"));
}

void about_limits(const Facts& facts, std::vector<Finding>& findings) {
  findings.push_back(unless(facts.open_files < kFewFiles, Verdict::warning, "open files",
                            amount(facts.open_files), "ulimit -n 4096"));
  findings.push_back(unless(facts.processes < kFewProcesses, Verdict::warning, "processes",
                            amount(facts.processes), "ulimit -u 4096"));
  findings.push_back(unless(
      facts.locked_memory != kNoLimit && !facts.rdma_devices.empty(), Verdict::warning,
      "locked memory",
      facts.locked_memory == kNoLimit ? "no limit" : byte_text(facts.locked_memory),
      "RDMA locks what it sends from: ulimit -l unlimited, LimitMEMLOCK=infinity for slurmd"));
  findings.push_back(
      facts.no_pidfd.empty()
          ? Finding{Verdict::ok, "kernel", facts.kernel + ", tells of deaths"}
          : Finding{Verdict::error, "kernel",
                    fmt::format("{}: no pidfd_open ({})", facts.kernel, facts.no_pidfd),
                    "Linux 5.3 or newer, and a container that allows the call"});
}

Finding about_clock(const Facts& facts) {
  const bool slow = facts.clock_source == "hpet" || facts.clock_source == "acpi_pm";
  return unless(
      slow, Verdict::warning, "clock",
      fmt::format("{}, {}", facts.clock_source.empty() ? "source unknown" : facts.clock_source,
                  facts.clock_synchronised ? "synchronised" : "not synchronised (NTP)"),
      "reading it is a system call: boot with clocksource=tsc if the machine allows");
}

void about_engines(const Facts& facts, std::vector<Finding>& findings) {
  const auto spans_nodes = [](const std::string& name) { return name == "ucx" || name == "zmq"; };
  const bool none = std::none_of(facts.engines.begin(), facts.engines.end(), [&](const auto& one) {
    return spans_nodes(one.first) && one.second.empty();
  });
  for (const auto& [name, why] : facts.engines)
    findings.push_back(unless(none && spans_nodes(name), Verdict::warning, name.c_str(),
                              why.empty() ? "found" : "not to be had: " + why,
                              "without ucx and zmq a job stays on one node"));
  findings.push_back(
      {Verdict::ok, "GPUs",
       facts.gpus.empty() ? "none" : fmt::format("{}", fmt::join(facts.gpus, ", "))});
}

Finding about_network(const Facts& facts) {
  std::vector<std::string> names;
  for (const NetworkInterface& one : facts.interfaces) {
    names.push_back(one.name + ' ' + one.address);
    if (one.megabits_per_s > 0) names.back() += fmt::format(" {} Mbit/s", one.megabits_per_s);
    if (one.name == facts.used_interface)
      names.back() += fmt::format(" (used: {})", facts.why_used);
  }
  for (const std::string& device : facts.rdma_devices) names.push_back(device + " (RDMA)");
  if (facts.used_interface == "lo") names.push_back(fmt::format("lo (used: {})", facts.why_used));
  const std::string text =
      names.empty() ? "loopback alone" : fmt::format("{}", fmt::join(names, ", "));
  if (!facts.used_interface.empty()) return {Verdict::ok, "network", text};
  return {Verdict::warning, "network", fmt::format("{}: {}", text, facts.why_used),
          "without a way to other nodes this one can only work alone"};
}

Finding about_exactness(const Facts& facts) {
  std::vector<std::string> set;
  for (const auto& [name, value] : facts.code_choices) set.push_back(name + '=' + value);
  return unless(!set.empty(), Verdict::warning, "exactness",
                set.empty() ? fmt::format("a job's bits are those of libtorch {} on {}",
                                          facts.libtorch, facts.processor)
                            : fmt::format("code is chosen by {}", fmt::join(set, ", ")),
                "a job repeats its bits only where these are set alike: unset them, or set them "
                "on every node and in every run");
}

}  // namespace

std::string_view name_of(Verdict verdict) {
  constexpr const char* kNames[] = {"ok", "warning", "error"};
  return kNames[static_cast<int>(verdict)];
}

std::vector<Finding> findings_of(const Facts& facts) {
  std::vector<Finding> findings = {
      {Verdict::ok, "versions",
       fmt::format("lockstep {}, libtorch {}, {}", facts.lockstep, facts.libtorch,
                   facts.c_library)},
      unless(!facts.has_worker, Verdict::warning, "programs",
             facts.has_worker ? "lockstep and lockstep-worker" : "there is no lockstep-worker",
             "lockstep run works without it; train and predict need it beside lockstep"),
      about_cores(facts)};
  about_memory(facts, findings);
  about_limits(facts, findings);
  findings.push_back(about_clock(facts));
  about_engines(facts, findings);
  findings.push_back(about_network(facts));
  findings.push_back(about_exactness(facts));
  return findings;
}

Traits traits_of(const Facts& facts) {
  Traits traits = {{"lockstep", facts.lockstep},
                   {"libtorch", facts.libtorch},
                   {"C library", facts.c_library},
                   {"processor", facts.processor},
                   {"kernels", facts.instruction_set}};
  traits.insert(facts.code_choices.begin(), facts.code_choices.end());
  return traits;
}

std::vector<Finding> differences(std::span<const Traits> traits) {
  std::set<std::string> names;
  for (const Traits& node : traits)
    for (const auto& [name, value] : node) names.insert(name);
  std::vector<Finding> findings;
  for (const std::string& name : names) {
    std::map<std::string, std::vector<std::size_t>> nodes;  // by value
    for (std::size_t node = 0; node < traits.size(); ++node) {
      const auto found = traits[node].find(name);
      nodes[found == traits[node].end() ? "not set" : found->second].push_back(node);
    }
    if (nodes.size() < 2) continue;
    std::vector<std::string> kinds;
    for (const auto& [value, which] : nodes)
      kinds.push_back(fmt::format("{} on node {}", value, fmt::join(which, ", ")));
    findings.push_back({Verdict::error, "exactness",
                        fmt::format("{} differs: {}", name, fmt::join(kinds, "; ")),
                        "nodes that differ compute other bits: use equal ones for a job"});
  }
  if (findings.empty()) findings.push_back({Verdict::ok, "exactness", "all nodes are alike"});
  return findings;
}

std::string text_of(std::span<const Finding> findings) {
  std::string text;
  for (const Finding& one : findings) {
    text += fmt::format("{:<8} {:<14} {}\n", name_of(one.verdict), one.subject, one.text);
    if (one.verdict != Verdict::ok && !one.hint.empty())
      text += fmt::format("{:<23} hint: {}\n", "", one.hint);
  }
  return text;
}

}  // namespace lockstep
