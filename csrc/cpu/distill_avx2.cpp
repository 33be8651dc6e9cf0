#if defined(__x86_64__)
// Headers first: only this project's code may be compiled for the level (see kernels.h).
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "distill.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define AT_FUSED_VECTOR_BYTES 32
#include "distance_impl.h"
#include "kd_impl.h"

namespace at_fused {
const DistillKernels distill_kernels_avx2 = {kd_row_statistics, kd_row_gradients, squared_distance,
                                             squared_distance_backward};
}  // namespace at_fused

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
