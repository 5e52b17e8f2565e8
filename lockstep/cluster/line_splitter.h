// Splits a byte stream into lines. A line longer than kMaxLineBytes comes in pieces. One thread.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace lockstep {

inline constexpr std::size_t kMaxLineBytes = std::size_t{64} << 10;

class LineSplitter {
 public:
  template <typename OnLine>
  void feed(std::string_view bytes, const OnLine& on_line) {
    while (!bytes.empty()) {
      const std::size_t room = kMaxLineBytes - partial_.size();
      const std::size_t end = bytes.substr(0, room).find('\n');
      if (end == std::string_view::npos && bytes.size() < room) {
        partial_.append(bytes);
        return;
      }
      const std::size_t length = end == std::string_view::npos ? room : end;
      partial_.append(bytes.substr(0, length));
      bytes.remove_prefix(end == std::string_view::npos ? length : length + 1);
      flush(on_line, end != std::string_view::npos);
    }
  }
  // The last line, if it has no end.
  template <typename OnLine>
  void finish(const OnLine& on_line) {
    flush(on_line, false);
  }

 private:
  template <typename OnLine>
  void flush(const OnLine& on_line, bool even_empty) {
    const bool piece = partial_.size() == kMaxLineBytes;
    const std::string line = std::move(partial_);
    partial_.clear();
    // The end of a line whose last piece was full has nothing left to show.
    if (!line.empty() || (even_empty && !last_was_piece_)) on_line(std::string_view(line));
    last_was_piece_ = piece;
  }

  std::string partial_;
  bool last_was_piece_ = false;
};

}  // namespace lockstep
