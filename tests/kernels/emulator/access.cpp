// Every load and store of a kernel: bounds, alignment, races, and what they move.
#include <bit>

#include "state.h"

namespace emulator {

namespace {

// The library's own memory, which is not watched: the linker's names for its ends.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

bool is_own(uintptr_t address) {
  return address >= reinterpret_cast<uintptr_t>(__ehdr_start) &&
         address < reinterpret_cast<uintptr_t>(_end);
}

Page& page_of(uintptr_t address) {
  uintptr_t number = address / Page::kBytes;
  auto& [known, page] = state.recent_pages[number % state.recent_pages.size()];
  if (known == number && page) return *page;
  auto& kept = state.pages[number];
  if (!kept) kept = std::make_unique<Page>();
  known = number;
  page = kept.get();
  return *page;
}

void count(Page& page, uintptr_t at, size_t size, Access access) {
  emulator_counters_t& c = state.counters;
  bool read = access == Access::kRead;
  if (access == Access::kAtomic) {
    ++c.atomics;
  } else {
    (read ? c.load_bytes : c.store_bytes) += size;
    ++(read ? c.loads : c.stores)[std::countr_zero(size)];
  }
  (read ? page.loaded : page.stored)[at / 64] |= ((1ull << size) - 1) << at % 64;
}

}  // namespace

void track(uintptr_t a, size_t size, Access access) {
  if (is_own(a) || state.params_region.has(a)) return;
  if (a & (size - 1)) fail("misaligned access", "%zu bytes at 0x%zx", size, a);
  Thread& t = *state.current;
  if (!state.shared_region.has(a)) {
    Page& page = page_of(a);
    uintptr_t at = a % Page::kBytes;
    count(page, at, size, access);
    state.global.access(&page.cells[at / 4], a, size, access, t);
    return;
  }
  Block& b = *t.block;
  size_t offset = a - reinterpret_cast<uintptr_t>(b.shared), bytes = state.shape.dynamic_shared;
  if (offset >= bytes || size > bytes - offset)
    fail("out of bounds of shared memory", "%zu bytes at offset %td of %zu", size,
         static_cast<ptrdiff_t>(offset), bytes);
  if (access == Access::kAtomic) fail("unknown to the emulator", "an atomic on shared memory");
  b.shadow.access(&b.shared_cells[offset / 4], a, size, access, t);
}

void close_pages() {
  for (const auto& [number, page] : state.pages) {
    for (uint64_t bits : page->loaded)
      state.counters.distinct_load_bytes += static_cast<uint64_t>(std::popcount(bits));
    for (uint64_t bits : page->stored)
      state.counters.distinct_store_bytes += static_cast<uint64_t>(std::popcount(bits));
  }
  state.pages.clear();
  state.recent_pages.fill({});
}

namespace {

// Host code of an instrumented file comes here as well, perhaps in other threads of the process:
// only the stack tells.
bool is_watched(uintptr_t address) {
  auto stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  return state.stacks.has(stack) && !state.stacks.has(address);
}

void touch(void* p, size_t size, Access access) {
  auto a = reinterpret_cast<uintptr_t>(p);
  if (is_watched(a)) track(a, size, access);
}

// Of unknown alignment, which kernels have only for what they do not share.
void touch_range(void* p, size_t size, Access access) {
  for (size_t i = 0; i < size; ++i) touch(static_cast<char*>(p) + i, 1, access);
}

}  // namespace

}  // namespace emulator

// g++ -fsanitize=thread makes kernels call these at each load and store. Hidden, so that they bind
// within this library, whatever else the process holds.
#define ON(name, check, size, access)                                   \
  extern "C" __attribute__((visibility("hidden"))) void __tsan_##name { \
    emulator::check(p, size, emulator::Access::access);                 \
  }
#define ON_SIZE(n)                                      \
  ON(read##n(void* p), touch, n, kRead)                 \
  ON(write##n(void* p), touch, n, kWrite)               \
  ON(unaligned_read##n(void* p), touch_range, n, kRead) \
  ON(unaligned_write##n(void* p), touch_range, n, kWrite)
ON_SIZE(1)
ON_SIZE(2)
ON_SIZE(4)
ON_SIZE(8)
ON_SIZE(16)
ON(read_range(void* p, unsigned long n), touch_range, n, kRead)
ON(write_range(void* p, unsigned long n), touch_range, n, kWrite)
extern "C" __attribute__((visibility("hidden"))) void __tsan_init() {}
