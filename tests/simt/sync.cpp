// Barriers, warp operations, fences and atomics.
#include <algorithm>
#include <bit>

#include "state.h"

namespace simt {

namespace {

Thread& self() { return *rt->current; }

Thread& enter(const Site& site) {
  Thread& t = self();
  t.site = site;
  ++rt->last.sync_points;
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

uint64_t warp_result(const Thread& t, const uint64_t* value) {
  int lane = static_cast<int>(t.lane), base = lane & ~(t.width - 1), top = base + t.width - 1;
  int from = lane;
  switch (t.op) {
    case WarpKind::kSync:
      return 0;
    case WarpKind::kShfl:
      from = base + (t.arg & (t.width - 1));
      break;
    case WarpKind::kUp:
      from = t.arg > lane - base ? lane : lane - t.arg;
      break;
    case WarpKind::kDown:
      from = t.arg > top - lane ? lane : lane + t.arg;
      break;
    case WarpKind::kXor:
      from = (lane ^ t.arg) > top ? lane : lane ^ t.arg;
      break;
    default: {
      uint64_t votes = 0, sum = 0, least = ~0ull, most = 0;
      for (unsigned m = t.mask; m; m &= m - 1) {
        int j = std::countr_zero(m);
        uint64_t v = value[j];
        votes |= (v & 1) << j;
        sum += v;
        least = std::min(least, v);
        most = std::max(most, v);
      }
      if (t.op == WarpKind::kBallot) return votes;
      if (t.op == WarpKind::kAny) return votes != 0;
      if (t.op == WarpKind::kAll) return votes == t.mask;
      return t.op == WarpKind::kAdd ? sum : t.op == WarpKind::kMin ? least : most;
    }
  }
  if (!(t.mask >> from & 1))
    fail("warp mask", "a shuffle at %s reads lane %d, which its mask 0x%08x does not name",
         describe(t.site).c_str(), from, t.mask);
  return value[from];
}

// Whether all that mask names wait in this operation, t's own arrival included. Two lanes
// that wait for each other in different ones can never go on; else one may come later.
bool all_arrived(const Thread& t) {
  uint32_t here = 0;
  for (uint32_t m = t.warp->in_op; m; m &= m - 1) {
    const Thread& o = t.warp->threads[std::countr_zero(m)];
    bool alike = o.mask == t.mask && o.op == t.op;
    if (!alike && (o.mask >> t.lane & 1) && (t.mask >> o.lane & 1))
      fail("warp mask", "%s with mask 0x%08x at %s, but lane %u waits with 0x%08x at %s",
           o.mask == t.mask ? "another operation" : "an operation", t.mask,
           describe(t.site).c_str(), o.lane, o.mask, describe(o.site).c_str());
    if (alike) here |= 1u << o.lane;
  }
  return here == t.mask;
}

void merge_named(std::vector<uint32_t>& clocks, const Thread& t) {
  uint32_t first = t.tid - t.lane;
  size_t size = clocks.size();
  if (t.named)
    for (size_t i = 0; i < size; ++i) clocks[i] = std::max(clocks[i], (*t.named)[i]);
  for (uint32_t j = 0; j < 32 && first + j < size; ++j)
    clocks[first + j] = std::max(clocks[first + j], t.known_clock(j));
}

void arrive_named(int id, int count, bool wait, const Site& site) {
  Thread& t = enter(site);
  Block& b = *t.block;
  if (id < 0 || id > 15 || count <= 0 || count % 32 != 0)
    fail("barrier arguments", "named barrier %d of %d threads at %s", id, count,
         describe(site).c_str());
  NamedBarrier& n = b.named[id];
  if (n.arrived == 0) {
    n.count = count;
    n.clocks.assign(rt->threads, 0);
    n.known = nullptr;
  } else if (n.count != count) {
    fail("divergent barriers", "named barrier %d is of %d threads to some and of %d at %s", id,
         n.count, count, describe(site).c_str());
  }
  ++n.arrived;
  if (kTrack) {
    merge_named(n.clocks, t);
    n.known = joined(n.known, t.known);
    ++t.clock();
  }
  if (wait) n.waiting.push_back(&t);
  if (n.arrived < n.count) {
    if (wait) block_current(Wait::kNamed);
    return;
  }
  auto clocks = std::make_shared<const std::vector<uint32_t>>(std::move(n.clocks));
  auto waiting = std::move(n.waiting);
  n.waiting.clear();
  n.arrived = 0;
  for (Thread* w : waiting) {
    if (kTrack) {
      w->named = clocks;
      w->warp->more_known = true;
      give_known(*w, n.known);
    }
    if (w != &t) set_ready(*w->warp, 1u << w->lane);
  }
  rt->idle = 0;
  yield_current();
}

}  // namespace

bool is_before(const Point& p, const Thread& t) {
  uint32_t tid = p.id & 1023;
  if (p.id >> 10 == t.block->index) {
    if (p.interval < t.block->interval) return true;
    if (tid >> 5 == t.tid >> 5 && t.known_clock(tid & 31) >= p.clock) return true;
    if (t.named && (*t.named)[tid] >= p.clock) return true;
  }
  return (t.known && t.known->covers(p)) || (t.block->known && t.block->known->covers(p));
}

void join_warp(Warp& w, unsigned mask) {
  Thread* lanes = w.threads;
  uint32_t last = 0;
  if (mask == w.all) {
    for (uint32_t clock : w.clock) last = std::max(last, clock);
    std::fill(w.clock, w.clock + 32, last + 1);
    std::fill(w.base, w.base + 32, last);
    if (w.partial)
      for (unsigned m = mask; m; m &= m - 1) lanes[std::countr_zero(m)].partial = false;
    w.partial = false;
  } else {
    for (unsigned m = mask; m; m &= m - 1) last = std::max(last, w.clock[std::countr_zero(m)]);
    uint32_t seen[32] = {};
    for (uint32_t j = 0; j < 32; ++j) {
      if (mask >> j & 1) {
        seen[j] = last;
        continue;
      }
      for (unsigned m = mask; m; m &= m - 1)
        seen[j] = std::max(seen[j], lanes[std::countr_zero(m)].known_clock(j));
    }
    for (unsigned m = mask; m; m &= m - 1) {
      Thread& t = lanes[std::countr_zero(m)];
      t.clock() = last + 1;
      t.partial = true;
      std::copy(seen, seen + 32, t.lanes);
    }
    w.partial = true;
  }
  if (!w.more_known) return;
  ClockRef known;
  std::shared_ptr<const std::vector<uint32_t>> named;
  bool differ = false;
  for (unsigned m = mask; m; m &= m - 1) {
    Thread& t = lanes[std::countr_zero(m)];
    known = joined(known, t.known);
    if (t.named && named && t.named != named) differ = true;
    if (t.named) named = t.named;
  }
  if (differ) {
    std::vector<uint32_t> clocks(rt->threads, 0);
    for (unsigned m = mask; m; m &= m - 1) merge_named(clocks, lanes[std::countr_zero(m)]);
    named = std::make_shared<const std::vector<uint32_t>>(std::move(clocks));
  }
  for (unsigned m = mask; m; m &= m - 1) {
    Thread& t = lanes[std::countr_zero(m)];
    t.known = known;
    t.named = named;
  }
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
      b.threads[j].named = nullptr;
    }
  }
}

void complete_barrier(Block& b) {
  if (b.arrived == 0) return;
  uint32_t exited = static_cast<uint32_t>(b.threads.size()) - b.live;
  if (b.arrived + exited < b.threads.size()) return;
  b.result = b.kind == BarrierKind::kOr ? b.any : b.kind == BarrierKind::kAnd ? b.all : b.count;
  b.arrived = 0;
  if (kTrack) join_block(b);
  rt->idle = 0;
  for (Warp& w : b.warps) {
    if (w.at_barrier) set_ready(w, w.at_barrier);
    w.at_barrier = 0;
  }
}

int block_barrier(BarrierKind kind, int predicate, Site site) {
  Thread& t = enter(site);
  Block& b = *t.block;
  if (b.arrived == 0) {
    b.kind = kind;
    b.any = b.count = 0;
    b.all = 1;
    b.first = &t;
  } else if (b.kind != kind || !same_place(b.first->site, site)) {
    fail("divergent barriers", "one thread waits at %s, %s at %s", describe(site).c_str(),
         describe_thread(b.first->id).c_str(), describe(b.first->site).c_str());
  }
  ++b.arrived;
  b.any |= predicate != 0;
  b.all &= predicate != 0;
  b.count += predicate != 0;
  t.warp->at_barrier |= 1u << t.lane;
  complete_barrier(b);
  if (t.warp->at_barrier >> t.lane & 1)
    block_current(Wait::kBarrier);
  else
    yield_current();
  return b.result;
}

void named_barrier_sync(int id, int count, Site site) { arrive_named(id, count, true, site); }
void named_barrier_arrive(int id, int count, Site site) { arrive_named(id, count, false, site); }

uint64_t warp_op(WarpKind kind, unsigned mask, uint64_t value, int arg, int width, Site site) {
  Thread& t = enter(site);
  Warp& w = *t.warp;
  uint32_t bit = 1u << t.lane;
  if (!(mask & bit))
    fail("warp mask", "mask 0x%08x at %s does not name the calling lane %u", mask,
         describe(site).c_str(), t.lane);
  if (unsigned gone = mask & (~w.all | w.exited))
    fail("warp mask", "mask 0x%08x at %s names lane %d, which %s", mask, describe(site).c_str(),
         std::countr_zero(gone), gone & w.all ? "has ended" : "does not exist");
  if (width < 1 || width > 32 || (width & (width - 1)))
    fail("warp mask", "width %d at %s", width, describe(site).c_str());
  t.op = kind;
  t.mask = mask;
  t.arg = arg;
  t.width = width;
  w.value[t.lane] = value;
  if (!w.in_op) {
    w.op = kind;
    w.mask = mask;
    w.mixed = false;
  } else if (w.mask != mask || w.op != kind) {
    w.mixed = true;
  }
  w.in_op |= bit;
  if (w.mixed ? !all_arrived(t) : w.in_op != mask) {
    block_current(Wait::kWarp);
    return w.result[t.lane];
  }
  for (unsigned m = mask; m; m &= m - 1) {
    int j = std::countr_zero(m);
    w.result[j] = warp_result(w.threads[j], w.value);
  }
  if (kTrack) join_warp(w, mask);
  w.in_op &= ~mask;
  set_ready(w, mask);
  rt->idle = 0;
  yield_current();
  return w.result[t.lane];
}

unsigned active_mask() { return self().warp->all & ~self().warp->exited; }

void fence(bool device_scope) {
  Thread& t = self();
  ++rt->last.sync_points;
  if (kTrack) {
    Block& b = *t.block;
    ClockRef gained = t.pending_block;
    t.pending_block = nullptr;
    if (device_scope) {
      gained = joined(gained, t.pending);
      t.pending = nullptr;
    }
    give_known(t, gained);
    auto f = std::make_shared<Fence>();
    f->block_known = b.known;
    f->known = t.known;
    f->block = b.index;
    f->interval = b.interval;
    uint32_t first = t.named ? 0 : t.tid - t.lane;
    uint32_t end = t.named ? rt->threads : std::min(first + 32, rt->threads);
    for (uint32_t i = first; i < end; ++i) {
      const Thread& o = b.threads[i];
      if (o.last_interval != b.interval) continue;
      uint32_t clock = o.warp == t.warp ? t.known_clock(o.lane) : 0;
      if (t.named) clock = std::max(clock, (*t.named)[i]);
      if (clock) f->points.push_back({o.id, b.interval, clock});
    }
    ++t.clock();
    t.fence_block = f;
    if (device_scope) t.fence = f;
  }
  if (next_random() % 4 == 0) yield_current();
}

void acquire_release(Thread& t, uintptr_t address, bool shared, bool release) {
  Channels& channels = shared ? t.block->channels : rt->channels;
  const FenceRef& fence = shared ? t.fence_block : t.fence;
  auto at = channels.find(address);
  if (at == channels.end()) {
    if (!release || !fence) return;
    at = channels.try_emplace(address).first;
  }
  if (ClockRef clock = at->second.acquire()) {
    ClockRef& pending = shared ? t.pending_block : t.pending;
    pending = joined(pending, clock);
  }
  if (release && fence) at->second.release(fence);
}

void poll(const void* address, size_t size, Site site) {
  Thread& t = enter(site);
  auto a = reinterpret_cast<uintptr_t>(address);
  spin(t, a);
  yield_current();
  if (!kTrack) return;
  count_poll(a, size);
  acquire_release(t, a, is_shared(a), false);
}

void atomic_begin(const void* address, size_t size, Site site) {
  Thread& t = enter(site);
  if (next_random() & 1) yield_current();
  if (!kTrack) return;
  auto a = reinterpret_cast<uintptr_t>(address);
  track(a, size, Access::kAtomic);
  acquire_release(t, a, is_shared(a), true);
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

void trap(Site site) { fail("trap", "at %s", describe(site).c_str()); }

char* dynamic_shared() { return self().block->shared; }

}  // namespace simt
