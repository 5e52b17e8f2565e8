// The kinds of failure a caller can meet, and CHECK for our own bugs.
//
// ConfigError  the user's input is wrong: one line that says what, where, and a hint. Exit code 2.
// CommError    a collective or its group failed: a peer died, was late, disagreed, or the job was
//              aborted. Exit code 1.
// Error        the run itself failed (disk full, non-finite loss, a worker died). Exit code 1.
// CHECK        a broken invariant of our own: prints the place and aborts.
#pragma once

#include <stdexcept>
#include <string>
#include <string_view>

namespace lockstep {

inline constexpr int kExitFailedRun = 1;
inline constexpr int kExitBadInput = 2;

class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class ConfigError : public Error {
 public:
  // what() is "MESSAGE" or "MESSAGE; hint: HINT", always one line.
  explicit ConfigError(const std::string& message, const std::string& hint = "")
      : Error(hint.empty() ? message : message + "; hint: " + hint) {}
};

class CommError : public Error {
 public:
  using Error::Error;
};

// "No space left on device" for the errno given; thread-safe.
std::string errno_text(int error_number);

// read(), whose Error means that the user's input is wrong: the same words as a ConfigError.
template <typename Read>
auto as_input(Read&& read, const std::string& hint = "") {
  try {
    return read();
  } catch (const ConfigError&) {
    throw;
  } catch (const Error& error) {
    throw ConfigError(error.what(), hint);
  }
}

[[noreturn]] void check_failed(const char* condition, const char* file, int line,
                               std::string_view message);

}  // namespace lockstep

// Aborts with place and message when an invariant of our own is broken. Never for user input.
#define LOCKSTEP_CHECK(condition, ...)                                                           \
  do {                                                                                           \
    if (!(condition)) [[unlikely]]                                                               \
      ::lockstep::check_failed(#condition, __FILE__, __LINE__, ::std::string_view{__VA_ARGS__}); \
  } while (false)
