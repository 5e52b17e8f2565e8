// For tests alone: workers as threads at the seats of a segment, or of several nodes' segments,
// whose agent the test is.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <array>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/memory/generation_board.h"
#include "lockstep/observe/event.h"

namespace lockstep {

struct Killed {};  // a worker that throws it is gone without a word

class Generations {
 public:
  Generations(int least, int most, int nodes = 1) {
    for (int node = 0; node < nodes; ++node) {
      segments_.push_back(Segment::create({.seats = 12, .arena_bytes = 16 << 20}));
      set_world_bounds(*segments_.back(), {least, most});
    }
  }
  ~Generations() { join(); }

  void start(int seat, std::function<void(const World&)> life) {
    start({0, seat}, std::move(life));
  }
  struct Seat {
    int node = 0, seat = 0;
    auto operator<=>(const Seat&) const = default;
  };
  void start(Seat at, std::function<void(const World&)> life, const std::string& inject = "") {
    Place place{.launcher = Launcher::lockstep};
    place.seat = at.seat;
    place.segment_fd = ::dup(segment(at.node).fd());
    place.inject = inject;
    if (segments_.size() > 1) {
      place.several_nodes = true;
      int pipe[2];
      ASSERT_EQ(::pipe(pipe), 0);
      place.event_fd = pipe[1];
      ears_[at].end = UniqueFd(pipe[0]);
    }
    threads_.emplace_back([at, place, life = std::move(life)] {
      try {
        life(init_from(place, {.timeout = std::chrono::seconds(60), .join = false}));
      } catch (const Killed&) {
      } catch (const std::exception& error) {
        ADD_FAILURE() << "seat " << at.seat << " of node " << at.node << ": " << error.what();
      }
    });
  }
  void say(std::vector<int> seats, bool at_once, const std::string& reason = "the test says so") {
    publish(segment(), {.number = number_++, .seats = std::move(seats), .reason = reason}, at_once);
  }
  // By node; who has none does not hear of it. Waits until all of them want to join.
  void say_nodes(const std::vector<std::vector<int>>& nodes, bool at_once) {
    Generation next{.number = number_++, .seats = {}, .reason = "the test says so"};
    for (int node = 0; node < static_cast<int>(nodes.size()); ++node) {
      const auto& seats = nodes[static_cast<std::size_t>(node)];
      if (!seats.empty()) next.local_sizes.push_back(static_cast<int>(seats.size()));
      for (const int seat : seats) next.addresses.push_back(address_of({node, seat}));
    }
    for (int node = 0; node < static_cast<int>(nodes.size()); ++node) {
      next.seats = nodes[static_cast<std::size_t>(node)];
      if (next.seats.empty()) continue;
      publish(segment(node), next, at_once);
      ++next.node;
    }
  }
  void join() {
    for (std::thread& thread : std::exchange(threads_, {})) thread.join();
  }
  Segment& segment(int node = 0) { return *segments_[static_cast<std::size_t>(node)]; }

 private:
  struct Ear {
    UniqueFd end;
    EventReader reader;
    std::string address;
  };
  const std::string& address_of(Seat seat) {
    Ear& ear = ears_[seat];
    std::array<std::byte, 4096> bytes;
    while (ear.address.empty()) {
      const ssize_t size = ::read(ear.end.get(), bytes.data(), bytes.size());
      if (size <= 0) throw Error("a worker that is to be a member has not said where it is");
      for (const auto& event : ear.reader.feed(std::span(bytes).first(std::size_t(size))))
        if (event["event"] == "join") ear.address = event.at("address");
    }
    return ear.address;
  }

  std::vector<std::shared_ptr<Segment>> segments_;
  std::vector<std::thread> threads_;
  std::map<Seat, Ear> ears_;
  std::uint64_t number_ = 0;
};

}  // namespace lockstep
