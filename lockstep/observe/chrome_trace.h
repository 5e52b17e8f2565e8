// The text of a Chrome trace, as Perfetto and chrome://tracing open it ("Trace Event Format", the
// JSON object form). Pure; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace lockstep {

inline constexpr std::string_view kChromeTraceHead = R"({"displayTimeUnit":"ns","traceEvents":[)";
inline constexpr std::string_view kChromeTraceTail = "\n]}\n";  // events: with "," between them

struct TraceEvent {
  int process = 0;
  int thread = 0;
  std::string name = {};
  std::int64_t start_ns = 0;
  std::int64_t duration_ns = 0;  // negative: 0
  std::vector<std::pair<std::string_view, std::variant<std::string, std::uint64_t, double>>>
      arguments = {};
};

// Each one JSON object. Text that is no UTF-8 has its bad bytes replaced.
std::string chrome_event(const TraceEvent& event);
std::string chrome_process_name(int process, std::string_view name);
std::string chrome_thread_name(int process, int thread, std::string_view name);

}  // namespace lockstep
