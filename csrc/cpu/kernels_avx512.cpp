#if defined(__x86_64__)
#define AT_FUSED_VECTOR_BYTES 64
#include "kernels_table.h"

const at_fused::Kernels at_fused::kernels_avx512 = kernel_table("avx512");
#endif
