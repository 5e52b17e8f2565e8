// For tests alone: workers as threads at the seats of a segment, whose agent the test is.
#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "lockstep/cluster/world.h"
#include "lockstep/memory/generation_board.h"

namespace lockstep {

struct Killed {};  // a worker that throws it is gone without a word

class Generations {
 public:
  Generations(int least, int most)
      : segment_(Segment::create({.seats = 12, .arena_bytes = 16 << 20})) {
    set_world_bounds(*segment_, {least, most});
  }
  ~Generations() { join(); }

  void start(int seat, std::function<void(const World&)> life) {
    threads_.emplace_back([this, seat, life = std::move(life)] {
      Place place{.launcher = Launcher::lockstep};
      place.seat = seat;
      place.segment_fd = ::dup(segment_->fd());
      try {
        life(init_from(place, {.timeout = std::chrono::seconds(60), .join = false}));
      } catch (const Killed&) {
      } catch (const std::exception& error) {
        ADD_FAILURE() << "seat " << seat << ": " << error.what();
      }
    });
  }
  void say(std::vector<int> seats, bool at_once, const std::string& reason = "the test says so") {
    publish(*segment_, {.number = number_++, .seats = std::move(seats), .reason = reason}, at_once);
  }
  void join() {
    for (std::thread& thread : std::exchange(threads_, {})) thread.join();
  }
  Segment& segment() { return *segment_; }

 private:
  std::shared_ptr<Segment> segment_;
  std::vector<std::thread> threads_;
  std::uint64_t number_ = 0;
};

}  // namespace lockstep
