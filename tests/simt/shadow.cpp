#include "shadow.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "state.h"

namespace simt {

namespace {

// A cell keeps no more readers than this. In global memory later ones are forgotten, as inputs may
// be read by every warp of the grid: a write by a thread ordered after those kept goes unnoticed.
constexpr size_t kMaxReaders[] = {31, 8};

bool is_before(const Reader& r, const Thread& t, uint32_t* culprit) {
  if (r.warp >> 5 == t.block->index && r.interval < t.block->interval) return true;
  for (uint32_t mask = r.mask; mask; mask &= mask - 1) {
    uint32_t id = r.warp << 5 | static_cast<uint32_t>(std::countr_zero(mask));
    if (!is_before(Point{id, r.interval, r.clock}, t)) {
      *culprit = id;
      return false;
    }
  }
  return true;
}

const char* verb(Access access) {
  return access == Access::kRead ? "read" : access == Access::kWrite ? "write" : "atomic";
}

}  // namespace

void Shadow::reset() {
  more_used_ = 0;
  split_.clear();
  split_free_.clear();
}

void Shadow::race(const char* mine, const char* theirs, uint32_t id, uintptr_t address, Thread& t) {
  const char* kind = kind_ == Kind::kShared       ? "race on shared memory"
                     : id >> 10 == t.block->index ? "race on global memory"
                                                  : "unordered hand-over";
  uintptr_t base = kind_ == Kind::kShared ? reinterpret_cast<uintptr_t>(t.block->shared) : 0;
  fail(kind, "%s of byte 0x%zx, not ordered after the %s by %s", mine,
       static_cast<size_t>(address - base), theirs, describe_thread(id).c_str());
}

void Shadow::check_readers(Cell& c, uintptr_t address, Thread& t) {
  uint32_t id;
  if (c.reader.mask && !is_before(c.reader, t, &id)) race("write", "read", id, address, t);
  if (!c.more) return;
  for (const Reader& r : more_[c.more - 1])
    if (!is_before(r, t, &id)) race("write", "read", id, address, t);
  more_[c.more - 1].clear();
}

void Shadow::record_read(Cell& c, Thread& t) {
  uint32_t warp = t.id >> 5, bit = 1u << t.lane, interval = t.block->interval;
  Reader now{warp, bit, interval, t.clock};
  auto merge = [&](Reader& r) {
    // A reading of an interval of the block stands for those of intervals before.
    if (r.mask == 0 || (r.warp >> 5 == t.block->index && r.interval < interval)) {
      r = now;
      return true;
    }
    if (r.warp != warp) return false;
    r.mask |= bit;
    r.clock = std::max(r.clock, t.clock);
    return true;
  };
  if (merge(c.reader)) return;
  if (!c.more) {
    if (more_used_ == more_.size()) more_.emplace_back();
    more_[more_used_].clear();
    c.more = ++more_used_;
  }
  auto& more = more_[c.more - 1];
  for (Reader& r : more)
    if (merge(r)) return;
  if (more.size() < kMaxReaders[static_cast<int>(kind_)])
    more.push_back(now);
  else
    more.back() = now;
}

void Shadow::check(Cell& c, uintptr_t address, Access access, Thread& t) {
  if (c.writer == 0) {
    if (kind_ == Kind::kShared && access != Access::kWrite)
      fail("uninitialised shared memory", "%s of byte 0x%zx, which nobody has written",
           verb(access),
           static_cast<size_t>(address - reinterpret_cast<uintptr_t>(t.block->shared)));
  } else if (c.writer != t.id + 1 && !(access == Access::kAtomic && c.atomic)) {
    if (!is_before(Point{c.writer - 1, c.interval, c.clock}, t))
      race(verb(access), c.atomic ? "atomic" : "write", c.writer - 1, address, t);
  }
  if (access == Access::kRead) {
    record_read(c, t);
    return;
  }
  check_readers(c, address, t);
  c.reader.mask = 0;
  c.writer = t.id + 1;
  c.interval = t.block->interval;
  c.clock = t.clock;
  c.atomic = access == Access::kAtomic;
}

void Shadow::split(Cell& c) {
  uint32_t at;
  if (split_free_.empty()) {
    at = static_cast<uint32_t>(split_.size());
    split_.emplace_back();
  } else {
    at = split_free_.back();
    split_free_.pop_back();
  }
  Cell part = c;
  part.more = 0;
  split_[at].fill(part);
  if (c.more)
    for (Cell& p : split_[at]) {
      if (more_used_ == more_.size()) more_.emplace_back();
      more_[more_used_] = more_[c.more - 1];
      p.more = ++more_used_;
    }
  c.split = at + 1;
}

void Shadow::access(Cell* cells, uintptr_t address, size_t size, Access access, Thread& t) {
  for (uintptr_t end = address + size; address < end; ++cells) {
    uintptr_t stop = (address | 3) + 1;
    if (stop > end) stop = end;
    bool whole = stop - address == 4;
    Cell& c = *cells;
    if (!c.split && whole) {
      check(c, address, access, t);
    } else {
      if (!c.split) split(c);
      for (uintptr_t a = address; a < stop; ++a) check(split_[c.split - 1][a & 3], a, access, t);
      if (whole && access != Access::kRead) {
        split_free_.push_back(c.split - 1);
        Cell one = split_[c.split - 1][0];
        uint32_t more = c.more;
        c = one;
        c.more = more;
        c.split = 0;
        if (more) more_[more - 1].clear();
      }
    }
    address = stop;
  }
}

Page& Pages::at(uintptr_t address) {
  uintptr_t number = address / Page::kBytes;
  Slot& slot = recent_[number % recent_.size()];
  if (slot.number == number && slot.page) return *slot.page;
  auto& page = pages_[number];
  if (!page) {
    if (spare_.empty()) {
      page = std::make_unique<Page>();
    } else {
      page = std::move(spare_.back());
      spare_.pop_back();
      std::memset(page.get(), 0, sizeof(Page));
    }
  }
  slot = {number, page.get()};
  return *page;
}

void Pages::count_distinct(uint64_t& loaded, uint64_t& stored) const {
  for (const auto& [number, page] : pages_) {
    for (uint64_t bits : page->loaded) loaded += static_cast<uint64_t>(std::popcount(bits));
    for (uint64_t bits : page->stored) stored += static_cast<uint64_t>(std::popcount(bits));
  }
}

void Pages::reset() {
  for (auto& [number, page] : pages_) spare_.push_back(std::move(page));
  pages_.clear();
  recent_.fill({});
}

}  // namespace simt
