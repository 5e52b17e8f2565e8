#include "lockstep/observe/chrome_trace.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <nlohmann/json.hpp>
#include <utility>

namespace lockstep {
namespace {

std::string json_text(std::string_view text) {
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string microseconds(std::int64_t ns) { return fmt::format("{}.{:03}", ns / 1000, ns % 1000); }

std::string metadata(std::string_view what, int process, int thread, std::string_view name) {
  return fmt::format(R"({{"name":"{}","ph":"M","pid":{},"tid":{},"args":{{"name":{}}}}})", what,
                     process, thread, json_text(name));
}

}  // namespace

std::string chrome_event(const TraceEvent& event) {
  std::string text;
  const auto out = std::back_inserter(text);
  fmt::format_to(out, R"({{"name":{},"ph":"X","pid":{},"tid":{},"ts":{},"dur":{},"args":{{)",
                 json_text(event.name), event.process, event.thread,
                 microseconds(std::max<std::int64_t>(0, event.start_ns)),
                 microseconds(std::max<std::int64_t>(0, event.duration_ns)));
  const char* separator = "";
  for (const auto& [name, value] : event.arguments) {
    fmt::format_to(out, R"({}"{}":)", std::exchange(separator, ","), name);
    if (const auto* words = std::get_if<std::string>(&value))
      text += json_text(*words);
    else if (const auto* count = std::get_if<std::uint64_t>(&value))
      fmt::format_to(out, "{}", *count);
    else if (const double number = std::get<double>(value); std::isfinite(number))
      fmt::format_to(out, "{}", number);
    else
      text += "null";
  }
  return text + "}}";
}

std::string chrome_process_name(int process, std::string_view name) {
  return metadata("process_name", process, 0, name);
}

std::string chrome_thread_name(int process, int thread, std::string_view name) {
  return metadata("thread_name", process, thread, name);
}

}  // namespace lockstep
