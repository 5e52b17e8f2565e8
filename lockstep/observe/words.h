// Numbers as a person reads them, and tables of them. Pure; any thread.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lockstep {

std::string words_for_bytes(std::uint64_t bytes);  // "512 B", "12.3 kB", "1.2 GB": powers of 1000
std::string words_for_count(double count);         // "18,400", rounded
std::string words_for_duration(double seconds);    // "0:07", "12:34", "1:02:03"
std::string words_for_loss(double loss);           // "0.5123", "3.21e-05"

// Columns as wide as their widest cell, two spaces between them; the first `left` columns aligned
// left, the others right. Every row ends a line.
std::string table_of(const std::vector<std::vector<std::string>>& rows, std::size_t left = 0);

}  // namespace lockstep
