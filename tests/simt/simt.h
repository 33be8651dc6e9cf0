// Runs CUDA kernels on the CPU, every thread a fiber, and reports misuse. This is what the stand-in
// headers in include/ and the tests call. It has what the package's kernels use of CUDA, and no
// more: one dimension, whole warps, dynamic shared memory, counters that atomics add to. How to
// build with it: build.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>

extern "C" {

// Bytes are summed over every thread's accesses of global memory, so a value that a whole warp
// reads counts 32 times; the distinct_ members count each byte once per launch. Counted with
// callbacks only, except launches and max_dynamic_shared.
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
// Text of the last report, "" if the last launch was clean.
SIMT_API const char* simt_last_error();
}

#pragma GCC visibility push(hidden)
namespace simt {

using Site = std::source_location;

struct LaunchShape {
  unsigned grid, block;
  size_t dynamic_shared;
};

// Device side; all of these may switch to another fiber.
void block_barrier(Site site);
uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site);
void fence();
uint32_t atomic_add(uint32_t* address, uint32_t value, Site site);
char* dynamic_shared();

// Host side.
// A cudaError_t; runs the grid to its end. params is what body reads the arguments from.
int launch(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* params,
           size_t params_size);
int set_max_dynamic_shared(const void* kernel, int bytes);
int max_dynamic_shared(const void* kernel);
int device_attribute(int attr);
int take_last_error();

}  // namespace simt
#pragma GCC visibility pop
