// Stand-in for CUDA's header. torch's half rounds like CUDA's.
#pragma once

#include <torch/headeronly/util/Half.h>

using __half = c10::Half;

inline float __half2float(__half v) { return v; }
inline __half __float2half_rn(float v) { return v; }
