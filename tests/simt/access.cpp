#include "access.h"

#include <bit>

#include "state.h"

namespace simt {

void* access_pc = nullptr;

namespace {

// Host code of an instrumented file comes here as well, perhaps in other OS threads: only the stack
// tells.
inline bool in_fiber() {
  return stacks.has(reinterpret_cast<uintptr_t>(__builtin_frame_address(0)));
}

enum class Space { kIgnored, kShared, kGlobal };

Space classify(uintptr_t a) {
  if (rt->shared_region.has(a)) return Space::kShared;
  if (rt->module.has(a) || rt->params_region.has(a)) return Space::kIgnored;
  return Space::kGlobal;
}

// The low bits: shared memory is aligned to more than 16.
void check_aligned(uintptr_t a, size_t size) {
  if (a & (size - 1)) fail("misaligned access", "%zu bytes at 0x%zx", size, static_cast<size_t>(a));
}

Page& count_global(uintptr_t a, size_t size, Access access) {
  simt_counters_t& c = rt->last;
  int bucket = std::countr_zero(size);
  if (access == Access::kRead) {
    c.load_bytes += size;
    ++c.loads[bucket];
  } else if (access == Access::kWrite) {
    c.store_bytes += size;
    ++c.stores[bucket];
  } else {
    c.atomic_bytes += size;
    ++c.atomics;
  }
  Page& page = rt->pages.at(a);
  auto& bits = access == Access::kRead ? page.loaded : page.stored;
  uintptr_t at = a % Page::kBytes;
  bits[at / 64] |= ((1ull << size) - 1) << at % 64;
  return page;
}

void shared_access(uintptr_t a, size_t size, Access access, Thread& t) {
  Block& b = *t.block;
  uintptr_t offset = a - reinterpret_cast<uintptr_t>(b.shared);
  if (offset >= rt->shape.dynamic_shared || size > rt->shape.dynamic_shared - offset)
    fail("out of bounds of shared memory", "%zu bytes at offset %td of %zu", size,
         static_cast<ptrdiff_t>(offset), rt->shape.dynamic_shared);
  b.shadow.access(&b.shared_cells[offset / 4], a, size, access, t);
}

}  // namespace

void track(uintptr_t a, size_t size, Access access) {
  Thread& t = *rt->current;
  switch (classify(a)) {
    case Space::kIgnored:
      return;
    case Space::kShared:
      if (access == Access::kAtomic) fail("unknown to the harness", "an atomic on shared memory");
      check_aligned(a, size);
      shared_access(a, size, access, t);
      return;
    case Space::kGlobal:
      check_aligned(a, size);
      rt->global.access(&count_global(a, size, access).cells[a % Page::kBytes / 4], a, size, access,
                        t);
  }
}

void touch(void* p, size_t size, Access access, void* pc) {
  auto a = reinterpret_cast<uintptr_t>(p);
  if (stacks.has(a) || !in_fiber()) return;
  access_pc = pc;
  track(a, size, access);
  access_pc = nullptr;
}

void touch_range(void* p, size_t size, Access access, void* pc) {
  auto a = reinterpret_cast<uintptr_t>(p);
  if (stacks.has(a) || !in_fiber()) return;
  access_pc = pc;
  while (size) {
    size_t piece = a & 15 ? size_t{1} << std::countr_zero(a & 15) : 16;
    while (piece > size) piece /= 2;
    track(a, piece, access);
    a += piece;
    size -= piece;
  }
  access_pc = nullptr;
}

}  // namespace simt
