// Events: what a worker tells its agent, framed JSON over a pipe. A frame is a 4-byte little-endian
// length and that many bytes of JSON object with a string member "event". The agent treats every
// byte as untrusted.
//
// The events and their members (all times in seconds, all sizes in bytes; ? may be missing):
//   ready: rank, train_samples, test_samples, parameters, steps_per_epoch, epochs,
//     resumed?: {step, samples, epochs: [events epoch], …} (from rank 0: what a checkpoint brought)
//   first_step: rank, clock (CLOCK_MONOTONIC when the first step was committed)
//   step: epoch, step and samples (both since the start), steps_per_epoch, loss, grad_norm, lr,
//     clock; from rank 0, at most 10 a second
//   epoch: epoch, step, train_loss, test_loss?, test_accuracy?, grad_norm, lr, samples, seconds,
//     eval_seconds
//   injected: rank, fault, step, clock (a fault that was asked for is about to strike)
//   message: text (a line for the person; printed as it is)
//   snapshot: epoch, sequence, sequence_offset, tensors: [{name, dtype, shape, offset, nbytes}]
//     (offsets in the segment)
//   solution: values: {...} (what a recipe found out, for the report)
//   predictions: block, text (CSV lines of one block of rows; blocks count from 0 over all workers)
//   rank: rank, seconds: {data, forward, backward, communication, waiting, optimizer, evaluation,
//     other}, total_s, cpu_s, peak_memory_bytes, queued?: {hidden, exposed} (gradients that
//     travelled while the worker computed; that it waited for) (so far: at most one a second, and
//     at the end)
//   finished: reason, epochs, steps
//   error: rank, kind: "config" | "run" | "comm", message
// Of a worker that can go on in another generation (cluster/world.h):
//   elastic: (once, that it is one)
//   join: address? (it is ready to be a member; where other nodes reach it)
//   comm_error: generation, message
//   entered: generation (from rank 0: what older generations had decided is whole)
//   recovered: generation, step, steps_redone, source, clock; from rank 0, after the first step in
//     another generation
// The agent's own, with rank -1:
//   generation: generation, ranks: [{rank, seat, pid, node?}], reason, clock (of other nodes than
//     the first: no ranks)
//   worker: seat, node?, rank (-1: not a member), pid, state: "starting" | "ready" | "member" |
//   "ended",
//     cause, clock
//   recovery: rank, cause, seconds, step, steps_redone, source, generation, rejoined_seconds (null:
//     nobody has taken its place)
#pragma once

#include <cstddef>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <vector>

#include "lockstep/base/file.h"

namespace lockstep {

inline constexpr const char* kAskedToStop = "the job was asked to stop";  // in "finished"
inline constexpr std::size_t kMaxEventBytes = std::size_t{16} << 20;

// Where a worker's events go. Not thread-safe: one thread emits.
class EventSink {
 public:
  virtual ~EventSink() = default;
  virtual void emit(const nlohmann::json& event) = 0;
};

// To the agent. A closed pipe (the agent is gone) throws Error.
class PipeEventSink : public EventSink {
 public:
  explicit PipeEventSink(UniqueFd fd) : fd_(std::move(fd)) {}
  void emit(const nlohmann::json& event) override;

 private:
  UniqueFd fd_;
};

class NullEventSink : public EventSink {
 public:
  void emit(const nlohmann::json&) override {}
};

// Splits a byte stream into events. feed() throws Error on a frame that is too long, is not JSON,
// or is not an object with a string "event"; the stream is unusable from then on.
class EventReader {
 public:
  EventReader();
  ~EventReader();
  std::vector<nlohmann::json> feed(std::span<const std::byte> bytes);
  bool in_the_middle() const;  // a frame has begun and not ended

 private:
  std::vector<std::byte> buffer_;
};

}  // namespace lockstep
