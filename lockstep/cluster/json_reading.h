// What another process says as JSON, read as a struct that nlohmann's macros convert: for the .cc
// files of cluster/. Pure; any thread.
#pragma once

#include <fmt/format.h>

#include <chrono>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>

#include "lockstep/base/error.h"

namespace nlohmann {

template <typename T>
struct adl_serializer<std::optional<T>> {
  static void to_json(json& to, const std::optional<T>& value) {
    if (value) to = *value;  // else null
  }
  static void from_json(const json& from, std::optional<T>& value) {
    if (!from.is_null()) value = from.get<T>();
  }
};
template <>
struct adl_serializer<std::chrono::nanoseconds> {
  static void to_json(json& to, std::chrono::nanoseconds value) { to = value.count(); }
  static void from_json(const json& from, std::chrono::nanoseconds& value) {
    value = std::chrono::nanoseconds(from.get<std::int64_t>());
  }
};

}  // namespace nlohmann

namespace lockstep {

// The conversions take any number for any other: none here has a point, or a sign but for -1.
inline void check_numbers(const nlohmann::json& value) {
  if (value.is_number_float() || (value.is_number_integer() && value < -1))
    throw ConfigError(fmt::format("{} counts nothing", value.dump()));
  if (value.is_structured())
    for (const nlohmann::json& part : value) check_numbers(part);
}

// Throws ConfigError. Bounds are the caller's to check.
template <typename T>
T read_json(const nlohmann::json& object) {
  check_numbers(object);
  try {
    return object.get<T>();
  } catch (const nlohmann::json::exception& error) {
    throw ConfigError(error.what());
  }
}

// Negative numbers are too large, too.
inline void check(const char* what, auto value, std::uint64_t most) {
  if (static_cast<std::uint64_t>(value) > most)
    throw ConfigError(fmt::format("'{}' is {}, at most {}", what, value, most));
}
inline void check(const char* what, const std::optional<std::uint64_t>& value, std::uint64_t most) {
  if (value) check(what, *value, most);
}

}  // namespace lockstep
