// The baseline of the architecture: SSE2 on x86-64, NEON on aarch64.
#define AT_FUSED_VECTOR_BYTES 16
#include "kernels_table.h"

const at_fused::Kernels at_fused::kernels_baseline = kernel_table("baseline");
