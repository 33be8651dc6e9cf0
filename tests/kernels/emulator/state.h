// The state of the emulator.
#pragma once

#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"
#include "fiber.h"
#include "races.h"

namespace emulator {

inline constexpr int kMaxThreads = 1024;
inline constexpr size_t kStackBytes = EMULATOR_ASAN ? 256 << 10 : 64 << 10;
inline constexpr uint64_t kCanary = 0x5ca1ab1e0ddba11d;  // at each stack's end
inline constexpr bool kTrack = !EMULATOR_ASAN;

struct Block;
struct Warp;

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

  ~Block() {
    if (EMULATOR_ASAN) std::free(shared);
  }
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
  std::unordered_map<int, int> attributes;
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
  void* access_pc = nullptr;                           // of the access under way
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
