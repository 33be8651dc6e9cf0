// Launches, device attributes, and the interface for the tests.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "include/cuda_runtime.h"
#include "state.h"

namespace emulator {

namespace {

constexpr size_t kSharedSlot = 512 << 10, kSharedGap = 128 << 10;
constexpr int kMaxResident = 16;

Region reserve(size_t bytes) {
  void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) std::abort();
  return {reinterpret_cast<uintptr_t>(p), bytes};
}

void start_block(Block& b, size_t slot, uint32_t index) {
  const LaunchShape& shape = state.shape;
  b.index = index;
  b.live = shape.block;
  b.now = b.last_barrier = 1;
  b.arrived = 0;
  b.clock = nullptr;
  b.shadow.reset();
  size_t bytes = shape.dynamic_shared;
  b.shared = reinterpret_cast<char*>(state.shared_region.begin + slot * kSharedSlot + kSharedGap);
  b.shared_cells.assign((bytes + 3) / 4, Cell{});
  if (bytes) std::memset(b.shared, 0xff, bytes);
  b.threads.resize(shape.block);
  b.warps.resize((shape.block + 31) / 32);
  for (uint32_t i = 0; i < b.warps.size(); ++i) {
    Warp& w = b.warps[i] = Warp{};
    w.threads = &b.threads[i * 32];
    w.all = ~0u >> (32 - std::min(32u, shape.block - i * 32));
    set_ready(w, w.all);
  }
  for (uint32_t i = 0; i < shape.block; ++i) {
    size_t number = slot * shape.block + i;
    char* stack = reinterpret_cast<char*>(state.stacks.begin) + number * kStackBytes;
    Thread& t = b.threads[i] = Thread{};
    t.warp = &b.warps[i / 32];
    t.block = &b;
    t.index = i;
    t.lane = i % 32;
    t.id = 1 + (index << 10 | i);
    make_context(t.context, stack, kStackBytes, number, run_body);
  }
}

void run_grid() {
  uint32_t blocks = state.shape.grid, next = 0;
  std::vector<uint32_t> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (state.shuffle)
    for (uint32_t i = blocks; i > 1; --i) std::swap(order[i - 1], order[next_random() % i]);
  while (!state.failed) {
    bool live = false;
    for (size_t slot = 0; slot < state.blocks.size(); ++slot) {
      Block& b = *state.blocks[slot];
      if (!b.live && next < blocks) start_block(b, slot, order[next++]);
      live |= b.live > 0;
    }
    if (!live) return;
    run_threads();
  }
}

cudaError_t prepare_launch(const void* kernel, const LaunchShape& shape) {
  int max_shared =
      std::max(device_attribute(cudaDevAttrMaxSharedMemoryPerBlock), state.max_shared[kernel]);
  // CUDA allows more blocks, but Thread::id has 32 bits for block and thread.
  if (shape.grid == 0 || shape.grid >= 1u << 21 || shape.block == 0 || shape.block > kMaxThreads ||
      shape.dynamic_shared > static_cast<size_t>(max_shared))
    return cudaErrorInvalidValue;
  size_t resident = std::min(shape.grid, static_cast<uint32_t>(state.resident));
  if (state.stacks.size == 0) {
    state.stacks = reserve(kMaxResident * kMaxThreads * kStackBytes);
    state.shared_region = reserve(kMaxResident * kSharedSlot);
  }
  state.shape = shape;
  state.random = (state.seed + 1) * 0x9e3779b97f4a7c15ull | 1;
  state.seed = state.random >> 1;  // the next launch gets another order
  state.failed = false;
  state.ready_warps.clear();
  state.blocks.resize(resident);
  for (auto& b : state.blocks) {
    if (!b) b = std::make_unique<Block>();
    b->live = 0;
  }
  return cudaSuccess;
}

}  // namespace

int launch(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* params,
           size_t params_size) {
  std::lock_guard lock(state.mutex);
  state.error.clear();
  if (int error = prepare_launch(kernel, shape)) return state.last_error = error;
  state.body = body;
  state.params = params;
  state.params_region = {reinterpret_cast<uintptr_t>(params), params_size};
  run_grid();
  count_distinct_bytes();
  state.global.reset();
  state.released.clear();
  uint64_t& max_shared = state.counters.max_dynamic_shared;
  max_shared = std::max(max_shared, uint64_t{shape.dynamic_shared});
  ++state.counters.launches;
  return state.last_error = state.failed ? cudaErrorLaunchFailure : cudaSuccess;
}

int device_attribute(int attribute) { return state.attributes.at(attribute); }

int set_max_dynamic_shared(const void* kernel, int bytes) {
  std::lock_guard lock(state.mutex);
  if (bytes < 0 || bytes > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin))
    return state.last_error = cudaErrorInvalidValue;
  state.max_shared[kernel] = bytes;
  return cudaSuccess;
}

int take_last_error() {
  std::lock_guard lock(state.mutex);
  return std::exchange(state.last_error, 0);
}

}  // namespace emulator

using emulator::state;

void emulator_schedule(uint64_t seed, int resident_blocks) {
  state.seed = seed;
  state.shuffle = seed % 2 == 1;
  state.resident = std::min(resident_blocks, emulator::kMaxResident);
}

void emulator_set_attribute(int attribute, int value) { state.attributes[attribute] = value; }

void emulator_take_counters(emulator_counters_t* out) { *out = std::exchange(state.counters, {}); }

const char* emulator_last_error() { return state.error.c_str(); }
