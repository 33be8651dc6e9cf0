// Runs CUDA kernels on the CPU, every thread a fiber, and reports misuse. This is what the stand-in
// headers in include/ and the tests call. How to build with it:
// tests/test_simt_harness.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

extern "C" {

// Bytes are summed over every thread's accesses of global memory, so a value that a whole warp
// reads counts 32 times; the distinct_ members count each byte once per launch. Counted in mode A
// only, except launches and max_dynamic_shared.
struct simt_counters_t {
  uint64_t launches;
  uint64_t load_bytes;
  uint64_t store_bytes;
  uint64_t atomic_bytes;
  uint64_t atomics;
  uint64_t loads[5];   // of 1, 2, 4, 8 and 16 bytes
  uint64_t stores[5];  // likewise
  uint64_t distinct_load_bytes;
  uint64_t distinct_store_bytes;  // atomics included
  uint64_t max_dynamic_shared;
  uint64_t shared_accesses;
  uint64_t sync_points;
};

#define SIMT_API __attribute__((visibility("default")))
SIMT_API void simt_seed(uint64_t seed);
// attr: a cudaDeviceAttr.
SIMT_API void simt_set_attribute(int attr, int value);
SIMT_API void simt_options(int resident_blocks, int shuffle_blocks);
SIMT_API void simt_reset_counters();
// Totals since the reset, and the last launch alone.
SIMT_API void simt_counters(simt_counters_t* out);
SIMT_API void simt_last_counters(simt_counters_t* out);
// Names of the kernels launched since the reset, one a line, where known.
SIMT_API const char* simt_kernels();
// Text of the last report, "" if the last launch was clean.
SIMT_API const char* simt_last_error();
}

#pragma GCC visibility push(hidden)
namespace simt {

using Site = std::source_location;

enum class BarrierKind { kPlain, kOr, kAnd, kCount };
enum class WarpKind { kSync, kShfl, kUp, kDown, kXor, kBallot, kAny, kAll, kAdd, kMin, kMax };

struct LaunchShape {
  unsigned grid[3];
  unsigned block[3];
  size_t dynamic_shared;
  bool cooperative;
};

// Device side; all of these may switch to another fiber.
int block_barrier(BarrierKind kind, int predicate, Site site);
void named_barrier_sync(int id, int count, Site site = Site::current());
void named_barrier_arrive(int id, int count, Site site = Site::current());
uint64_t warp_op(WarpKind kind, unsigned mask, uint64_t value, int arg, int width, Site site);
void fence(bool device_scope);
// Before a load that may meet other threads' stores (__ldcv, volatile).
void poll(const void* address, size_t size, Site site);
// Around a read-modify-write.
void atomic_begin(const void* address, size_t size, Site site);
void atomic_end(const void* address, bool changed);
void nanosleep(Site site);
[[noreturn]] void trap(Site site);
unsigned active_mask();
char* dynamic_shared();

// Host side.
void label(const char* next_kernel);
// A cudaError_t; runs the grid to its end. params is what body reads the arguments from.
int launch(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* params,
           size_t params_size);
int set_max_dynamic_shared(const void* kernel, int bytes);
int max_dynamic_shared(const void* kernel);
int device_attribute(int attr);
int occupancy(int threads, size_t dynamic_shared);
int take_last_error(bool clear);

}  // namespace simt
#pragma GCC visibility pop
