// The nearest of some words to a mistyped one, for hints. Pure; any thread.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace lockstep {

// By edit distance: Levenshtein with swaps of neighbours ("optimal string alignment"), of which a
// third of the word may differ; upper and lower case (of ASCII) are the same. "" when none is near.
inline std::string nearest(std::string_view word, const std::vector<std::string>& candidates) {
  constexpr std::size_t kLongest = 64;
  const auto same_letter = [](char a, char b) {
    const auto lower = [](char c) { return c >= 'A' && c <= 'Z' ? c - 'A' + 'a' : +c; };
    return lower(a) == lower(b);
  };
  if (word.empty() || word.size() > kLongest) return "";
  std::string best;
  std::size_t best_distance = std::max<std::size_t>(1, word.size() / 3) + 1;
  for (const std::string& candidate : candidates) {
    if (candidate.empty() || candidate.size() > kLongest) continue;
    const std::size_t width = candidate.size() + 1;
    std::vector<std::size_t> table((word.size() + 1) * width);
    const auto at = [&](std::size_t i, std::size_t j) -> auto& { return table[i * width + j]; };
    for (std::size_t i = 0; i <= word.size(); ++i) {
      for (std::size_t j = 0; j < width; ++j) {
        if (i == 0 || j == 0) {
          at(i, j) = i + j;
          continue;
        }
        const bool same = same_letter(word[i - 1], candidate[j - 1]);
        at(i, j) = std::min({at(i - 1, j) + 1, at(i, j - 1) + 1, at(i - 1, j - 1) + !same});
        if (i > 1 && j > 1 && same_letter(word[i - 1], candidate[j - 2]) &&
            same_letter(word[i - 2], candidate[j - 1]))
          at(i, j) = std::min(at(i, j), at(i - 2, j - 2) + 1);
      }
    }
    const std::size_t distance = at(word.size(), candidate.size());
    const bool alike = distance < std::max(word.size(), candidate.size());
    if (alike && distance < best_distance) best_distance = distance, best = candidate;
  }
  return best;
}

}  // namespace lockstep
