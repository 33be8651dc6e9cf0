// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define AT_FUSED_VECTOR_BYTES 16
#include "kernels_table.h"

namespace at_fused {
const Kernels kernels_baseline = table("baseline");
}  // namespace at_fused
