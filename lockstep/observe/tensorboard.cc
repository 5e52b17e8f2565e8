#include "lockstep/observe/tensorboard.h"

#include <fmt/format.h>

#include <bit>

#include "lockstep/base/bytes.h"
#include "lockstep/base/file.h"
#include "lockstep/base/hash.h"

namespace lockstep {
namespace {

enum WireType : std::uint64_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

template <typename T>
void append_fixed(std::string& out, T value) {
  std::byte bytes[sizeof(T)];
  write_little_endian(value, bytes);
  out.append(reinterpret_cast<const char*>(bytes), sizeof bytes);
}

void append_varint(std::string& out, std::uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

void append_key(std::string& out, std::uint64_t field, WireType type) {
  append_varint(out, field << 3 | type);
}

void append_text(std::string& out, std::uint64_t field, std::string_view text) {
  append_key(out, field, kLengthDelimited);
  append_varint(out, text.size());
  out += text;
}

// A TFRecord: length, its masked sum, the data, its masked sum.
std::string record_of(std::string_view data) {
  const auto masked_sum = [](std::string_view bytes) {
    return std::rotr(crc32c(as_byte_span(bytes)), 15) + 0xa282ead8u;
  };
  std::string out;
  append_fixed(out, static_cast<std::uint64_t>(data.size()));
  append_fixed(out, masked_sum(out));
  out += data;
  append_fixed(out, masked_sum(data));
  return out;
}

std::string event_at(double wall_time) {
  std::string event;
  append_key(event, 1, kFixed64);  // Event.wall_time
  append_fixed(event, std::bit_cast<std::uint64_t>(wall_time));
  return event;
}

}  // namespace

std::string tensorboard_header(double wall_time) {
  std::string event = event_at(wall_time);
  append_text(event, 3, "brain.Event:2");  // Event.file_version
  return record_of(event);
}

std::string tensorboard_start(double wall_time, std::int64_t step) {
  std::string start;
  append_key(start, 1, kVarint);  // SessionLog.status
  append_varint(start, 1);        // START
  std::string event = event_at(wall_time);
  append_key(event, 2, kVarint);  // Event.step
  append_varint(event, static_cast<std::uint64_t>(step));
  append_text(event, 7, start);  // Event.session_log
  return record_of(event);
}

std::string tensorboard_scalars(double wall_time, std::int64_t step, const Scalars& scalars) {
  std::string summary;
  for (const auto& [tag, number] : scalars) {
    std::string value;
    append_text(value, 1, tag);      // Summary.Value.tag
    append_key(value, 2, kFixed32);  // Summary.Value.simple_value
    append_fixed(value, std::bit_cast<std::uint32_t>(static_cast<float>(number)));
    append_text(summary, 1, value);  // Summary.value
  }
  std::string event = event_at(wall_time);
  append_key(event, 2, kVarint);  // Event.step
  append_varint(event, static_cast<std::uint64_t>(step));
  append_text(event, 5, summary);  // Event.summary
  return record_of(event);
}

std::string tensorboard_file_name(double wall_time, std::string_view host, int pid) {
  return fmt::format("events.out.tfevents.{:010}.{}.{}", static_cast<std::int64_t>(wall_time),
                     host.empty() ? "localhost" : host, pid);
}

}  // namespace lockstep
