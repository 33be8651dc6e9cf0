// What a thread knows of other threads' accesses beyond its warp and its block's barriers.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#pragma GCC visibility push(hidden)
namespace simt {

// id = block << 10 | thread. An interval is what lies between two barriers of a block; a thread's
// clock advances at each fence.
struct Point {
  uint32_t id, interval, clock;
};

// Covers every access in a block's intervals before blocks[block], and of single threads those up
// to a point.
struct Clock {
  std::vector<uint32_t> blocks;
  std::vector<Point> points;  // sorted by id

  bool covers(const Point& p) const;
  void add_block(uint32_t block, uint32_t interval);
  void add(const Point& p);
  void join(const Clock& other);
};
using ClockRef = std::shared_ptr<const Clock>;

ClockRef joined(const ClockRef& a, const ClockRef& b);

// What a fence of a thread covers: made a clock only where an atomic publishes it.
struct Fence {
  ClockRef block_known, known;
  Point at;

  void into(Clock& clock) const;
};
using FenceRef = std::shared_ptr<const Fence>;

}  // namespace simt
#pragma GCC visibility pop
