// Scheduling of threads, barriers, shuffles and atomics, and error reports.
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#include "state.h"

// Defined here instead of including cuda_runtime.h, which declares them const, so that g++ does not
// instrument accesses to them.
struct dim3 {
  unsigned x;
};
dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {

State state;

uint32_t next_random() {
  uint64_t& x = state.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return static_cast<uint32_t>((x * 0x2545f4914f6cdd1dull) >> 32);
}

// ---- order of threads ---------------------------------------------------------------------------

namespace {

// Returns a random ready thread, or null. Prefers the current warp, because its stacks are cached.
Thread* pick_thread() {
  if (state.ready_warps.empty()) return nullptr;
  uint32_t random = next_random();
  Warp* w = state.current ? state.current->warp : nullptr;
  if (!w || !w->ready || random >> 29 == 0)
    w = state.ready_warps[(random >> 5) % state.ready_warps.size()];
  int from = static_cast<int>(random & 31);
  return w->threads + ((std::countr_zero(std::rotr(w->ready, from)) + from) & 31);
}

// Switches to a thread, or to the host if `next` is null.
void switch_to(Context& from, Thread* next, bool last) {
  if (next && &next->context == &from) return;
  state.current = next;
  if (next) {
    threadIdx.x = next->index;
    blockIdx.x = next->block->index;
  }
  switch_context(from, next ? next->context : state.host, last);
}

void yield_thread() { switch_to(state.current->context, pick_thread(), false); }

void set_waiting(Thread& t) {
  Warp& w = *t.warp;
  w.ready &= ~(1u << t.lane);
  if (w.ready) return;
  Warp* last = state.ready_warps.back();
  state.ready_warps[w.ready_index] = last;
  last->ready_index = w.ready_index;
  state.ready_warps.pop_back();
}

void wait() {
  set_waiting(*state.current);
  yield_thread();
}

// ---- reports ------------------------------------------------------------------------------------

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  return (slash ? slash + 1 : site.file_name()) + (":" + std::to_string(site.line()));
}

void report(const Thread& t, const std::string& text) {
  state.failed = true;
  state.error = "emulator: " + text + ", " + describe_thread(t.id);
  if (t.site.line()) state.error += ", last synchronised at " + describe(t.site);
}

// No thread is ready, and no barrier is complete: some lanes wait in a shuffle for lanes at a
// barrier.
void report_deadlock() {
  for (const auto& b : state.blocks)
    for (const Warp& w : b->warps) {
      if (!w.in_shuffle) continue;
      const Thread& t = w.threads[std::countr_zero(w.in_shuffle)];
      int other = std::countr_zero(w.at_barrier);
      return report(t, "warp mask: it waits in a shuffle at " + describe(t.site) + " while lane " +
                           std::to_string(other) + " waits at __syncthreads, " +
                           describe(w.threads[other].site));
    }
}

}  // namespace

std::string describe_thread(uint32_t id) {
  return "block " + std::to_string((id - 1) >> 10) + " thread " + std::to_string((id - 1) & 1023);
}

void fail(const char* kind, const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  Thread& t = *state.current;
  report(t, std::string(kind) + ": " + text);
  switch_to(t.context, nullptr, true);
  __builtin_unreachable();
}

// ---- barriers, shuffles, atomics ----------------------------------------------------------------

namespace {

Thread& record_site(const Site& site) {
  state.current->site = site;
  return *state.current;
}

void complete_barrier(Block& b) {
  if (b.arrived == 0 || b.arrived < b.live) return;
  b.arrived = 0;
  b.last_barrier = ++b.now;
  for (Thread& t : b.threads) b.clock = joined(b.clock, std::exchange(t.clock, nullptr));
  for (Warp& w : b.warps)
    if (uint32_t lanes = std::exchange(w.at_barrier, 0)) set_ready(w, lanes);
}

void end_thread(Thread& t) {
  Block& b = *t.block;
  t.warp->ended |= 1u << t.lane;
  if (t.warp->in_shuffle) {
    const Thread& o = t.warp->threads[std::countr_zero(t.warp->in_shuffle)];
    fail("warp mask", "this thread ended while lane %u waits for it at %s", o.lane,
         describe(o.site).c_str());
  }
  set_waiting(t);
  --b.live;
  complete_barrier(b);
  switch_to(t.context, b.live ? pick_thread() : nullptr, true);
}

}  // namespace

void set_ready(Warp& w, uint32_t lanes) {
  if (!w.ready) {
    w.ready_index = static_cast<uint32_t>(state.ready_warps.size());
    state.ready_warps.push_back(&w);
  }
  w.ready |= lanes;
}

void run_threads() {
  blockDim.x = state.shape.block;
  gridDim.x = state.shape.grid;
  if (Thread* t = pick_thread())
    switch_to(state.host, t, false);
  else
    report_deadlock();
}

void run_body() {
  finish_first_switch();
  state.body(state.params);
  end_thread(*state.current);
  __builtin_unreachable();
}

void block_barrier(Site site) {
  Thread& t = record_site(site);
  Block& b = *t.block;
  if (b.arrived == 0) b.first_arrived = &t;
  if (const Site& other = b.first_arrived->site;
      other.line() != site.line() || std::strcmp(other.file_name(), site.file_name()) != 0)
    fail("divergent barriers", "one thread waits at %s, %s at %s", describe(site).c_str(),
         describe_thread(b.first_arrived->id).c_str(), describe(other).c_str());
  ++b.arrived;
  t.warp->at_barrier |= 1u << t.lane;
  complete_barrier(b);
  if (t.warp->at_barrier >> t.lane & 1)
    wait();
  else
    yield_thread();
}

uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site) {
  Thread& t = record_site(site);
  Warp& w = *t.warp;
  if (mask != w.all)
    fail("warp mask", "mask 0x%08x at %s is not the warp's, 0x%08x", mask, describe(site).c_str(),
         w.all);
  if (w.ended)
    fail("warp mask", "mask 0x%08x at %s names lane %d, which has ended", mask,
         describe(site).c_str(), std::countr_zero(w.ended));
  uint32_t source = t.lane ^ static_cast<uint32_t>(lanes);
  if (source > 31 || !(mask >> source & 1))
    fail("warp mask", "a shuffle at %s reads lane %u, which its mask 0x%08x does not name",
         describe(site).c_str(), source, mask);
  w.source[t.lane] = source;
  w.value[t.lane] = value;
  w.in_shuffle |= 1u << t.lane;
  if (w.in_shuffle != mask) {
    wait();
    return w.result[t.lane];
  }
  for (unsigned m = mask; m; m &= m - 1) {
    int lane = std::countr_zero(m);
    w.result[lane] = w.value[w.source[lane]];
  }
  w.in_shuffle = 0;
  set_ready(w, mask);
  yield_thread();
  return w.result[t.lane];
}

uint32_t atomic_add(uint32_t* address, uint32_t value, std::memory_order order, Site site) {
  Thread& t = record_site(site);
  if (next_random() & 1) yield_thread();
  if (kTrack) {
    track(reinterpret_cast<uintptr_t>(address), sizeof value, Access::kAtomic);
    Block& b = *t.block;
    ClockRef& released = state.released[address];
    if (order == std::memory_order_acquire || order == std::memory_order_acq_rel)
      t.clock = joined(t.clock, released);
    if (order == std::memory_order_release || order == std::memory_order_acq_rel) {
      auto mine = std::make_shared<Clock>();
      mine->add_block(b.index, b.last_barrier);
      mine->add_thread(t.id, b.now++);
      released = joined(joined(joined(mine, b.clock), t.clock), released);
    }
  }
  return std::exchange(*address, *address + value);
}

char* dynamic_shared() { return state.current->block->shared; }

}  // namespace emulator
