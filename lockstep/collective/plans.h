// Schedules of all_reduce as data: what a rank does, in order. Pure functions of (rank, size); any
// thread. plans_test.cc runs every one of them over symbols for 1 to 64 ranks.
//
// The data is cut into `chunks` parts of nearly one size; steps name ranges of them.
//
// Associations. Where `canonical` is true, every rank gets canonical_tree.h's value with one
// virtual rank a rank, bit for bit. Elsewhere all ranks get the same bits on every run, but in an
// order of the plan's own: the ring begins each chunk at another rank, and the two recursive plans
// first fold the ranks beyond a power of two into others.
#pragma once

#include <vector>

namespace lockstep {

struct ChunkRange {
  int first = 0;
  int last = 0;  // one past the end
  int size() const { return last - first; }
  bool operator==(const ChunkRange&) const = default;
};

struct PlanStep {
  enum class Kind {
    message,  // sends, receives, or both at once; over when all of it is done
    meet,     // shared memory: what ranks wrote before is visible to all after
    combine,  // shared memory: reads a range of all ranks' inputs, combines it canonically and
              // writes it to all ranks' results (for_all) or to its own
  };
  enum class Then { replace, add_to_own, own_to_added };  // own = received; own + it; it + own

  Kind kind = Kind::message;
  int send_to = -1;  // -1: sends nothing
  ChunkRange sends = {};
  int receive_from = -1;  // -1: receives nothing
  ChunkRange receives = {};
  Then then = Then::replace;
  ChunkRange combines = {};
  bool for_all = false;
};

struct Plan {
  int chunks = 1;
  bool canonical = false;
  std::vector<PlanStep> steps;
};

// Shared memory. Rank r owns chunk r: reads it once from every rank and writes it home to every
// rank. Results may be the inputs. The least traffic there is.
Plan plan_owner_writes_all(int rank, int size);
// Shared memory, small messages: every rank combines everything for itself; no second meeting, so
// inputs must stay as they are until the meeting after (two places in turn).
Plan plan_flat(int rank, int size);
// Up the canonical tree to rank 0 and down again: 2 log2(size) messages of everything in a row.
Plan plan_tree(int rank, int size);
// Reduce-scatter and all-gather around a ring (Patarasuk and Yuan, 2009): every rank sends
// 2 (size - 1) / size of the data, to one neighbour alone.
Plan plan_ring(int rank, int size);
// log2(size) exchanges of everything, with partners at distance 1, 2, 4, … (Thakur, Rabenseifner
// and Gropp, 2005, section 4.5). Canonical at powers of two.
Plan plan_recursive_doubling(int rank, int size);
// Reduce-scatter by halving the data, all-gather by doubling it (Rabenseifner; there, section 4.5):
// little traffic in few messages. Nearest partners first, for the canonical order's sake. Canonical
// at powers of two.
Plan plan_recursive_halving(int rank, int size);

}  // namespace lockstep
