// Instrumentation of kernel loads and stores: checks bounds, alignment and races, and counts bytes.
#include <bit>

#include "state.h"

namespace emulator {

namespace {

// Linker symbols for the ends of this library's static memory, where accesses are not checked.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], _end[];

bool is_static(uintptr_t address) {
  return address >= reinterpret_cast<uintptr_t>(__ehdr_start) &&
         address < reinterpret_cast<uintptr_t>(_end);
}

Page& page_of(uintptr_t address) {
  uintptr_t number = address / Page::kBytes;
  auto& [recent, page] = state.recent_pages[number % state.recent_pages.size()];
  if (recent == number && page) return *page;
  auto& owner = state.pages[number];
  if (!owner) owner = std::make_unique<Page>();
  recent = number;
  page = owner.get();
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
  if (is_static(a) || state.params_region.has(a)) return;
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
  if (access == Access::kAtomic)
    fail("not supported by the emulator", "an atomic on shared memory");
  b.shadow.access(&b.shared_cells[offset / 4], a, size, access, t);
}

void count_distinct_bytes() {
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

// The host code of an instrumented file calls the hooks too, possibly in other threads of the
// process. Kernels are recognised by their stack.
bool is_kernel_access(uintptr_t address) {
  auto stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  return state.stacks.has(stack) && !state.stacks.has(address);
}

void on_access(void* p, size_t size, Access access) {
  auto a = reinterpret_cast<uintptr_t>(p);
  if (is_kernel_access(a)) track(a, size, access);
}

// Accesses of unknown alignment. In kernels, these are only to memory that threads do not share.
void on_bytes(void* p, size_t size, Access access) {
  for (size_t i = 0; i < size; ++i) on_access(static_cast<char*>(p) + i, 1, access);
}

}  // namespace

}  // namespace emulator

// With -fsanitize=thread, g++ inserts a call of these hooks at every load and store. Hidden
// visibility keeps them apart from those of other libraries in the process.
#define HOOK(name, check, size, access)                                 \
  extern "C" __attribute__((visibility("hidden"))) void __tsan_##name { \
    emulator::check(p, size, emulator::Access::access);                 \
  }
#define HOOKS_OF_SIZE(n)                               \
  HOOK(read##n(void* p), on_access, n, kRead)          \
  HOOK(write##n(void* p), on_access, n, kWrite)        \
  HOOK(unaligned_read##n(void* p), on_bytes, n, kRead) \
  HOOK(unaligned_write##n(void* p), on_bytes, n, kWrite)
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)
HOOK(read_range(void* p, unsigned long n), on_bytes, n, kRead)
HOOK(write_range(void* p, unsigned long n), on_bytes, n, kWrite)
extern "C" __attribute__((visibility("hidden"))) void __tsan_init() {}
