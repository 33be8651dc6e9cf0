// Launches, and the interface to the tests.
#include "simt.h"

#include <link.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "include/simt_host.h"
#include "state.h"

#pragma GCC visibility push(hidden)
dim3 threadIdx, blockIdx, blockDim, gridDim;
#pragma GCC visibility pop

namespace simt {

Runtime* rt = nullptr;
Region stacks;

namespace {

constexpr size_t kSharedSlot = 512 << 10, kSharedGap = 128 << 10;
constexpr size_t kDefaultDynamicShared = 48 << 10;

void* reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return p == MAP_FAILED ? nullptr : p;
}

bool grow(Region& region, size_t bytes) {
  if (region.size >= bytes) return true;
  if (region.size) {
#if SIMT_ASAN
    // The marks of stacks would stay for whatever is mapped here next.
    ASAN_UNPOISON_MEMORY_REGION(reinterpret_cast<void*>(region.begin), region.size);
#endif
    munmap(reinterpret_cast<void*>(region.begin), region.size);
  }
  region.size = 0;
  void* p = reserve(bytes);
  if (!p) return false;
  region.begin = reinterpret_cast<uintptr_t>(p);
  region.size = bytes;
  return true;
}

int find_module(dl_phdr_info* info, size_t, void*) {
  auto here = reinterpret_cast<uintptr_t>(&rt);
  uintptr_t low = ~uintptr_t{0}, high = 0;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const auto& h = info->dlpi_phdr[i];
    if (h.p_type != PT_LOAD) continue;
    uintptr_t begin = info->dlpi_addr + h.p_vaddr;
    low = std::min<uintptr_t>(low, begin);
    high = std::max<uintptr_t>(high, begin + h.p_memsz);
  }
  if (here < low || here >= high) return 0;
  rt->module = {low, high - low};
  return 1;
}

void run_body() {
  entered();
  rt->body(rt->params);
  thread_exit();
}

void start(Block& b, uint32_t index) {
  b.index = index;
  b.live = rt->shape.block;
  b.interval = 1;
  b.arrived = 0;
  b.known = nullptr;
  b.shadow.reset();
  size_t bytes = rt->shape.dynamic_shared;
#if SIMT_ASAN
  std::free(b.shared);
  // Exactly as large as asked for, for ASan to see what lies beyond.
  void* exact = nullptr;
  if (bytes && posix_memalign(&exact, 128, bytes) != 0) std::abort();
  b.shared = static_cast<char*>(exact);
#else
  b.shared = reinterpret_cast<char*>(rt->shared_region.begin + b.slot * kSharedSlot + kSharedGap);
  b.shared_cells.assign((bytes + 3) / 4, Cell{});
#endif
  if (bytes) std::memset(b.shared, 0xff, bytes);
  b.threads.resize(rt->shape.block);
  b.warps.resize((rt->shape.block + 31) / 32);
  for (uint32_t i = 0; i < b.warps.size(); ++i) {
    uint32_t lanes = std::min(32u, rt->shape.block - i * 32);
    Warp& w = b.warps[i] = Warp{};
    w.threads = &b.threads[i * 32];
    w.all = lanes == 32 ? ~0u : (1u << lanes) - 1;
    set_ready(w, w.all);
  }
  for (uint32_t i = 0; i < rt->shape.block; ++i) {
    Thread& t = b.threads[i];
    size_t number = b.slot * rt->shape.block + i;
    char* stack = reinterpret_cast<char*>(stacks.begin) + number * kStackBytes;
    t = Thread{};
    t.warp = &b.warps[i / 32];
    t.block = &b;
    t.tid = i;
    t.lane = i % 32;
    t.id = index << 10 | i;
    prepare(t.context, stack, kStackBytes, number, run_body);
    std::memcpy(stack, &kCanary, 8);
  }
}

int check_shape(const void* kernel, const LaunchShape& s) {
  // The limit of blocks is the harness's own.
  if (s.grid == 0 || s.grid > 1u << 21 || s.block == 0 || s.block > kMaxThreads)
    return cudaErrorInvalidConfiguration;
  if (s.dynamic_shared > static_cast<size_t>(max_dynamic_shared(kernel)))
    return cudaErrorInvalidValue;
  return cudaSuccess;
}

void run_grid(uint32_t blocks) {
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (rt->shuffle)
    for (uint32_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  uint32_t next = 0;
  for (Block* b : rt->slots) start(*b, order[next++]);
  while (true) {
    if (Thread* t = pick_first()) {
      resume(*t);
      switch_context(rt->main, t->context, false);
    } else {
      report_stuck();
    }
    if (rt->failed) return;
    for (Block* b : rt->finished)
      if (next < blocks) start(*b, order[next++]);
    rt->finished.clear();
    bool live = std::any_of(rt->slots.begin(), rt->slots.end(), [](Block* b) { return b->live; });
    if (!live) return;
  }
}

void add(simt_counters_t& to, const simt_counters_t& from) {
  auto* a = reinterpret_cast<uint64_t*>(&to);
  auto* b = reinterpret_cast<const uint64_t*>(&from);
  uint64_t most = std::max(to.max_dynamic_shared, from.max_dynamic_shared);
  for (size_t i = 0; i < sizeof(to) / sizeof(*a); ++i) a[i] += b[i];
  to.max_dynamic_shared = most;
}

}  // namespace

Runtime& runtime() {
  static Runtime* once = rt = new Runtime;
  return *once;
}

void resume(Thread& t) {
  rt->current = &t;
  threadIdx = t.tid;
  blockIdx = t.block->index;
}

int launch(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* params,
           size_t params_size) {
  runtime();
  std::lock_guard lock(rt->mutex);
  rt->error.clear();
  if (int error = check_shape(kernel, shape)) return rt->last_error = error;
  rt->shape = shape;
  uint32_t resident = std::min(shape.grid, static_cast<uint32_t>(rt->resident));
  if (!grow(stacks, resident * shape.block * kStackBytes) ||
      !grow(rt->shared_region, resident * kSharedSlot))
    return rt->last_error = cudaErrorMemoryAllocation;
  dl_iterate_phdr(find_module, nullptr);
  rt->body = body;
  rt->params = params;
  rt->params_region = {reinterpret_cast<uintptr_t>(params), params_size};
  rt->last = {};
  rt->last.launches = 1;
  rt->last.max_dynamic_shared = shape.dynamic_shared;
  rt->random = (rt->seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  rt->seed = rt->random >> 1;  // another order at the next launch
  rt->failed = false;
  rt->active.clear();
  rt->finished.clear();
  while (rt->slots.size() < resident) rt->slots.push_back(new Block);
  while (rt->slots.size() > resident) {
    delete rt->slots.back();
    rt->slots.pop_back();
  }
  for (uint32_t i = 0; i < resident; ++i) rt->slots[i]->slot = i;
  gridDim = shape.grid;
  blockDim = shape.block;

  run_grid(shape.grid);

  rt->current = nullptr;
  rt->pages.count_distinct(rt->last.distinct_load_bytes, rt->last.distinct_store_bytes);
  rt->pages.reset();
  rt->global.reset();
  rt->channels.clear();
  add(rt->total, rt->last);
  return rt->last_error = rt->failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int device_attribute(int attr) {
  auto& set = runtime().attributes;
  if (auto at = set.find(attr); at != set.end()) return at->second;
  switch (attr) {
    case cudaDevAttrMaxSharedMemoryPerBlock:
      return kDefaultDynamicShared;
    case cudaDevAttrMultiProcessorCount:
      return 132;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      return 233472;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 232448;
    default:
      return 0;
  }
}

int set_max_dynamic_shared(const void* kernel, int bytes) {
  std::lock_guard lock(runtime().mutex);
  if (bytes < 0 || bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return rt->last_error = cudaErrorInvalidValue;
  rt->max_shared[kernel] = bytes;
  return cudaSuccess;
}

int max_dynamic_shared(const void* kernel) {
  auto at = runtime().max_shared.find(kernel);
  int limit = device_attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  return at == rt->max_shared.end() ? limit : std::max(limit, at->second);
}

int take_last_error() {
  std::lock_guard lock(runtime().mutex);
  return std::exchange(rt->last_error, 0);
}

}  // namespace simt

using simt::rt;
using simt::runtime;

void simt_seed(uint64_t seed) { runtime().seed = seed; }

void simt_set_attribute(int attr, int value) { runtime().attributes[attr] = value; }

void simt_options(int resident_blocks, int shuffle_blocks) {
  runtime().resident = std::max(1, resident_blocks);
  rt->shuffle = shuffle_blocks != 0;
}

void simt_reset_counters() {
  runtime().total = {};
  rt->last = {};
}

void simt_counters(simt_counters_t* out) { *out = runtime().total; }
void simt_last_counters(simt_counters_t* out) { *out = runtime().last; }
const char* simt_last_error() { return runtime().error.c_str(); }
