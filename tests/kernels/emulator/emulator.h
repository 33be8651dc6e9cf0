// Runs CUDA kernels on the CPU, every thread a fiber, and reports misuse: what the stand-ins for
// CUDA's headers (include/) and the tests call. It has what the package's kernels use of CUDA, and
// no more: one dimension, whole warps, dynamic shared memory, counters that atomics add to.
// tests/support/cuda_emulator.py builds it together with the kernels.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <source_location>

extern "C" {

// Bytes are summed over every thread's accesses of global memory, so a value that a whole warp
// reads counts 32 times; the distinct_ members count each byte once per launch.
struct emulator_counters_t {
  uint64_t launches;
  uint64_t load_bytes, store_bytes, atomics;
  uint64_t loads[5], stores[5];                        // of 1, 2, 4, 8 and 16 bytes
  uint64_t distinct_load_bytes, distinct_store_bytes;  // atomics included
  uint64_t max_dynamic_shared;
};

#define EMULATOR_API __attribute__((visibility("default")))
// So many blocks are resident at a time, and start in ascending order, of odd seeds shuffled.
EMULATOR_API void emulator_schedule(uint64_t seed, int resident_blocks);
// attribute: a cudaDeviceAttr.
EMULATOR_API void emulator_set_attribute(int attribute, int value);
// Returns the totals since the last call.
EMULATOR_API void emulator_take_counters(emulator_counters_t* out);
// Text of the last report, "" if the last launch was clean.
EMULATOR_API const char* emulator_last_error();
}

namespace emulator {

using Site = std::source_location;

struct LaunchShape {
  unsigned grid, block;
  size_t dynamic_shared;
};

// For the device; all of these may switch to another fiber.
void block_barrier(Site site);
uint64_t shuffle_xor(unsigned mask, uint64_t value, int lanes, Site site);
uint32_t atomic_add(uint32_t* address, uint32_t value, std::memory_order order,
                    Site site = Site::current());
char* dynamic_shared();

// For the host. Runs the grid to its end; body reads the kernel's arguments from params.
int launch(const void* kernel, const LaunchShape& shape, void (*body)(void*), void* params,
           size_t params_size);
int set_max_dynamic_shared(const void* kernel, int bytes);
int device_attribute(int attribute);
int take_last_error();

}  // namespace emulator
