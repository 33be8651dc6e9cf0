#include "clocks.h"

#include <algorithm>

namespace simt {

namespace {
bool before_id(const Point& p, uint32_t id) { return p.id < id; }
}  // namespace

bool Clock::covers(const Point& p) const {
  uint32_t block = p.id >> 10;
  if (block < blocks.size() && p.interval < blocks[block]) return true;
  auto at = std::lower_bound(points.begin(), points.end(), p.id, before_id);
  return at != points.end() && at->id == p.id && p.clock <= at->clock;
}

void Clock::add_block(uint32_t block, uint32_t interval) {
  if (blocks.size() <= block) blocks.resize(block + 1);
  blocks[block] = std::max(blocks[block], interval);
}

void Clock::add(const Point& p) {
  auto at = std::lower_bound(points.begin(), points.end(), p.id, before_id);
  if (at == points.end() || at->id != p.id)
    points.insert(at, p);
  else if (at->clock < p.clock)
    *at = p;
}

void Clock::join(const Clock& other) {
  if (blocks.size() < other.blocks.size()) blocks.resize(other.blocks.size());
  for (size_t i = 0; i < other.blocks.size(); ++i) blocks[i] = std::max(blocks[i], other.blocks[i]);
  if (!other.points.empty()) {
    std::vector<Point> merged;
    merged.reserve(points.size() + other.points.size());
    auto a = points.begin();
    auto b = other.points.begin();
    while (a != points.end() || b != other.points.end()) {
      if (b == other.points.end() || (a != points.end() && a->id < b->id)) {
        merged.push_back(*a++);
      } else if (a == points.end() || b->id < a->id) {
        merged.push_back(*b++);
      } else {
        merged.push_back(a->clock < b->clock ? *b : *a);
        ++a;
        ++b;
      }
    }
    points = std::move(merged);
  }
  // Else they would only ever grow.
  std::erase_if(points, [this](const Point& p) {
    uint32_t block = p.id >> 10;
    return block < blocks.size() && p.interval < blocks[block];
  });
}

ClockRef joined(const ClockRef& a, const ClockRef& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Clock>(*a);
  both->join(*b);
  return both;
}

void Fence::into(Clock& clock) const {
  if (block_known) clock.join(*block_known);
  if (known && known != block_known) clock.join(*known);
  clock.add_block(at.id >> 10, at.interval);
  clock.add(at);
}

}  // namespace simt
