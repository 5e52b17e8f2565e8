// What UCX calls a context and a worker, as ucx.cc alone uses them: how UCX is set up, and what a
// generation's connections belong to. One thread for a context and its workers, which end before
// it.
#pragma once

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <ucp/api/ucp.h>
#include <ucs/config/global_opts.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "lockstep/base/file.h"
#include "lockstep/transport/interface.h"

namespace lockstep::ucx {

inline void check(ucs_status_t status, std::string_view what) {
  if (status != UCS_OK)
    throw TransportError(-1, fmt::format("ucx: {}: {}", what, ucs_status_string(status)));
}

// The RDMA ports behind the interface: "mlx5_0:1".
inline std::vector<std::string> rdma_ports_of(const Interface& interface) {
  std::vector<std::string> ports;
  const std::filesystem::path folder = "/sys/class/net/" + interface.name;
  std::error_code ignored;
  for (const auto& entry :
       std::filesystem::directory_iterator(folder / "device/infiniband", ignored))
    ports.push_back(fmt::format("{}:{}", entry.path().filename().string(),
                                1 + std::stoi(read_text_file(folder / "dev_port"))));
  return ports;
}

// Where there is TCP alone: messages of a packet (see kTcpPacket) go out from where they lie, and
// what the socket does not take, like longer ones, from a buffer of UCX's; everything is copied
// once where it arrives. That is faster than what UCX does by itself (two sides that negotiate,
// then send in place), and a peer that dies has nothing of ours in use: there UCX (1.13) ends
// operations twice.
// A packet: whole segments of 1448 or 8948 bytes in 64 KB, as TCP hands them down at once. Messages
// a little longer are twice the work, for one of a few bytes goes out with each.
inline constexpr const char* kTcpPacket = "62632";
inline constexpr std::pair<const char*, const char*> kTcpSettings[] = {
    {"ZCOPY_THRESH", "inf"},     {"RNDV_THRESH", "inf"},  {"TCP_TX_SEG_SIZE", kTcpPacket},
    {"TX_SEG_SIZE", kTcpPacket},  // UCX 1.13 has them without the prefix
    {"TCP_RX_SEG_SIZE", "256k"}, {"RX_SEG_SIZE", "256k"}, {"TCP_PUT_ENABLE", "n"},
    {"PUT_ENABLE", "n"},         {"TCP_CONN_NB", "y"},    {"CONN_NB", "y"}};

class Context {
 public:
  explicit Context(const Interface& interface) {
    // What UCX has to say of connections that end is said by us.
    if (!std::getenv("UCX_LOG_LEVEL")) ucs_global_opts_set_value("LOG_LEVEL", "fatal");
    ucp_config_t* config = nullptr;
    check(ucp_config_read(nullptr, nullptr, &config), "reading its settings");
    const auto set = [&](const char* name, const std::string& value) {
      check(ucp_config_modify(config, name, value.c_str()), fmt::format("setting {}", name));
    };
    ucs_status_t status = UCS_OK;
    try {
      const std::vector<std::string> ports = rdma_ports_of(interface);
      set("NET_DEVICES",
          fmt::format("{}{}{}", interface.name, ports.empty() ? "" : ",", fmt::join(ports, ",")));
      if (ports.empty())
        for (const auto& [name, value] : kTcpSettings) set(name, value);
      if (!std::getenv("UCX_TLS")) set("TLS", "^shm,cma,self");  // one node's ranks have shm groups
      ucp_params_t parameters{};
      parameters.field_mask = UCP_PARAM_FIELD_FEATURES;
      parameters.features = UCP_FEATURE_TAG | UCP_FEATURE_WAKEUP;
      status = ucp_init(&parameters, config, &context_);
    } catch (...) {
      ucp_config_release(config);
      throw;
    }
    ucp_config_release(config);
    check(status, fmt::format("no transport at interface {}", interface.name));
  }
  ~Context() {
    if (!leaks_) ucp_cleanup(context_);
  }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ucp_context_h get() const { return context_; }
  void leak() { leaks_ = true; }  // a worker of it is left

 private:
  ucp_context_h context_ = nullptr;
  bool leaks_ = false;
};

class Worker {
 public:
  explicit Worker(Context& context) : context_(context) {
    ucp_worker_params_t parameters{};
    parameters.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE;
    parameters.thread_mode = UCS_THREAD_MODE_SERIALIZED;
    check(ucp_worker_create(context.get(), &parameters, &worker_), "making a worker");
    check(ucp_worker_get_efd(worker_, &fd_), "making a worker that can wait");
  }
  ~Worker() {
    if (worker_) ucp_worker_destroy(worker_);
  }
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;
  void leak() { context_.leak(), worker_ = nullptr; }
  ucp_worker_h get() const { return worker_; }
  int fd() const { return fd_; }
  std::string address() const {
    ucp_address_t* address = nullptr;
    std::size_t length = 0;
    check(ucp_worker_get_address(worker_, &address, &length), "no address");
    std::string text(reinterpret_cast<const char*>(address), length);
    ucp_worker_release_address(worker_, address);
    return text;
  }

 private:
  Context& context_;
  ucp_worker_h worker_ = nullptr;
  int fd_ = -1;
};

}  // namespace lockstep::ucx
