// Kernels with a planted bug each, which every seed must bring to light.
#include "launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

enum class Bug {
  kNone,
  kNoFence,
  kNoBarrier,
  kNoSecondFence,
  kLateRead,
};

__global__ void missing_barrier(float* out) {
  auto* s = shared<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  s[threadIdx.x] = 2;
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[(threadIdx.x + 32) % blockDim.x];
}

// The second round's writes meet the first round's reads.
__global__ void missing_second_barrier(float* out) {
  auto* s = shared<float>();
  float sum = 0;
  for (int round = 0; round < 2; ++round) {
    s[threadIdx.x] = 1;
    __syncthreads();
    sum += s[(threadIdx.x + 32) % blockDim.x];
  }
  out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}

__global__ void race_in_warp(float* out) {
  auto* s = shared<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  s[threadIdx.x] = 2;
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x ^ 1];
}

// A shuffle orders no memory.
__global__ void shuffle_for_barrier(float* out) {
  auto* s = shared<float>();
  s[threadIdx.x] = 1;
  int lane = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[lane];
}

__global__ void mask_lacks_caller(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, static_cast<int>(threadIdx.x), 1);
}

__global__ void mask_lacks_source(int* out) {
  out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 16);
}

__global__ void mask_of_ended(int* out) {
  if (threadIdx.x >= 16) return;
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
}

__global__ void shuffle_against_barrier(int* out) {
  if (threadIdx.x % 32 == 7) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kAll, 1, 1);
  if (threadIdx.x % 32 != 7) __syncthreads();
}

__global__ void off_by_one(float* out, int n) {
  auto* s = shared<float>();
  if (threadIdx.x < static_cast<unsigned>(n)) s[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x + 1];
}

__global__ void divergent_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
}

__global__ void misaligned(const int* in, uint4* out) {
  out[threadIdx.x] = *reinterpret_cast<const uint4*>(in + threadIdx.x);
}

__global__ void misaligned_members(const int* in, unsigned* out) {
  uint4 v = *reinterpret_cast<const uint4*>(in + threadIdx.x);
  out[threadIdx.x] = v.x + v.y * v.z + v.w;
}

__global__ void global_race(int* out) { out[0] = static_cast<int>(threadIdx.x); }

__global__ void read_then_written(int* data, int* out) {
  out[threadIdx.x] = data[threadIdx.x ^ 32];
  data[threadIdx.x] = 1;
}

__global__ void neighbour_block(int* data, int* out) {
  data[blockIdx.x] = 1;
  out[blockIdx.x] = data[blockIdx.x ^ 1];
}

__global__ void grid_reduction(Bug bug, float* partial, unsigned* counter, float* out) {
  auto* last = shared<int>();
  unsigned mine = blockIdx.x * blockDim.x + threadIdx.x;
  partial[mine] = 1;
  if (bug != Bug::kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (bug != Bug::kNoFence) __threadfence();
    *last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (bug != Bug::kNoSecondFence) __threadfence();
  }
  __syncthreads();
  if (*last) {
    float total = 0;
    for (unsigned at = threadIdx.x; at < gridDim.x * blockDim.x; at += blockDim.x) {
      total += partial[at];
      partial[at] = 0;
    }
    out[mine] = total;
  } else if (bug == Bug::kLateRead) {
    out[mine] = partial[mine];
  }
}

int with_bug(Bug bug) {
  std::vector<float> partial(8 * 64), out(8 * 64);
  unsigned counter = 0;
  return run(8, 64, 16, grid_reduction, bug, partial.data(), &counter, out.data());
}

}  // namespace

// The module's own memory is not watched, so what the kernels use lies on the heap.
#define FLOATS std::vector<float>(4096).data()
#define INTS std::vector<int>(4096).data()

CASE(wrong_missing_barrier) { return run(2, 64, 256, missing_barrier, FLOATS); }
CASE(wrong_missing_second_barrier) { return run(2, 64, 256, missing_second_barrier, FLOATS); }
CASE(wrong_race_in_warp) { return run(2, 64, 256, race_in_warp, FLOATS); }
CASE(wrong_shuffle_for_barrier) { return run(2, 64, 256, shuffle_for_barrier, FLOATS); }
CASE(wrong_mask_lacks_caller) { return run(1, 32, 0, mask_lacks_caller, INTS); }
CASE(wrong_mask_lacks_source) { return run(1, 16, 0, mask_lacks_source, INTS); }
CASE(wrong_mask_of_ended) { return run(1, 32, 0, mask_of_ended, INTS); }
CASE(wrong_mask_of_missing) { return run(1, 16, 0, mask_of_ended, INTS); }
CASE(wrong_shuffle_against_barrier) { return run(1, 32, 0, shuffle_against_barrier, INTS); }
CASE(wrong_off_by_one) { return run(2, 64, 256, off_by_one, FLOATS, 64); }
CASE(wrong_uninitialised) { return run(2, 64, 512, off_by_one, FLOATS, 64); }
CASE(wrong_divergent_barriers) { return run(1, 64, 0, divergent_barriers, INTS); }
CASE(wrong_misaligned) {
  std::vector<uint4> out(32);
  return run(1, 32, 0, misaligned, INTS, out.data());
}
CASE(wrong_misaligned_members) {
  std::vector<unsigned> out(32);
  return run(1, 32, 0, misaligned_members, INTS, out.data());
}
CASE(wrong_global_race) { return run(1, 64, 0, global_race, INTS); }
CASE(wrong_read_then_written) { return run(1, 64, 0, read_then_written, INTS, INTS); }
CASE(wrong_neighbour_block) { return run(2, 1, 0, neighbour_block, INTS, INTS); }
CASE(wrong_grid_no_fence) { return with_bug(Bug::kNoFence); }
CASE(wrong_grid_no_barrier) { return with_bug(Bug::kNoBarrier); }
CASE(wrong_grid_no_second_fence) { return with_bug(Bug::kNoSecondFence); }
CASE(wrong_grid_late_read) { return with_bug(Bug::kLateRead); }
CASE(right_grid_fenced) { return with_bug(Bug::kNone); }
