// All kernels of one instruction-set level: kernels_*.cpp choose it and include this file, and with
// it all other kernels_*.h.
//
// A position's value never depends on where a tile begins or ends, so that results are the same
// bits for any number of threads: a partial vector does the arithmetic of a full one.
#pragma once

#include "kernels_general.h"
#include "kernels_loss.h"
#include "kernels_map.h"

namespace at_fused {
namespace {

constexpr Kernels table(const char* name) {
  return {name,        attention_map,    sample_loss,           attention_map_backward,
          general_map, general_backward, attention_tap_backward};
}

}  // namespace
}  // namespace at_fused
