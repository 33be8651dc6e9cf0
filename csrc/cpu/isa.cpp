// Which instruction-set level runs: found once, from the processor and AT_FUSED_CPU_ISA.
#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "kernels.h"

namespace at_fused {
namespace {

// The levels that this processor has, lowest first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> usable = {&kernels_baseline};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    usable.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      usable.push_back(&kernels_avx512);
    }
  }
#endif
  return usable;
}

// AT_FUSED_CPU_ISA asks for a lower level than the highest, for tests and comparisons.
const Kernels& choose_kernels() {
  const std::vector<const Kernels*> usable = usable_kernels();
  if (const char* wanted = std::getenv("AT_FUSED_CPU_ISA")) {
    for (const Kernels* kernels : usable) {
      if (std::string(wanted) == kernels->name) return *kernels;
    }
  }
  return *usable.back();
}

std::string cpu_isa() { return kernels().name; }

std::vector<std::string> cpu_isa_levels() {
  std::vector<std::string> names;
  for (const Kernels* level : usable_kernels()) names.push_back(level->name);
  return names;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose_kernels();
  return chosen;
}

}  // namespace at_fused

STABLE_TORCH_LIBRARY_FRAGMENT(at_fused, m) {
  m.def("cpu_isa() -> str");
  m.def("cpu_isa_levels() -> str[]");
}

STABLE_TORCH_LIBRARY_IMPL(at_fused, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&at_fused::cpu_isa));
  m.impl("cpu_isa_levels", TORCH_BOX(&at_fused::cpu_isa_levels));
}
