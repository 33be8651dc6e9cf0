#if defined(__x86_64__)
// Headers first: only code of this file alone may be compiled for the level (see kernels.h).
#include <immintrin.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "kernels.h"

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

#define AT_FUSED_VECTOR_BYTES 64
#include "kernels_table.h"

namespace at_fused {
const Kernels kernels_avx512 = table("avx512");
}  // namespace at_fused

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
