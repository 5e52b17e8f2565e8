// Reads what lockstep doctor looks at.
#include <arpa/inet.h>
#include <fmt/format.h>
#include <gnu/libc-version.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <sched.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/timex.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <sstream>

#include "lockstep/base/error.h"
#include "lockstep/base/file.h"
#include "lockstep/collective/kernels.h"
#include "lockstep/collective/nccl_group.h"
#include "lockstep/memory/segment.h"
#include "lockstep/tools/doctor.h"
#include "lockstep/transport/interface.h"

namespace lockstep {
namespace {

namespace fs = std::filesystem;

// Of MKL, oneDNN, libtorch and OpenMP: with another value, or none, other code computes.
constexpr std::array kCodeChoices = {"ATEN_CPU_CAPABILITY",
                                     "DNNL_DEFAULT_FPMATH_MODE",
                                     "DNNL_MAX_CPU_ISA",
                                     "LD_PRELOAD",
                                     "MKL_CBWR",
                                     "MKL_DEBUG_CPU_TYPE",
                                     "MKL_DYNAMIC",
                                     "MKL_ENABLE_INSTRUCTIONS",
                                     "OMP_DYNAMIC",
                                     "ONEDNN_DEFAULT_FPMATH_MODE",
                                     "ONEDNN_MAX_CPU_ISA"};

std::string text_in(const fs::path& path) {
  try {
    std::string text = read_text_file(path);
    while (!text.empty() && text.back() == '\n') text.pop_back();
    return text;
  } catch (const Error&) {
    return "";  // not there, or not ours to read
  }
}

std::vector<std::string> names_in(const fs::path& folder, std::string_view prefix) {
  std::vector<std::string> names;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error))
    if (const std::string name = entry.path().filename(); name.starts_with(prefix))
      names.push_back(name);
  std::sort(names.begin(), names.end());
  return names;
}

// "model name : AMD EPYC" of the first core; other architectures name none.
std::string processor_in(const fs::path& root, const utsname& system) {
  std::istringstream lines(text_in(root / "proc/cpuinfo"));
  for (std::string line; std::getline(lines, line);)
    if (line.starts_with("model name"))
      if (const auto colon = line.find(": "); colon != line.npos) return line.substr(colon + 2);
  return system.machine;
}

// Both versions of control groups; inside a container only the last of the folders is visible.
double core_quota(const fs::path& root) {
  std::string own;
  std::istringstream groups(text_in(root / "proc/self/cgroup"));
  for (std::string line; std::getline(groups, line);)
    if (line.starts_with("0::/")) own = line.substr(4);
  double least = 0;
  const auto apply = [&](const std::string& quota_and_period) {
    double quota = 0, period = 0;  // "max" is no number
    std::istringstream(quota_and_period) >> quota >> period;
    if (quota > 0 && period > 0 && (least == 0 || quota / period < least)) least = quota / period;
  };
  const fs::path mount = root / "sys/fs/cgroup";
  apply(text_in(mount / own / "cpu.max"));
  apply(text_in(mount / "cpu.max"));
  apply(text_in(mount / "cpu/cpu.cfs_quota_us") + ' ' + text_in(mount / "cpu/cpu.cfs_period_us"));
  return least;
}

std::uint64_t limit(__rlimit_resource resource) {
  rlimit found{};
  return ::getrlimit(resource, &found) == 0 ? found.rlim_cur : 0;  // RLIM_INFINITY: UINT64_MAX
}

// "always [madvise] never": the word in brackets.
std::string chosen_word(const std::string& text) {
  const auto open = text.find('['), close = text.find(']');
  return open < close && close != text.npos ? text.substr(open + 1, close - open - 1) : "";
}

std::string why_no_segment() {
  try {
    Segment::create({.seats = 2})->allocate(0, 1 << 20, "a trial");
    return "";
  } catch (const Error& error) {
    return error.what();
  }
}

std::string why_no_pidfd() {
  const UniqueFd self(static_cast<int>(::syscall(SYS_pidfd_open, ::getpid(), 0)));
  return self ? "" : errno_text(errno);
}

std::string text_of_address(const sockaddr* address) {
  std::array<char, INET_ADDRSTRLEN> text{};
  ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(address)->sin_addr, text.data(),
              text.size());
  return text.data();
}

std::vector<NetworkInterface> interfaces(const fs::path& root) {
  std::vector<NetworkInterface> found;
  ifaddrs* all = nullptr;
  if (::getifaddrs(&all) != 0) return found;
  for (const ifaddrs* one = all; one != nullptr; one = one->ifa_next) {
    if (one->ifa_addr == nullptr || one->ifa_addr->sa_family != AF_INET) continue;
    if ((one->ifa_flags & IFF_UP) == 0 || (one->ifa_flags & IFF_LOOPBACK) != 0) continue;
    const std::string speed = text_in(root / "sys/class/net" / one->ifa_name / "speed");
    found.push_back({one->ifa_name, text_of_address(one->ifa_addr),
                     std::max(0, std::atoi(speed.c_str()))});  // -1: not known
  }
  ::freeifaddrs(all);
  return found;
}

// Where `options` name no interface: the one that leads to a host, or has the default route.
void choose_interface(const EndpointOptions& options, Facts& facts) {
  EndpointOptions asked = options;
  if (asked.towards.empty()) asked.towards = "192.0.2.1";  // anywhere; nothing is sent
  try {
    facts.used_interface = find_interface(asked).name;
    facts.why_used = !options.interface.empty() ? "as asked"
                     : options.towards.empty()  ? "the way out"
                                                : "it leads to " + options.towards;
  } catch (const ConfigError& error) {
    facts.why_used = error.what();
  }
}

bool is_clock_synchronised() {
  timex state{};
  return ::adjtimex(&state) >= 0 && (state.status & STA_UNSYNC) == 0;
}

}  // namespace

Facts read_facts(const fs::path& root, const Environment& environment,
                 const EndpointOptions& options) {
  Facts facts;
  utsname system{};
  ::uname(&system);
  facts.host = system.nodename;
  facts.kernel = system.release;
  facts.lockstep = LOCKSTEP_VERSION;
  facts.libtorch = LOCKSTEP_TORCH_VERSION;
  facts.c_library = fmt::format("glibc {}", ::gnu_get_libc_version());
  facts.processor = processor_in(root, system);
  facts.instruction_set = kernels().name;
  cpu_set_t cores;
  facts.cores = ::sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
  facts.all_cores = static_cast<int>(::sysconf(_SC_NPROCESSORS_ONLN));
  facts.core_quota = core_quota(root);
  facts.memory = total_memory();
  facts.available_memory = available_memory(root);
  facts.open_files = limit(RLIMIT_NOFILE);
  facts.processes = limit(RLIMIT_NPROC);
  facts.locked_memory = limit(RLIMIT_MEMLOCK);
  struct statvfs shm {};
  if (::statvfs((root / "dev/shm").c_str(), &shm) == 0)
    facts.shm_folder = shm.f_blocks * shm.f_frsize;
  facts.shmem_huge_pages =
      chosen_word(text_in(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled"));
  facts.no_segment = why_no_segment();
  facts.no_pidfd = why_no_pidfd();
  facts.clock_source =
      text_in(root / "sys/devices/system/clocksource/clocksource0/current_clocksource");
  facts.clock_synchronised = is_clock_synchronised();
  facts.interfaces = interfaces(root);
  choose_interface(options, facts);
  facts.rdma_devices = names_in(root / "sys/class/infiniband", "");
  facts.gpus = names_in(root / "proc/driver/nvidia/gpus", "");
  for (const Engine engine : {Engine::ucx, Engine::mpi, Engine::zmq})
    facts.engines.emplace(name_of(engine), unavailable(engine));
  facts.engines.emplace("nccl", nccl_unavailable());
  for (const char* name : kCodeChoices)
    if (const auto found = environment.find(name); found != environment.end())
      facts.code_choices.insert(*found);
  std::error_code error;
  const fs::path self = fs::read_symlink("/proc/self/exe", error);
  facts.has_worker = !error && fs::exists(self.parent_path() / "lockstep-worker", error);
  return facts;
}

}  // namespace lockstep
