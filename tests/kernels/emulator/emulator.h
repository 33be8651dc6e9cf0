// The interface of the CUDA emulator, which runs kernels on the CPU with a fiber per thread, and
// reports their errors. It supports only the CUDA features that the kernels use: one-dimensional
// grids, __syncthreads, xor shuffles of whole warps, dynamic shared memory, and atomic additions.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <source_location>

extern "C" {

// Counts accesses to global memory per thread, so a value that a whole warp reads counts 32 times.
// The distinct_ members count each byte once per launch.
struct emulator_counters_t {
  uint64_t launches;
  uint64_t load_bytes, store_bytes, atomics;
  uint64_t loads[5], stores[5];                        // of 1, 2, 4, 8 and 16 bytes
  uint64_t distinct_load_bytes, distinct_store_bytes;  // atomics included
  uint64_t max_dynamic_shared;
};

#define EMULATOR_API __attribute__((visibility("default")))
// Runs `resident_blocks` blocks at a time. Blocks start in ascending order, or shuffled if the seed
// is odd.
EMULATOR_API void emulator_schedule(uint64_t seed, int resident_blocks);
// `attribute` is a cudaDeviceAttr.
EMULATOR_API void emulator_set_attribute(int attribute, int value);
// Writes the totals since the last call.
EMULATOR_API void emulator_take_counters(emulator_counters_t* out);
// Returns the error of the last launch, or "".
EMULATOR_API const char* emulator_last_error();
}

namespace emulator {

using Site = std::source_location;

struct LaunchShape {
  unsigned grid, block;
  size_t dynamic_shared;
};

// Device functions. All except dynamic_shared may switch to another fiber.
void block_barrier(Site site);
uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site);
uint32_t atomic_add(uint32_t* address, uint32_t value, std::memory_order order,
                    Site site = Site::current());
char* dynamic_shared();

// Host functions. launch() runs the whole grid; `body` reads the kernel's arguments from `params`.
int launch(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* params,
           size_t params_size);
int set_max_dynamic_shared(const void* kernel, int bytes);
int device_attribute(int attribute);
int take_last_error();

}  // namespace emulator
