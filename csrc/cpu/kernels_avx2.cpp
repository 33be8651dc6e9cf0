#if defined(__x86_64__)
#define AT_FUSED_VECTOR_BYTES 32
#include "kernels_table.h"

namespace at_fused {
const Kernels kernels_avx2 = table("avx2");
}  // namespace at_fused
#endif
