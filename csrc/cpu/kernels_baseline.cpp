// What every processor of the architecture has: SSE2 on x86-64, NEON on aarch64.
#define AT_FUSED_VECTOR_BYTES 16
#include "kernels_general.h"

namespace at_fused {
const Kernels kernels_baseline = {
    "baseline",  attention_map,    sample_loss,           attention_map_backward,
    general_map, general_backward, attention_tap_backward};
}  // namespace at_fused
