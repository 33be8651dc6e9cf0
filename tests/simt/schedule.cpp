// Which fiber runs next, and the reports.
#include <dlfcn.h>

#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "state.h"

namespace simt {

namespace {

// Null if none can run. Favours the current warp, whose stacks the cache holds.
Thread* pick(Thread* t) {
  if (rt->active.empty()) return nullptr;
  uint32_t random = next_random();
  Warp* w =
      t && t->warp->ready && random >> 29 ? t->warp : rt->active[(random >> 5) % rt->active.size()];
  uint32_t from = random & 31;
  uint32_t lane =
      (static_cast<uint32_t>(std::countr_zero(std::rotr(w->ready, static_cast<int>(from)))) +
       from) &
      31;
  return w->threads + lane;
}

void unready(Thread& t) {
  Warp& w = *t.warp;
  w.ready &= ~(1u << t.lane);
  if (w.ready) return;
  Warp* last = rt->active.back();
  rt->active[w.active] = last;
  last->active = w.active;
  rt->active.pop_back();
}

void leave_to(Thread& from, Thread* to, bool last) {
  if (!to) {
    rt->current = nullptr;
    switch_context(from.context, rt->main, last);
    return;
  }
  if (to == &from) return;
  resume(*to);
  switch_context(from.context, to->context, last);
}

}  // namespace

void set_ready(Warp& w, uint32_t lanes) {
  if (!w.ready) {
    w.active = static_cast<uint32_t>(rt->active.size());
    rt->active.push_back(&w);
  }
  w.ready |= lanes;
}

void block_current() {
  Thread& t = *rt->current;
  unready(t);
  leave_to(t, pick(&t), false);
}

void yield_current() {
  Thread& t = *rt->current;
  leave_to(t, pick(&t), false);
}

Thread* pick_first() { return pick(nullptr); }

void thread_exit() {
  Thread& t = *rt->current;
  Block& b = *t.block;
  uint64_t canary;
  std::memcpy(&canary, t.context.bottom, 8);
  if (canary != kCanary) fail("stack overflow", "more than %zu bytes", kStackBytes);
  t.warp->exited |= 1u << t.lane;
  unready(t);
  --b.live;
  if (t.warp->in_op) {
    const Thread& o = t.warp->threads[std::countr_zero(t.warp->in_op)];
    fail("warp mask", "this thread ended while lane %u waits for it at %s", o.lane,
         describe(o.site).c_str());
  }
  complete_barrier(b);
  if (b.live == 0) {
    rt->finished.push_back(&b);
    leave_to(t, nullptr, true);
  }
  leave_to(t, pick(&t), true);
  __builtin_unreachable();
}

Text describe(const Site& site) {
  const char* slash = std::strrchr(site.file_name(), '/');
  Text out;
  std::snprintf(out.text, sizeof out.text, "%s:%u", slash ? slash + 1 : site.file_name(),
                static_cast<unsigned>(site.line()));
  return out;
}

Text describe_thread(uint32_t id) {
  Text out;
  std::snprintf(out.text, sizeof out.text, "block %u thread %u", id >> 10, id & 1023);
  return out;
}

void report(const Thread* t, const char* kind, const std::string& text) {
  if (rt->failed) return;
  rt->failed = true;
  rt->error = std::string("simt: ") + kind + ": " + text;
  if (t) rt->error += std::string(", ") + describe_thread(t->id).c_str();
  Dl_info info;
  if (access_pc && dladdr(access_pc, &info)) {
    char place[64];
    // addr2line finds the call at the address before the one it returns to.
    std::snprintf(place, sizeof place, "+0x%zx",
                  static_cast<size_t>(static_cast<char*>(access_pc) -
                                      static_cast<char*>(info.dli_fbase) - 1));
    rt->error += std::string(", at ") + info.dli_fname + place;
  }
  if (t && t->site.line())
    rt->error += std::string(", last synchronised at ") + describe(t->site).c_str();
  access_pc = nullptr;
}

void fail(const char* kind, const char* format, ...) {
  char text[512];
  va_list args;
  va_start(args, format);
  std::vsnprintf(text, sizeof text, format, args);
  va_end(args);
  Thread& t = *rt->current;
  report(&t, kind, text);
  switch_context(t.context, rt->main, true);
  __builtin_unreachable();
}

// A barrier completes once no thread runs. What is left waits in a shuffle for lanes at a barrier.
void report_stuck() {
  for (const Block* b : rt->slots) {
    for (const Warp& w : b->warps) {
      if (!w.in_op) continue;
      const Thread& t = w.threads[std::countr_zero(w.in_op)];
      const Thread& o = w.threads[std::countr_zero(w.at_barrier)];
      std::string text = std::string("it waits in a shuffle at ") + describe(t.site).c_str();
      text += std::string(" while lane ") + std::to_string(o.lane) + " waits at __syncthreads, ";
      return report(&t, "warp mask", text + describe(o.site).c_str());
    }
  }
}

}  // namespace simt
