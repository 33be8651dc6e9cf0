// CUDA's vector types, those that the kernels use.
#pragma once

// With a constructor where CUDA's is an aggregate: g++ would split *p = uint4{...} into four
// stores, and the harness is to see the one that the GPU makes.
struct alignas(16) uint4 {
  unsigned x, y, z, w;
  uint4() = default;
  constexpr uint4(unsigned a, unsigned b, unsigned c, unsigned d) : x(a), y(b), z(c), w(d) {}
};

struct dim3 {
  unsigned x;
  constexpr dim3(unsigned a = 1) : x(a) {}
};
