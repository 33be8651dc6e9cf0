// Kernels with a planted bug each, which every seed must bring to light.
#include "launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

enum class Bug {
  kNone,
  kNoFence,
  kNoBarrier,
  kNoSecondFence,
  kNoWaiterFence,
  kNoFlag,
  kWriteBack,
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
  partial[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  if (bug != Bug::kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    if (bug != Bug::kNoFence) __threadfence();
    *last = atomicAdd(counter, 1u) == gridDim.x - 1;
    if (bug != Bug::kNoSecondFence) __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) total += partial[b * blockDim.x + threadIdx.x];
  out[threadIdx.x] = total;
}

__global__ void hand_over(Bug bug, int* flag, float* data, float* out) {
  if (bug == Bug::kWriteBack) {
    // Block 1 reads what block 0 will overwrite without waiting.
    if (blockIdx.x == 1) {
      out[threadIdx.x] = data[threadIdx.x];
      __syncthreads();
      if (threadIdx.x == 0) atomicExch(flag, 1);
    } else {
      if (threadIdx.x == 0)
        while (__ldcv(flag) == 0) __nanosleep(50);
      __syncthreads();
      data[threadIdx.x] = 3;
    }
    return;
  }
  if (blockIdx.x == 0) {
    data[threadIdx.x] = 2;
    if (bug != Bug::kNoBarrier) __syncthreads();
    if (threadIdx.x == 0 && bug != Bug::kNoFlag) {
      if (bug != Bug::kNoFence) __threadfence();
      atomicExch(flag, 1);
    }
  } else {
    if (threadIdx.x == 0) {
      while (__ldcv(flag) == 0) __nanosleep(50);
      if (bug != Bug::kNoWaiterFence) __threadfence();
    }
    __syncthreads();
    out[threadIdx.x] = data[threadIdx.x];
  }
}

__global__ void spin_lock(int* lock) {
  while (atomicExch(lock, 1) != 0) {
  }
}

int with_bug(Bug bug) {
  std::vector<float> partial(8 * 64), out(64);
  unsigned counter = 0;
  return run("grid_reduction", 8, 64, 16, grid_reduction, bug, partial.data(), &counter,
             out.data());
}

int over_flag(Bug bug) {
  std::vector<float> data(64), out(64);
  int flag = 0;
  return run("hand_over", 2, 64, 0, hand_over, bug, &flag, data.data(), out.data());
}

}  // namespace

// The module's own memory is not watched, so what the kernels use lies on the heap.
#define FLOATS std::vector<float>(4096).data()
#define INTS std::vector<int>(4096).data()

CASE(wrong_missing_barrier) { return run("m", 2, 64, 256, missing_barrier, FLOATS); }
CASE(wrong_missing_second_barrier) { return run("m", 2, 64, 256, missing_second_barrier, FLOATS); }
CASE(wrong_race_in_warp) { return run("m", 2, 64, 256, race_in_warp, FLOATS); }
CASE(wrong_mask_lacks_caller) { return run("m", 1, 32, 0, mask_lacks_caller, INTS); }
CASE(wrong_mask_lacks_source) { return run("m", 1, 16, 0, mask_lacks_source, INTS); }
CASE(wrong_mask_of_ended) { return run("m", 1, 32, 0, mask_of_ended, INTS); }
CASE(wrong_mask_of_missing) { return run("m", 1, 16, 0, mask_of_ended, INTS); }
CASE(wrong_shuffle_against_barrier) { return run("m", 1, 32, 0, shuffle_against_barrier, INTS); }
CASE(wrong_off_by_one) { return run("m", 2, 64, 256, off_by_one, FLOATS, 64); }
CASE(wrong_uninitialised) { return run("m", 2, 64, 512, off_by_one, FLOATS, 64); }
CASE(wrong_divergent_barriers) { return run("m", 1, 64, 0, divergent_barriers, INTS); }
CASE(wrong_misaligned) {
  std::vector<uint4> out(32);
  return run("m", 1, 32, 0, misaligned, INTS, out.data());
}
CASE(wrong_misaligned_members) {
  std::vector<unsigned> out(32);
  return run("m", 1, 32, 0, misaligned_members, INTS, out.data());
}
CASE(wrong_global_race) { return run("m", 1, 64, 0, global_race, INTS); }
CASE(wrong_read_then_written) { return run("m", 1, 64, 0, read_then_written, INTS, INTS); }
CASE(wrong_neighbour_block) { return run("m", 2, 1, 0, neighbour_block, INTS, INTS); }
CASE(wrong_grid_no_fence) { return with_bug(Bug::kNoFence); }
CASE(wrong_grid_no_barrier) { return with_bug(Bug::kNoBarrier); }
CASE(wrong_grid_no_second_fence) { return with_bug(Bug::kNoSecondFence); }
CASE(wrong_flag_no_fence) { return over_flag(Bug::kNoFence); }
CASE(wrong_flag_no_barrier) { return over_flag(Bug::kNoBarrier); }
CASE(wrong_flag_no_waiter_fence) { return over_flag(Bug::kNoWaiterFence); }
CASE(wrong_flag_write_back) { return over_flag(Bug::kWriteBack); }
CASE(wrong_flag_never_set) { return over_flag(Bug::kNoFlag); }
CASE(wrong_spin_lock) { return run("m", 1, 32, 0, spin_lock, INTS); }
CASE(right_grid_fenced) { return with_bug(Bug::kNone); }
CASE(right_flag_fenced) { return over_flag(Bug::kNone); }
