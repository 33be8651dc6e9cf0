// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#include <type_traits>

#define AT_FUSED_VECTOR_BYTES 16
#include "distance_impl.h"
#include "kd_impl.h"

namespace at_fused {
const DistillKernels distill_kernels_baseline = {kd_row_statistics, kd_row_gradients,
                                                 squared_distance, squared_distance_backward};
}  // namespace at_fused
