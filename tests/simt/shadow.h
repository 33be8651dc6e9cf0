// Who last wrote and read each byte.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "clocks.h"

#pragma GCC visibility push(hidden)
namespace simt {

struct Thread;

enum class Access { kRead, kWrite, kAtomic };

// Lanes of a warp that read in one interval, and the latest of their clocks.
struct Reader {
  uint32_t warp, mask, interval, clock;
};

// Of four bytes, or of one where threads use parts of four bytes.
struct Cell {
  uint32_t writer;  // its id + 1; 0: nobody
  uint32_t interval, clock;
  uint32_t atomic;
  Reader reader;
  uint32_t more;   // 1 + place in Shadow::more
  uint32_t split;  // 1 + place in Shadow::split
};

class Shadow {
 public:
  enum class Kind { kShared, kGlobal };

  explicit Shadow(Kind kind) : kind_(kind) {}
  // cells: those of the aligned four bytes at address on. size bytes need not be whole cells.
  void access(Cell* cells, uintptr_t address, size_t size, Access access, Thread& t);
  void reset();

 private:
  void check(Cell& c, uintptr_t address, Access access, Thread& t);
  void check_readers(Cell& c, uintptr_t address, Thread& t);
  void record_read(Cell& c, Thread& t);
  void split(Cell& c);
  [[noreturn]] void race(const char* mine, const char* theirs, uint32_t id, uintptr_t address,
                         Thread& t);

  Kind kind_;
  std::vector<std::vector<Reader>> more_;
  uint32_t more_used_ = 0;
  std::vector<std::array<Cell, 4>> split_;
  std::vector<uint32_t> split_free_;
};

struct Page {
  static constexpr uintptr_t kBytes = 4096;
  std::array<Cell, kBytes / 4> cells;
  std::array<uint64_t, kBytes / 64> loaded, stored;  // a bit per byte
};

// The pages of global memory that a launch has touched.
class Pages {
 public:
  Page& at(uintptr_t address);
  void count_distinct(uint64_t& loaded, uint64_t& stored) const;
  void reset();

 private:
  struct Slot {
    uintptr_t number;
    Page* page;
  };
  std::array<Slot, 256> recent_{};
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<std::unique_ptr<Page>> spare_;
};

}  // namespace simt
#pragma GCC visibility pop
