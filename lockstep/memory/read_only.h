// A second mapping of a part of a segment, read-only: for memory that many read and one writes on
// purpose, through the segment's own mapping. A write through the view ends the process with
// SIGSEGV, after a line on stderr that names what lies there.
//
// Owner: the view owns its mapping and keeps the segment. Threads: any may read; set_writable() and
// the end of a view belong to one thread, while no other uses the view. The first view installs a
// handler for SIGSEGV; faults outside all views go to the handler before it.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "lockstep/memory/segment.h"

namespace lockstep {

struct NamedBytes {
  std::string name;       // for the message
  std::size_t begin = 0;  // bytes from the view's beginning; sorted
};

class ReadOnlyView {
 public:
  // `memory` lies in `segment` and begins at a page. `what` and `hint`: the message is "<what>:
  // <name> was written to …; hint: <hint>". Throws Error when the kernel refuses.
  ReadOnlyView(std::shared_ptr<Segment> segment, std::span<std::byte> memory,
               std::vector<NamedBytes> names, std::string what, std::string hint);
  ~ReadOnlyView();
  ReadOnlyView(const ReadOnlyView&) = delete;
  ReadOnlyView& operator=(const ReadOnlyView&) = delete;

  // The view's addresses. Not const, because who keeps a pointer to them in a tensor can't have
  // it so.
  std::span<std::byte> bytes() const;
  void set_writable(bool writable);
  // From now on the addresses are this process's own: what is written there nobody else sees. The
  // rest shows the segment's memory as before.
  void make_private();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lockstep
