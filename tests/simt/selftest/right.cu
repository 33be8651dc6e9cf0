// Correct kernels: no seed may make the harness report anything.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.h"

namespace {

constexpr unsigned kAll = 0xffffffffu;

__device__ float block_sum(float v, float* scratch) {
  for (int k = 16; k; k /= 2) v += __shfl_xor_sync(kAll, v, k);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = v;
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / 32; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

__global__ void block_reduction(const float* in, float* out) {
  float sum = block_sum(in[blockIdx.x * blockDim.x + threadIdx.x], shared<float>());
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}

// The last block to finish adds up what the others wrote, and readies the counter for another run.
__global__ void grid_reduction(const float* in, float* partial, unsigned* counter, float* out) {
  auto* scratch = shared<float>();
  auto* last = reinterpret_cast<int*>(scratch + 32);
  float sum = block_sum(in[blockIdx.x * blockDim.x + threadIdx.x], scratch);
  partial[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    *last = atomicAdd(counter, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!*last) return;
  float total = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) {
    unsigned at = b * blockDim.x + threadIdx.x;
    total += partial[at];
    partial[at] = 0;
  }
  total = block_sum(total, scratch);
  if (threadIdx.x == 0) {
    *out = total;
    *counter = 0;
  }
}

__global__ void copy16(const uint4* in, uint4* out, int n) {
  auto* s = shared<uint4>();
  for (unsigned i = blockIdx.x * blockDim.x + threadIdx.x; i < static_cast<unsigned>(n);
       i += gridDim.x * blockDim.x) {
    s[threadIdx.x] = __ldg(in + i);
    out[i] = s[threadIdx.x];
  }
}

// Two lanes' halves of a word are no race.
__global__ void halves(const __half* in, __half* out) {
  auto* s = shared<__half>();
  s[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = s[threadIdx.x ^ 1];
}

__global__ void in_order(unsigned* out, unsigned* next) {
  if (threadIdx.x == 0) out[blockIdx.x] = atomicAdd(next, 1u);
}

}  // namespace

CASE(right_block_reduction) {
  auto in = ramp(8 * 256);
  std::vector<float> out(8);
  if (int error = run(8, 256, 128, block_reduction, in.data(), out.data())) return error;
  for (int b = 0; b < 8; ++b) {
    float want = 0;
    for (int i = 0; i < 256; ++i) want += in[b * 256 + i];
    if (out[b] != want) return -1;
  }
  return 0;
}

CASE(right_grid_reduction) {
  auto in = ramp(12 * 128);
  std::vector<float> partial(12 * 128);
  unsigned counter = 0;
  float out = 0, want = 0;
  for (float v : in) want += 128 * v;
  for (int repeat = 0; repeat < 2; ++repeat) {
    if (int error = run(12, 128, 256, grid_reduction, in.data(), partial.data(), &counter, &out))
      return error;
    if (out != want || counter != 0) return -1;
  }
  return 0;
}

CASE(right_copy16) {
  std::vector<uint4> in(1000), out(1000);
  for (unsigned i = 0; i < 1000; ++i) in[i] = uint4(i, i + 1, i + 2, i + 3);
  if (int error = run(3, 64, 64 * 16, copy16, in.data(), out.data(), 1000)) return error;
  for (unsigned i = 0; i < 1000; ++i)
    if (out[i].x != i || out[i].w != i + 3) return -1;
  return 0;
}

CASE(right_halves) {
  std::vector<__half> in(64), out(64);
  for (int i = 0; i < 64; ++i) in[i] = __float2half_rn(static_cast<float>(i));
  if (int error = run(1, 64, 128, halves, in.data(), out.data())) return error;
  for (int i = 0; i < 64; ++i)
    if (__half2float(out[i]) != static_cast<float>(i ^ 1)) return -1;
  return 0;
}

// 1 if the blocks of a grid, one resident at a time, start in ascending order, 0 if not.
CASE(blocks_in_order) {
  std::vector<unsigned> out(64);
  unsigned next = 0;
  if (run(64, 32, 0, in_order, out.data(), &next)) return -1;
  for (unsigned b = 0; b < 64; ++b)
    if (out[b] != b) return 0;
  return 1;
}

// Errors of a launch, as CUDA gives them.
CASE(launch_errors) {
  unsigned out[1], next = 0;
  auto start = [&](unsigned grid, unsigned block, size_t shared_bytes) {
    return run(grid, block, shared_bytes, in_order, out, &next);
  };
  if (start(0, 64, 0) != cudaErrorInvalidConfiguration) return 1;
  if (start(1, 0, 0) != cudaErrorInvalidConfiguration) return 2;
  if (start(1, 1025, 0) != cudaErrorInvalidConfiguration) return 3;
  if (cudaGetLastError() != cudaErrorInvalidConfiguration) return 4;
  if (cudaGetLastError() != cudaSuccess) return 5;
  size_t large = 100 << 10;
  if (start(1, 64, large) != cudaErrorInvalidValue) return 6;
  auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (cudaFuncSetAttribute(in_order, attribute, 1 << 20) != cudaErrorInvalidValue) return 7;
  if (cudaFuncSetAttribute(in_order, attribute, 100 << 10) != cudaSuccess) return 8;
  if (start(1, 64, large) != cudaSuccess) return 9;
  if (start(1, 64, large + 1) != cudaErrorInvalidValue) return 10;
  cudaFuncSetAttribute(in_order, attribute, 0);
  return 0;
}

extern "C" __attribute__((visibility("default"))) void from_half(int kind, const uint16_t* in,
                                                                 float* out) {
  for (int i = 0; i < 65536; ++i)
    out[i] = kind ? __bfloat162float(__nv_bfloat16{in[i]}) : __half2float(__half{in[i]});
}

extern "C" __attribute__((visibility("default"))) void to_half(int kind, const float* in,
                                                               uint16_t* out, int n) {
  for (int i = 0; i < n; ++i)
    out[i] = kind ? __float2bfloat16_rn(in[i]).__x : __float2half_rn(in[i]).__x;
}
