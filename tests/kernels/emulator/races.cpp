// Race detection with vector clocks.
#include <algorithm>

#include "state.h"

namespace emulator {

bool Clock::covers(const Event& m) const {
  if (m.block() < blocks.size() && m.time < blocks[m.block()]) return true;
  auto at = threads.find(m.thread);
  return !m.several && at != threads.end() && m.time <= at->second;
}

void Clock::add_block(uint32_t block, uint32_t before) {
  if (blocks.size() <= block) blocks.resize(block + 1);
  blocks[block] = std::max(blocks[block], before);
}

void Clock::add_thread(uint32_t thread, uint32_t time) {
  uint32_t& latest = threads[thread];
  latest = std::max(latest, time);
}

void Clock::join(const Clock& other) {
  for (uint32_t i = 0; i < other.blocks.size(); ++i) add_block(i, other.blocks[i]);
  for (auto [thread, time] : other.threads) add_thread(thread, time);
  // Drops entries that `blocks` implies, so that the map stays small.
  std::erase_if(threads, [this](const auto& entry) {
    uint32_t block = (entry.first - 1) >> 10;
    return block < blocks.size() && entry.second < blocks[block];
  });
}

ClockRef joined(const ClockRef& a, const ClockRef& b) {
  if (!a || a == b) return b;
  if (!b) return a;
  auto both = std::make_shared<Clock>(*a);
  both->join(*b);
  return both;
}

namespace {

bool happens_before(const Event& m, const Thread& t) {
  const Block& b = *t.block;
  if (m.thread == t.id && !m.several) return true;
  if (m.block() == b.index && m.time < b.last_barrier) return true;
  return (t.clock && t.clock->covers(m)) || (b.clock && b.clock->covers(m));
}

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
}

}  // namespace

void Shadow::race(const char* mine, const char* theirs, const Event& other, uintptr_t address,
                  const Thread& t) {
  const char* kind = shared_                           ? "race on shared memory"
                     : other.block() == t.block->index ? "race on global memory"
                                                       : "race between blocks";
  uintptr_t base = shared_ ? reinterpret_cast<uintptr_t>(t.block->shared) : 0;
  fail(kind, "%s of byte 0x%zx, not ordered after the %s by %s", mine,
       static_cast<size_t>(address - base), theirs, describe_thread(other.thread).c_str());
}

void Shadow::check(Cell& c, uintptr_t address, Access access, Thread& t) {
  Event now{t.id, t.block->now, 0, access == Access::kAtomic};
  const Event& written = c.written;
  if (written.thread == 0) {
    if (shared_ && access == Access::kRead)
      fail("uninitialised shared memory", "read of byte 0x%zx, which no thread has written",
           static_cast<size_t>(address - reinterpret_cast<uintptr_t>(t.block->shared)));
  } else if (!(now.atomic && written.atomic) && !happens_before(written, t)) {
    race(verb(access), written.atomic ? "atomic" : "write", written, address, t);
  }
  if (access == Access::kRead) {
    bool first = c.read[0].thread == 0 || c.read[0].block() == t.block->index;
    Event& last = c.read[first ? 0 : 1];
    // One event stands for all reads of the block since its last barrier.
    now.several = last.thread && last.block() == t.block->index &&
                  last.time >= t.block->last_barrier && (last.several || last.thread != t.id);
    last = now;
    return;
  }
  for (Event& r : c.read) {
    if (r.thread && !happens_before(r, t)) race("write", "read", r, address, t);
    r.thread = 0;
  }
  c.written = now;
}

void Shadow::access(Cell* cells, uintptr_t address, size_t size, Access access, Thread& t) {
  for (uintptr_t end = address + size; address < end; ++cells) {
    uintptr_t stop = std::min((address | 3) + 1, end);
    if (stop - address < 4 && !cells->halves) {
      halves_.push_back({*cells, *cells});
      cells->halves = &halves_.back();
    }
    if (!cells->halves) check(*cells, address, access, t);
    for (uintptr_t a = address; cells->halves && a < stop; a = (a | 1) + 1)
      check((*cells->halves)[a >> 1 & 1], a, access, t);
    address = stop;
  }
}

}  // namespace emulator
