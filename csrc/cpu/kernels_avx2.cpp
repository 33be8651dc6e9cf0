#if defined(__x86_64__)
// Headers first: only this project's code may be compiled for the level (see kernels.h).
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define AT_FUSED_VECTOR_BYTES 32
#include "kernels_general.h"

namespace at_fused {
const Kernels kernels_avx2 = {
    "avx2",      attention_map,    sample_loss,           attention_map_backward,
    general_map, general_backward, attention_tap_backward};
}  // namespace at_fused

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
