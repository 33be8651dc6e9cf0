// Empty tables for the instruction-set levels that the sanitized library goes without.
#include "../../../csrc/cpu/kernels.h"

namespace at_fused {

#if defined(__x86_64__)
extern const Kernels kernels_avx2 = {}, kernels_avx512 = {};
#endif

}  // namespace at_fused
