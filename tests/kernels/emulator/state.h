// State of the emulator: fibers, vector clocks, threads, warps, blocks and memory.
#pragma once

#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMULATOR_ASAN 1
#else
#define EMULATOR_ASAN 0
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace emulator {

struct Block;
struct Warp;
struct Thread;

// ---- stacks: fiber.cpp --------------------------------------------------------------------------

struct Context {
#if defined(__x86_64__)
  void* sp;
#else
  ucontext_t context;
#endif
  const void* bottom;  // for AddressSanitizer
  size_t size;
};

// The first switch to the context calls `entry`, which must not return.
void make_context(Context& c, char* bottom, size_t size, size_t number, void (*entry)());
// `entry` must call this first.
void finish_first_switch();
// `last` means that nothing will switch back to `from`.
void switch_context(Context& from, Context& to, bool last);

// ---- vector clocks and the last accesses of each byte: races.cpp --------------------------------

enum class Access { kRead, kWrite, kAtomic };

// An access. A block's time advances at its barriers and at each release by one of its threads.
struct Event {
  uint32_t thread;  // Thread::id; 0 if there was no access
  uint32_t time : 30;
  uint32_t several : 1;  // other threads of the block did the same since its last barrier
  uint32_t atomic : 1;

  uint32_t block() const { return (thread - 1) >> 10; }
};

// A vector clock: the accesses that happen before. For a block, all accesses before a time; for a
// thread, its accesses up to a time.
struct Clock {
  std::vector<uint32_t> blocks;
  std::map<uint32_t, uint32_t> threads;

  bool covers(const Event& m) const;
  void add_block(uint32_t block, uint32_t before);
  void add_thread(uint32_t thread, uint32_t time);
  void join(const Clock& other);
};
using ClockRef = std::shared_ptr<const Clock>;

ClockRef joined(const ClockRef& a, const ClockRef& b);

// The last accesses of four bytes, or of two. Only the reads of two blocks are stored: a race with
// a read that was replaced is not detected.
struct Cell {
  Event written;
  std::array<Event, 2> read;    // of two different blocks
  std::array<Cell, 2>* halves;  // not null once a thread accessed fewer than four bytes
};

class Shadow {
 public:
  explicit Shadow(bool shared) : shared_(shared) {}
  // `cells` starts with the cell of the aligned four bytes at `address`.
  void access(Cell* cells, uintptr_t address, size_t size, Access access, Thread& t);
  void reset() { halves_.clear(); }

 private:
  void check(Cell& c, uintptr_t address, Access access, Thread& t);
  [[noreturn]] void race(const char* mine, const char* theirs, const Event& other,
                         uintptr_t address, const Thread& t);

  bool shared_;
  std::deque<std::array<Cell, 2>> halves_;
};

// ---- threads, warps and blocks ------------------------------------------------------------------

inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = EMULATOR_ASAN ? 256 << 10 : 64 << 10;
inline constexpr bool kTrack = !EMULATOR_ASAN;

struct Thread {
  Context context;
  Warp* warp;
  Block* block;
  uint32_t index, lane;
  uint32_t id;     // 1 + block << 10 | index
  Site site;       // of the last synchronisation
  ClockRef clock;  // in addition to the block's
};

// Masks and arrays are indexed by lane.
struct Warp {
  Thread* threads;
  uint32_t all, ended, ready, at_barrier, in_shuffle;
  uint32_t ready_index;  // in State::ready_warps
  uint32_t source[32];
  uint64_t value[32], result[32];
};

struct Block {
  uint32_t index, live = 0, arrived;
  uint32_t now, last_barrier;  // times
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* first_arrived;  // at the barrier
  ClockRef clock;
  char* shared = nullptr;
  std::vector<Cell> shared_cells;
  Shadow shadow{true};
};

struct Region {
  uintptr_t begin = 0;
  size_t size = 0;
  bool has(uintptr_t address) const { return address - begin < size; }
};

// A page of global memory that a launch has accessed.
struct Page {
  static constexpr uintptr_t kBytes = 4096;
  std::array<Cell, kBytes / 4> cells;
  std::array<uint64_t, kBytes / 64> loaded, stored;  // a bit per byte
};

struct State {
  std::mutex mutex;
  uint64_t seed = 0, random = 0;
  int resident = 4;
  bool shuffle = false;
  // Values by cudaDeviceAttr; the defaults are an H100's.
  std::unordered_map<int, int> attributes{
      {8, 48 << 10}, {16, 132}, {75, 9}, {81, 233472}, {97, 232448}};
  std::unordered_map<const void*, int> max_shared;
  std::string error;
  int last_error = 0;
  emulator_counters_t counters{};

  // The current launch.
  LaunchShape shape;
  void (*body)(void*) = nullptr;
  void* params = nullptr;
  Region stacks, params_region, shared_region;
  std::vector<std::unique_ptr<Block>> blocks;  // resident blocks
  std::vector<Warp*> ready_warps;              // warps with a ready thread
  Thread* current = nullptr;
  Context host;
  bool failed = false;
  Shadow global{false};
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::array<std::pair<uintptr_t, Page*>, 256> recent_pages;
  std::unordered_map<const void*, ClockRef> released;  // by the address of the atomic
};
extern State state;

// threads.cpp
uint32_t next_random();
void set_ready(Warp& w, uint32_t lanes);
// Runs threads until a block ends or an error is reported.
void run_threads();
void run_body();
// Reports an error and aborts the launch.
[[noreturn]] void fail(const char* kind, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
std::string describe_thread(uint32_t id);

// access.cpp
void track(uintptr_t address, size_t size, Access access);
// Adds the launch's distinct bytes to the counters, and clears the pages.
void count_distinct_bytes();

}  // namespace emulator
