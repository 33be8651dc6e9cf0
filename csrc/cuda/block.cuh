// What the threads of a block do together: sums, and handing work on to other blocks.
#pragma once

#include <cuda_runtime.h>

#include "params.h"

namespace at_fused {

#if defined(AT_FUSED_EMULATED)
#define AT_FUSED_DYNAMIC_SHARED(name) char* name = emulator::dynamic_shared()
#else
#define AT_FUSED_DYNAMIC_SHARED(name) extern __shared__ __align__(16) char name[]
#endif

constexpr int kWarps = kThreads / 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// The first bytes of every block's shared memory.
struct Control {
  double sums[3 * kWarps];
  double maps[12];  // loss.cu: SampleMaps
  int broadcast;
};
static_assert(sizeof(Control) <= kControlBytes);

// The sum over the block of each of n values, the same bits in every thread.
template <int n>
__device__ void block_sum(double (&value)[n], Control& control) {
  static_assert(n <= 3);
  __syncthreads();  // the last sums may still be read
#pragma unroll
  for (int i = 0; i < n; ++i) {
    for (int d = 16; d > 0; d /= 2) value[i] += __shfl_xor_sync(kAllLanes, value[i], d);
    if (threadIdx.x % 32 == 0) control.sums[threadIdx.x / 32 * n + i] = value[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < n; ++i) {
    value[i] = 0;
    for (int warp = 0; warp < kWarps; ++warp) value[i] += control.sums[warp * n + i];
  }
}

// The value of thread 0. Between two of these there is a barrier: the first may still be read.
__device__ inline int broadcast(int value, Control& control) {
  if (threadIdx.x == 0) control.broadcast = value;
  __syncthreads();
  return control.broadcast;
}

// The addition is a release of what this thread has seen, and an acquire of what was released by
// those who added before: less than a full fence on either side.
__device__ inline uint32_t fetch_add_acq_rel(uint32_t* counter, uint32_t value) {
#if defined(AT_FUSED_EMULATED)
  return emulator::atomic_add(counter, value, std::memory_order_acq_rel);
#else
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
#endif
}

// Adds `arrivals` to a counter, after all that this block has written. True in the one block that
// makes it `total`, which then sees what all the others wrote.
__device__ inline bool arrives_last(uint32_t* counter, uint32_t arrivals, uint32_t total,
                                    Control& control) {
  bool last = false;
  __syncthreads();
  if (threadIdx.x == 0) last = fetch_add_acq_rel(counter, arrivals) + arrivals == total;
  return broadcast(last, control) != 0;
}

// The list's member whose tasks `task` is among.
template <class Members>
__device__ __forceinline__ int member_of(const Members& members, int count, int task) {
  int i = 0;
  while (i + 1 < count && task >= members[i + 1].first_task) ++i;
  return i;
}

}  // namespace at_fused
