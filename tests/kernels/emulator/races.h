// Who last wrote and read each byte, and what orders these accesses.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <vector>

namespace emulator {

struct Thread;

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

}  // namespace emulator
