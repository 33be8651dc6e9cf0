// Barriers, shuffles, fences and atomics.
#include <bit>
#include <utility>

#include "state.h"

namespace simt {

namespace {

Thread& self() { return *rt->current; }

Thread& enter(const Site& site) {
  Thread& t = self();
  t.site = site;
  return t;
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

bool is_before(const Point& p, const Thread& t) {
  if (p.id == t.id || (p.id >> 10 == t.block->index && p.interval < t.block->interval)) return true;
  return (t.known && t.known->covers(p)) || (t.block->known && t.block->known->covers(p));
}

void join_block(Block& b) {
  ++b.interval;
  for (Thread& t : b.threads) {
    b.known = joined(b.known, t.known);
    t.known = nullptr;
  }
}

void complete_barrier(Block& b) {
  if (b.arrived == 0) return;
  uint32_t exited = static_cast<uint32_t>(b.threads.size()) - b.live;
  if (b.arrived + exited < b.threads.size()) return;
  b.arrived = 0;
  if (kTrack) join_block(b);
  for (Warp& w : b.warps) {
    if (w.at_barrier) set_ready(w, w.at_barrier);
    w.at_barrier = 0;
  }
}

void block_barrier(Site site) {
  Thread& t = enter(site);
  Block& b = *t.block;
  if (b.arrived == 0) {
    b.first = &t;
  } else if (!same_place(b.first->site, site)) {
    fail("divergent barriers", "one thread waits at %s, %s at %s", describe(site).c_str(),
         describe_thread(b.first->id).c_str(), describe(b.first->site).c_str());
  }
  ++b.arrived;
  t.warp->at_barrier |= 1u << t.lane;
  complete_barrier(b);
  if (t.warp->at_barrier >> t.lane & 1)
    block_current();
  else
    yield_current();
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site) {
  Thread& t = enter(site);
  Warp& w = *t.warp;
  if (mask != w.all)
    fail("warp mask", "mask 0x%08x at %s is not the warp's, 0x%08x", mask, describe(site).c_str(),
         w.all);
  if (w.exited)
    fail("warp mask", "mask 0x%08x at %s names lane %d, which has ended", mask,
         describe(site).c_str(), std::countr_zero(w.exited));
  t.from = t.lane ^ static_cast<uint32_t>(lanes);
  if (t.from > 31 || !(mask >> t.from & 1))
    fail("warp mask", "a shuffle at %s reads lane %u, which its mask 0x%08x does not name",
         describe(site).c_str(), t.from, mask);
  w.value[t.lane] = value;
  w.in_op |= 1u << t.lane;
  if (w.in_op != mask) {
    block_current();
    return w.result[t.lane];
  }
  for (unsigned m = mask; m; m &= m - 1) {
    int j = std::countr_zero(m);
    w.result[j] = w.value[w.threads[j].from];
  }
  w.in_op = 0;
  set_ready(w, mask);
  yield_current();
  return w.result[t.lane];
}

void fence() {
  Thread& t = self();
  if (kTrack) {
    Block& b = *t.block;
    t.known = joined(t.known, t.pending);
    t.pending = nullptr;
    t.fence = std::make_shared<Fence>(b.known, t.known, Point{t.id, b.interval, t.clock});
    ++t.clock;
  }
  if (next_random() % 4 == 0) yield_current();
}

uint32_t atomic_add(uint32_t* address, uint32_t value, Site site) {
  Thread& t = enter(site);
  if (next_random() & 1) yield_current();
  if (kTrack) {
    track(reinterpret_cast<uintptr_t>(address), sizeof value, Access::kAtomic);
    ClockRef& channel = rt->channels[address];
    t.pending = joined(t.pending, channel);
    if (t.fence) {
      auto next = channel ? std::make_shared<Clock>(*channel) : std::make_shared<Clock>();
      t.fence->into(*next);
      channel = std::move(next);
    }
  }
  return std::exchange(*address, *address + value);
}

char* dynamic_shared() { return self().block->shared; }

}  // namespace simt
