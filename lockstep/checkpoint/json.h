// What JSON from a file must be before it is used. Pure; any thread.
#pragma once

#include <algorithm>
#include <nlohmann/json.hpp>

namespace lockstep {

// Fits both std::uint64_t and std::int64_t.
inline bool is_count(const nlohmann::json& value) {
  return value.is_number_unsigned() && value.get<std::uint64_t>() <= INT64_MAX;
}
inline bool is_list_of_counts(const nlohmann::json& value) {
  return value.is_array() && std::all_of(value.begin(), value.end(), is_count);
}

}  // namespace lockstep
