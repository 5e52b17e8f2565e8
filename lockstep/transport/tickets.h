// The operations under way of a Transport, by ticket. One thread.
#pragma once

#include <cstddef>
#include <optional>
#include <utility>
#include <vector>

#include "lockstep/transport/transport.h"

namespace lockstep {

template <typename Operation>
class Tickets {
 public:
  Transport::Ticket add(Operation operation) {
    if (free_.empty()) {
      free_.push_back(static_cast<Transport::Ticket>(operations_.size()));
      operations_.emplace_back();
    }
    const Transport::Ticket ticket = free_.back();
    free_.pop_back();
    operations_[ticket] = std::move(operation);
    return ticket;
  }
  Operation& at(Transport::Ticket ticket) {
    LOCKSTEP_CHECK(ticket < operations_.size() && operations_[ticket], "no such operation");
    return *operations_[ticket];
  }
  template <typename Function>
  void for_each(Function&& function) {
    for (auto& operation : operations_)
      if (operation) function(*operation);
  }
  void remove(Transport::Ticket ticket) {
    at(ticket);
    operations_[ticket].reset();
    free_.push_back(ticket);
  }

 private:
  std::vector<std::optional<Operation>> operations_;
  std::vector<Transport::Ticket> free_;
};

}  // namespace lockstep
