// Kernels to test the emulator. Buggy ones must be reported for every seed, correct ones for none.
#include <cuda_runtime.h>

#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class T>
__device__ T* shared() {
  return reinterpret_cast<T*>(emulator::dynamic_shared());
}

// ---- shared memory ------------------------------------------------------------------------------

__global__ void missing_barrier(float* out) {
  auto* s = shared<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  s[threadIdx.x] = 2;
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[(threadIdx.x + 32) % blockDim.x];
}

// The writes of the second round race with the reads of the first.
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

// A shuffle does not order memory accesses.
__global__ void shuffle_for_barrier(float* out) {
  auto* s = shared<float>();
  s[threadIdx.x] = 1;
  int lane = __shfl_xor_sync(kAll, static_cast<int>(threadIdx.x), 1);
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[lane];
}

__global__ void off_by_one(float* out) {
  auto* s = shared<float>();
  s[threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s[threadIdx.x + 1];
}

// Accesses of two lanes to different halves of a word do not race.
__global__ void halves(const unsigned short* in, unsigned short* out) {
  auto* s = shared<unsigned short>();
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

// ---- barriers and shuffles ----------------------------------------------------------------------

__global__ void divergent_barriers(int* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    out[threadIdx.x] = 2;
    __syncthreads();
  }
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

// ---- global memory ------------------------------------------------------------------------------

__global__ void misaligned(const int* in, uint4* out) {
  out[threadIdx.x] = *reinterpret_cast<const uint4*>(in + threadIdx.x);
}

__global__ void misaligned_members(const int* in, int* out) {
  uint4 v = *reinterpret_cast<const uint4*>(in + threadIdx.x);
  out[threadIdx.x] = static_cast<int>(v.x + v.y * v.z + v.w);
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

__global__ void copy16(const uint4* in, uint4* out) {
  unsigned at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at < 1000) out[at] = __ldg(in + at);
}

enum class Bug { kNone, kNoRelease, kNoAcquire, kNoBarrier, kLateRead };

// The last block to finish sums the results of all blocks.
__global__ void sum_blocks(Bug bug, int* partial, unsigned* counter, int* out) {
  auto* last = shared<int>();
  unsigned mine = blockIdx.x * blockDim.x + threadIdx.x;
  partial[mine] = 1;
  if (bug != Bug::kNoBarrier) __syncthreads();
  if (threadIdx.x == 0) {
    auto order = bug == Bug::kNoRelease   ? std::memory_order_acquire
                 : bug == Bug::kNoAcquire ? std::memory_order_release
                                          : std::memory_order_acq_rel;
    *last = emulator::atomic_add(counter, 1u, order) == gridDim.x - 1;
  }
  __syncthreads();
  if (*last) {
    int total = 0;
    for (unsigned at = threadIdx.x; at < gridDim.x * blockDim.x; at += blockDim.x) {
      total += partial[at];
      partial[at] = 0;
    }
    out[threadIdx.x] = total;
  } else if (bug == Bug::kLateRead) {
    out[mine] = partial[mine];
  }
}

// ---- cases --------------------------------------------------------------------------------------

template <class... Exp, class... Act>
int run(unsigned grid, unsigned block, size_t shared_bytes, void (*kernel)(Exp...), Act&&... args) {
  cudaLaunchConfig_t config{grid, block, shared_bytes, nullptr};
  return cudaLaunchKernelEx(&config, kernel, std::forward<Act>(args)...);
}

int run_sum_blocks(Bug bug) {
  std::vector<int> partial(8 * 64), out(8 * 64);
  unsigned counter = 0;
  if (int error = run(8, 64, 16, sum_blocks, bug, partial.data(), &counter, out.data()))
    return error;
  return out[63] == 8 ? 0 : -1;
}

}  // namespace

// Exports a function that returns a cudaError_t, or -1 for a wrong result. Data is on the heap,
// because the emulator does not check static memory.
#define CASE(name) EXPORTED int name()
#define NEW(type) std::vector<type>(4096).data()

CASE(buggy_missing_barrier) { return run(2, 64, 256, missing_barrier, NEW(float)); }
CASE(buggy_missing_second_barrier) { return run(2, 64, 256, missing_second_barrier, NEW(float)); }
CASE(buggy_race_in_warp) { return run(2, 64, 256, race_in_warp, NEW(float)); }
CASE(buggy_shuffle_for_barrier) { return run(2, 64, 256, shuffle_for_barrier, NEW(float)); }
CASE(buggy_off_by_one) { return run(2, 64, 256, off_by_one, NEW(float)); }
CASE(buggy_uninitialised) { return run(2, 64, 512, off_by_one, NEW(float)); }
CASE(buggy_divergent_barriers) { return run(1, 64, 0, divergent_barriers, NEW(int)); }
CASE(buggy_mask_lacks_caller) { return run(1, 32, 0, mask_lacks_caller, NEW(int)); }
CASE(buggy_mask_lacks_source) { return run(1, 16, 0, mask_lacks_source, NEW(int)); }
CASE(buggy_mask_of_ended) { return run(1, 32, 0, mask_of_ended, NEW(int)); }
CASE(buggy_mask_of_missing) { return run(1, 16, 0, mask_of_ended, NEW(int)); }
CASE(buggy_shuffle_against_barrier) { return run(1, 32, 0, shuffle_against_barrier, NEW(int)); }
CASE(buggy_misaligned) { return run(1, 32, 0, misaligned, NEW(int), NEW(uint4)); }
CASE(buggy_misaligned_members) { return run(1, 32, 0, misaligned_members, NEW(int), NEW(int)); }
CASE(buggy_global_race) { return run(1, 64, 0, global_race, NEW(int)); }
CASE(buggy_read_then_written) { return run(1, 64, 0, read_then_written, NEW(int), NEW(int)); }
CASE(buggy_neighbour_block) { return run(2, 1, 0, neighbour_block, NEW(int), NEW(int)); }
CASE(buggy_no_release) { return run_sum_blocks(Bug::kNoRelease); }
CASE(buggy_no_acquire) { return run_sum_blocks(Bug::kNoAcquire); }
CASE(buggy_no_barrier) { return run_sum_blocks(Bug::kNoBarrier); }
CASE(buggy_late_read) { return run_sum_blocks(Bug::kLateRead); }

CASE(correct_sum_blocks) { return run_sum_blocks(Bug::kNone); }
CASE(correct_copy16) { return run(16, 64, 1024, copy16, NEW(uint4), NEW(uint4)); }
CASE(correct_halves) { return run(1, 64, 128, halves, NEW(unsigned short), NEW(unsigned short)); }
