// The scheduler's state.
#pragma once

#include <cstdlib>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "clocks.h"
#include "fiber.h"
#include "include/simt_vector_types.h"
#include "shadow.h"
#include "simt.h"

#pragma GCC visibility push(hidden)
namespace simt {

inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = SIMT_ASAN ? 256 << 10 : 64 << 10;
inline constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11d;  // at each stack's end
inline constexpr bool kTrack = !SIMT_ASAN;

struct Warp;
struct Block;

struct Thread {
  Context context;
  Warp* warp;
  Block* block;
  uint32_t tid, lane;
  uint32_t id;  // block << 10 | tid
  Site site;    // of the last synchronisation

  uint32_t from;  // the lane that its shuffle reads

  uint32_t clock = 1;
  ClockRef known;    // beyond the block's
  ClockRef pending;  // becomes known at a fence
  FenceRef fence;
};

// Masks and arrays are of lanes; what each operation touches lies together here.
struct Warp {
  Thread* threads;
  uint32_t all, exited, ready, at_barrier, in_op;
  uint32_t active;  // place in Runtime::active
  uint64_t value[32], result[32];
};

struct Block {
  uint32_t index;
  uint32_t slot, live, interval;
  std::vector<Thread> threads;
  std::vector<Warp> warps;

  uint32_t arrived;
  Thread* first;  // to arrive

  ClockRef known;
  char* shared = nullptr;
  std::vector<Cell> shared_cells;
  Shadow shadow{Shadow::Kind::kShared};

  ~Block() {
    if (SIMT_ASAN) std::free(shared);
  }
};

struct Region {
  uintptr_t begin = 0;
  size_t size = 0;
  bool has(uintptr_t address) const { return address - begin < size; }
};

struct Runtime {
  std::mutex mutex;
  uint64_t seed = 0, random = 0;
  int resident = 4;
  bool shuffle = false;
  std::unordered_map<int, int> attributes;
  std::unordered_map<const void*, int> max_shared;
  std::string error;
  int last_error = 0;
  simt_counters_t total{}, last{};

  // Of the launch under way.
  LaunchShape shape;
  void (*body)(void*) = nullptr;
  void* params = nullptr;
  Region params_region, shared_region, module;
  std::vector<Block*> slots;
  std::vector<Warp*> active;
  std::vector<Block*> finished;
  Thread* current = nullptr;
  Context main;
  bool failed = false;
  Shadow global{Shadow::Kind::kGlobal};
  Pages pages;
  std::unordered_map<const void*, ClockRef> channels;
};

Runtime& runtime();
extern Runtime* rt;    // null before the first launch
extern Region stacks;  // of all fibers

inline uint32_t next_random() {
  uint64_t x = rt->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  rt->random = x;
  return static_cast<uint32_t>((x * 0x2545f4914f6cdd1dull) >> 32);
}

// Records the report and leaves the launch.
[[noreturn]] void fail(const char* kind, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
// The report alone.
void report(const Thread* t, const char* kind, const std::string& text);
// Not a std::string: fail does not return, so nothing would free it.
struct Text {
  char text[160];
  const char* c_str() const { return text; }
};
Text describe(const Site& site);
Text describe_thread(uint32_t id);
// The program counter of the access under way, for reports.
extern void* access_pc;

void set_ready(Warp& w, uint32_t lanes);
Thread* pick_first();
void resume(Thread& t);  // before a switch to it
void block_current();    // returns when woken
void yield_current();
void thread_exit();
void complete_barrier(Block& b);
void report_stuck();

// Order.
bool is_before(const Point& p, const Thread& t);
void track(uintptr_t address, size_t size, Access access);

}  // namespace simt
#pragma GCC visibility pop
