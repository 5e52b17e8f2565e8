#include "lockstep/transport/linked_transport.h"

namespace lockstep {

void LinkedTransport::look_at_links() {
  looked_ = Clock::now();
  links_->progress();
  for (int peer = 0; peer < size(); ++peer) {
    if (!alive(peer)) continue;
    Partner& partner = partners_[peer];
    const Links::Peer& link = links_->peer(peer);
    if (link.text && !std::exchange(partner.greeted, true)) greeted(peer, *link.text);
    // Who has left in order may have sent what has not come yet.
    if (!link.lost.empty() && (!link.farewell || partner.received >= *link.farewell))
      partner.error = link.farewell ? "has left" : link.lost;
  }
}

void LinkedTransport::sleep(int fd, Clock::duration at_most) {
  pollfd fds[] = {{fd, POLLIN, 0}, {links_->fd(), POLLIN, 0}};
  const auto ns = std::chrono::nanoseconds(std::max(at_most, Clock::duration::zero())).count();
  const timespec timeout{ns / 1'000'000'000, ns % 1'000'000'000};
  if (::ppoll(fds, std::size(fds), &timeout, nullptr) > 0 && fds[1].revents) look_at_links();
}

void LinkedTransport::leave() noexcept try {
  const Deadline deadline = Deadline::after(kLinger);
  const auto in_order = [&](int peer) { return alive(peer) && !is_busy(peer); };
  for (int peer = 0; peer < size(); ++peer)
    if (in_order(peer)) links_->say_farewell(peer, partners_[peer].sent);
  const auto somebody_stays = [&] {
    for (int peer = 0; peer < size(); ++peer)
      if (in_order(peer) && (partners_[peer].greeted || owes(peer)) && !links_->peer(peer).farewell)
        return true;
    return false;
  };
  while (somebody_stays() && !deadline.expired()) {
    wait(std::chrono::milliseconds(10));
    progress();
  }
} catch (const std::exception&) {  // then the connection's end tells them
}

}  // namespace lockstep
