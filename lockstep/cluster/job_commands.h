// What `lockstep scale`, `status` and `stop` ask of a job's agent, and how the agent answers: it
// implements ControlHandler and passes requests through answer_command(). One thread.
#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>

#include "lockstep/base/deadline.h"

namespace lockstep {

class ControlClient;
struct ControlRequest;

struct JobStatus {
  int workers = 0;               // members of the newest generation
  int wanted = 0;                // aimed at
  int least = 0, most = 0;       // --workers MIN:MAX
  std::uint64_t generation = 0;  // the newest one
  // The first step that it committed. None: it has not yet, or the job is a program that does not
  // tell its steps.
  std::optional<std::uint64_t> first_step = {};
  std::optional<std::uint64_t> step = {};  // the last committed one
  std::string reason = {};  // of this generation, or what the job waits for; may be empty
};

class ControlHandler {
 public:
  virtual ~ControlHandler() = default;
  virtual JobStatus status() = 0;
  // Aims at so many workers, within least..most; returns at once. Throws ConfigError or Error when
  // the job cannot, as when it is about to end.
  virtual void scale(int workers) = 0;
  virtual void stop() = 0;  // as SIGTERM does: finish the step, save, end; returns at once
};

// Throws ConfigError: an action that is none, a number of workers outside the job's bounds.
nlohmann::json answer_command(ControlHandler& handler, const ControlRequest& request);

// The client's side. All throw what ControlClient::request throws.
JobStatus ask_status(ControlClient& client, const Deadline& deadline);
JobStatus ask_scale(ControlClient& client, int workers,
                    const Deadline& deadline);  // not waited for
void ask_stop(ControlClient& client, const Deadline& deadline);

}  // namespace lockstep
