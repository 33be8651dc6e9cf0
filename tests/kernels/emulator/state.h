// The state of the emulator.
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

// The stack will call entry, which must not return, at the first switch to it.
void prepare(Context& c, char* bottom, size_t size, size_t number, void (*entry)());
// What entry must call first.
void entered();
// last: nothing will switch back to from.
void switch_context(Context& from, Context& to, bool last);

// ---- who last wrote and read each byte, and what orders these accesses: races.cpp
// -----------------

enum class Access { kRead, kWrite, kAtomic };

// An access. A block's time advances at its barriers and at each release by one of its threads.
struct Moment {
  uint32_t thread;  // 1 + block << 10 | thread in the block; 0: nobody
  uint32_t time : 30;
  uint32_t several : 1;  // of other threads of the block too, since its last barrier
  uint32_t atomic : 1;

  uint32_t block() const { return (thread - 1) >> 10; }
};

// What a thread knows of other blocks: all accesses before a time, by block, and single threads'
// up to a time.
struct Clock {
  std::vector<uint32_t> blocks;
  std::map<uint32_t, uint32_t> threads;

  bool covers(const Moment& m) const;
  void add_block(uint32_t block, uint32_t before);
  void add_thread(uint32_t thread, uint32_t time);
  void join(const Clock& other);
};
using ClockRef = std::shared_ptr<const Clock>;

ClockRef joined(const ClockRef& a, const ClockRef& b);

// The accesses of four bytes, or of two. A third block's reading takes the place of the second's: a
// write that is ordered after those kept, and not after one forgotten, goes unnoticed.
struct Cell {
  Moment written;
  std::array<Moment, 2> read;   // by a block each
  std::array<Cell, 2>* halves;  // once a thread uses two of the four bytes
};

class Shadow {
 public:
  explicit Shadow(bool shared) : shared_(shared) {}
  // cells: those of the aligned four bytes at address on.
  void access(Cell* cells, uintptr_t address, size_t size, Access access, Thread& t);
  void reset() { halves_.clear(); }

 private:
  void check(Cell& c, uintptr_t address, Access access, Thread& t);
  [[noreturn]] void race(const char* mine, const char* theirs, const Moment& other,
                         uintptr_t address, const Thread& t);

  bool shared_;
  std::deque<std::array<Cell, 2>> halves_;
};

// ---- what runs ----------------------------------------------------------------------------------

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
  ClockRef known;  // beyond what the block knows
};

// Masks and arrays are of lanes; what each operation touches lies together here.
struct Warp {
  Thread* threads;
  uint32_t all, ended, ready, at_barrier, in_shuffle;
  uint32_t active;  // place in State::active
  uint32_t source[32];
  uint64_t value[32], result[32];
};

struct Block {
  uint32_t index, live = 0, arrived;
  uint32_t now, last_barrier;  // times
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  Thread* first;  // to arrive at the barrier
  ClockRef known;
  char* shared = nullptr;
  std::vector<Cell> shared_cells;
  Shadow shadow{true};
};

struct Region {
  uintptr_t begin = 0;
  size_t size = 0;
  bool has(uintptr_t address) const { return address - begin < size; }
};

// Of global memory that a launch has touched.
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
  // cudaDeviceAttr and values, at first an H100's.
  std::unordered_map<int, int> attributes{
      {8, 48 << 10}, {16, 132}, {75, 9}, {81, 233472}, {97, 232448}};
  std::unordered_map<const void*, int> max_shared;
  std::string error;
  int last_error = 0;
  emulator_counters_t counters{};

  // Of the launch under way.
  LaunchShape shape;
  void (*body)(void*) = nullptr;
  void* params = nullptr;
  Region stacks, params_region, shared_region;
  std::vector<std::unique_ptr<Block>> blocks;  // those resident
  std::vector<Warp*> active;                   // that can run
  Thread* current = nullptr;
  Context host;
  bool failed = false;
  Shadow global{false};
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
  std::array<std::pair<uintptr_t, Page*>, 256> recent_pages;
  std::unordered_map<const void*, ClockRef> released;  // by the counter that was added to
};
extern State state;

// threads.cpp
uint32_t next_random();
void set_ready(Warp& w, uint32_t lanes);
// Runs threads until a block ends or something is reported.
void run_threads();
void run_body();
// Records the report and leaves the launch.
[[noreturn]] void fail(const char* kind, const char* format, ...)
    __attribute__((format(printf, 2, 3)));
std::string describe_thread(uint32_t id);

// access.cpp
void track(uintptr_t address, size_t size, Access access);
// Adds what the launch touched to the counters, and forgets it.
void close_pages();

}  // namespace emulator
