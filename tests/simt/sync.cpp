// Barriers, shuffles, fences and atomics.
#include <algorithm>
#include <bit>

#include "state.h"

namespace simt {

namespace {

Thread& self() { return *rt->current; }

Thread& enter(const Site& site) {
  Thread& t = self();
  t.site = site;
  return t;
}

void give_known(Thread& t, const ClockRef& clock) {
  if (!clock) return;
  t.known = joined(t.known, clock);
  t.warp->more_known = true;
}

// Called where t may be waiting for another thread at address (null: for time to pass).
void spin(Thread& t, uintptr_t address) {
  constexpr uint64_t kSpins = 200'000, kPolls = 100'000'000;
  // Visits of many places are work, not waiting.
  if (address && t.polled != address) rt->idle = 0;
  if (address) t.polled = address;
  if (++rt->idle <= kSpins && ++rt->polls <= kPolls) return;
  note_stuck(true);
  switch_context(t.context, rt->main, true);
}

bool same_place(const Site& a, const Site& b) {
  return a.line() == b.line() && std::string_view(a.file_name()) == b.file_name();
}

}  // namespace

bool is_before(const Point& p, const Thread& t) {
  uint32_t tid = p.id & 1023;
  if (p.id >> 10 == t.block->index) {
    if (p.interval < t.block->interval) return true;
    if (tid >> 5 == t.tid >> 5 && t.known_clock(tid & 31) >= p.clock) return true;
  }
  return (t.known && t.known->covers(p)) || (t.block->known && t.block->known->covers(p));
}

void join_warp(Warp& w) {
  w.base = *std::max_element(w.clock, w.clock + 32);
  std::fill(w.clock, w.clock + 32, w.base + 1);
  if (!w.more_known) return;
  ClockRef known;
  for (unsigned m = w.all; m; m &= m - 1)
    known = joined(known, w.threads[std::countr_zero(m)].known);
  for (unsigned m = w.all; m; m &= m - 1) w.threads[std::countr_zero(m)].known = known;
}

void join_block(Block& b) {
  ++b.interval;
  for (size_t i = 0; i < b.warps.size(); ++i) {
    Warp& w = b.warps[i];
    if (!w.more_known) continue;
    w.more_known = false;
    for (size_t j = i * 32; j < std::min<size_t>(i * 32 + 32, b.threads.size()); ++j) {
      b.known = joined(b.known, b.threads[j].known);
      b.threads[j].known = nullptr;
    }
  }
}

void complete_barrier(Block& b) {
  if (b.arrived == 0) return;
  uint32_t exited = static_cast<uint32_t>(b.threads.size()) - b.live;
  if (b.arrived + exited < b.threads.size()) return;
  b.arrived = 0;
  if (kTrack) join_block(b);
  rt->idle = 0;
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
    block_current(Wait::kBarrier);
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
    block_current(Wait::kWarp);
    return w.result[t.lane];
  }
  for (unsigned m = mask; m; m &= m - 1) {
    int j = std::countr_zero(m);
    w.result[j] = w.value[w.threads[j].from];
  }
  if (kTrack) join_warp(w);
  w.in_op = 0;
  set_ready(w, mask);
  rt->idle = 0;
  yield_current();
  return w.result[t.lane];
}

void fence() {
  Thread& t = self();
  if (kTrack) {
    Block& b = *t.block;
    give_known(t, t.pending);
    t.pending = nullptr;
    auto f = std::make_shared<Fence>();
    f->block_known = b.known;
    f->known = t.known;
    f->block = b.index;
    f->interval = b.interval;
    for (unsigned m = t.warp->all; m; m &= m - 1) {
      const Thread& o = t.warp->threads[std::countr_zero(m)];
      if (o.last_interval == b.interval)
        f->points.push_back({o.id, b.interval, t.known_clock(o.lane)});
    }
    ++t.clock();
    t.fence = f;
  }
  if (next_random() % 4 == 0) yield_current();
}

// Passes an address's clock on to those who read it by an atomic or a poll.
void acquire_release(Thread& t, uintptr_t address, bool release) {
  if (is_shared(address)) fail("unknown to the harness", "an atomic or poll of shared memory");
  if (release && t.fence) rt->channels.try_emplace(address);
  auto at = rt->channels.find(address);
  if (at == rt->channels.end()) return;
  ClockRef& channel = at->second;
  t.pending = joined(t.pending, channel);
  if (!release || !t.fence) return;
  auto next = channel ? std::make_shared<Clock>(*channel) : std::make_shared<Clock>();
  t.fence->into(*next);
  channel = std::move(next);
}

void poll(const void* address, size_t size, Site site) {
  Thread& t = enter(site);
  auto a = reinterpret_cast<uintptr_t>(address);
  spin(t, a);
  yield_current();
  if (!kTrack) return;
  count_poll(a, size);
  acquire_release(t, a, false);
}

void atomic_begin(const void* address, size_t size, Site site) {
  Thread& t = enter(site);
  if (next_random() & 1) yield_current();
  if (!kTrack) return;
  auto a = reinterpret_cast<uintptr_t>(address);
  track(a, size, Access::kAtomic);
  acquire_release(t, a, true);
}

void atomic_end(const void* address, bool changed) {
  if (changed)
    rt->idle = 0;
  else
    spin(self(), reinterpret_cast<uintptr_t>(address));
}

void nanosleep(Site site) {
  spin(enter(site), 0);
  yield_current();
}

char* dynamic_shared() { return self().block->shared; }

}  // namespace simt
