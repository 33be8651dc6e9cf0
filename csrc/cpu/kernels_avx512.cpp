#if defined(__x86_64__)
#define AT_FUSED_VECTOR_BYTES 64
#include "kernels_table.h"

namespace at_fused {
const Kernels kernels_avx512 = table("avx512");
}  // namespace at_fused
#endif
