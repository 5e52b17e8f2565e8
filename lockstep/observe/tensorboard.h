// TensorBoard event files: TFRecords of Event messages
// (https://github.com/tensorflow/tensorflow, core/lib/io/record_writer.h, core/util/event.proto,
// core/framework/summary.proto). The few fields needed are encoded by hand. Pure; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace lockstep {

using Scalars = std::vector<std::pair<std::string, double>>;  // tag, value

// The file's first record: which version of the format follows.
std::string tensorboard_header(double wall_time);
// A record that says: a run goes on here, and what older files have from `step` on is void.
std::string tensorboard_start(double wall_time, std::int64_t step);
// One record that holds the scalars of one step.
std::string tensorboard_scalars(double wall_time, std::int64_t step, const Scalars& scalars);
// "events.out.tfevents.TIME.HOST.PID": TensorBoard looks for the second and third word.
std::string tensorboard_file_name(double wall_time, std::string_view host, int pid);

}  // namespace lockstep
