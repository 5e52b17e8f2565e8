// The live status page of a job: an HTTP server on 127.0.0.1 inside the agent. Its threads see
// nothing but the snapshot published last, and nothing a client does reaches the agent: requests
// are bounded in size and number and each connection in time. Read-only; requests that name another
// host than the loopback get nothing, so that a web page elsewhere cannot read it by DNS rebinding.
//
// publish() belongs to the agent's thread; the threads are the server's own and take no signals.
#pragma once

#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>

namespace lockstep {

class Dashboard {
 public:
  // `place`: a port, 0 = a free one; `flag` names it in errors. `stale_after_s`: when the snapshot
  // is older than that, the agent hangs and /healthz says so. Throws ConfigError.
  Dashboard(const std::string& place, const std::string& flag, double stale_after_s);
  ~Dashboard();  // at once, whatever clients do
  Dashboard(const Dashboard&) = delete;

  std::string url() const;  // "http://127.0.0.1:40123/"
  // Whether somebody has looked at the last snapshot, or it is old: five times a second at most.
  bool wants_snapshot() const;
  void publish(const nlohmann::json& status);  // Status::json()

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The page with `status` in it, which needs no server; null: it asks for status.json, again and
// again.
std::string status_page(const nlohmann::json& status);
// What a browser may do for that page: nothing but run its own script and ask where it came from.
std::string page_policy();
// The status as Prometheus reads it, text format 0.0.4.
std::string prometheus_text(const nlohmann::json& status);

}  // namespace lockstep
