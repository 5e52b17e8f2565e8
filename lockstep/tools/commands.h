// The commands of `lockstep`, one file each, and what they share: flags, the program's start,
// messages. One thread.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "lockstep/base/error.h"
#include "lockstep/cluster/console.h"

namespace lockstep {

class Segment;

// When the program started.
struct Start {
  double clock = 0;  // CLOCK_MONOTONIC, seconds
  double time = 0;   // since 1970, seconds
};

// Each takes the words after the command's name and returns the exit code. They throw ConfigError
// (exit code 2), Error (1) and Interrupted.
int run_command(const std::vector<std::string>& arguments, const Start& start);
int train_command(const std::vector<std::string>& arguments, const Start& start);
int predict_command(const std::vector<std::string>& arguments, const Start& start);
int report_command(const std::vector<std::string>& arguments, const Start& start);
int bench_command(const std::vector<std::string>& arguments, const Start& start);
int scale_command(const std::vector<std::string>& arguments, const Start& start);
int status_command(const std::vector<std::string>& arguments, const Start& start);
int stop_command(const std::vector<std::string>& arguments, const Start& start);
int doctor_command(const std::vector<std::string>& arguments, const Start& start);
int key_command(const std::vector<std::string>& arguments, const Start& start);

// A signal ended the command from outside. Exit code 128 + signal.
class Interrupted : public Error {
 public:
  explicit Interrupted(int signal);
  int signal() const { return signal_; }

 private:
  int signal_;
};

// The job was asked to stop, and has saved what it reached. Exit code 75, EX_TEMPFAIL of
// sysexits.h.
inline constexpr int kExitPreempted = 75;
class Preempted : public Error {
 public:
  using Error::Error;
};

// "2:4" -> {"2", "4"}; "4" -> {"", "4"}.
std::pair<std::string, std::string> split_range(const std::string& text);
// How many places the segment of a job needs: a worker that replaces another takes another, as long
// as no step has been made since the death.
int seats_for(int most, int standby, bool replaces);
// "--name" in torchrun's two spellings: "--nproc-per-node,--nproc_per_node".
std::string both_spellings(std::string_view name);
// The group of flags that are taken but mean nothing here.
inline constexpr const char* kWithoutMeaning = "Accepted for torchrun's sake";
// False if help was asked for and printed. Throws ConfigError: an unknown flag, with the nearest
// known one as its hint; a value that is empty.
bool parse_arguments(CLI::App& app, const std::vector<std::string>& arguments);

double monotonic_seconds();
// Standard output and error. What main() returns with is written before the program ends.
Console& console();
// Both ignore what cannot be written: the files are the result, a closed terminal is no failure.
void print(std::string_view text);        // to standard output
void print_error(std::string_view text);  // to standard error
// To standard error: what every rank did last. More is written to `file`. Nothing if the workers
// used no collectives.
void print_flight_record(Segment& segment, const std::filesystem::path& file);

}  // namespace lockstep
