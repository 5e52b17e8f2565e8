// Whole numbers that a person or another program wrote. Pure; any thread.
#pragma once

#include <charconv>
#include <optional>
#include <string_view>
#include <system_error>
#include <type_traits>

namespace lockstep {

// The text as a number within bounds; none: it is something else, or more than that.
template <typename Integer>
std::optional<Integer> whole_number(std::string_view text, Integer least,
                                    std::type_identity_t<Integer> most) {
  Integer value{};
  const char* const last = text.data() + text.size();
  const auto [end, error] = std::from_chars(text.data(), last, value);
  if (error != std::errc() || end != last || value < least || value > most) return std::nullopt;
  return value;
}

}  // namespace lockstep
