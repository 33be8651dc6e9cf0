// Build information for `python -m at_fused.info`. Does not link torch, so that it can be imported
// even if the installed torch does not match.
#include <pybind11/pybind11.h>

#if defined(__clang__)
#define AT_FUSED_COMPILER "clang " __clang_version__
#else
#define AT_FUSED_COMPILER "gcc " __VERSION__
#endif

PYBIND11_MODULE(_build_info, m) {
  m.doc() = "How at_fused was built.";
  m.attr("version") = AT_FUSED_VERSION;
  m.attr("torch") = AT_FUSED_TORCH;
  m.attr("compiler") = AT_FUSED_COMPILER;
  m.attr("cuda") = AT_FUSED_CUDA;
#if defined(__x86_64__)
  m.attr("cpu_instruction_sets") = pybind11::make_tuple("baseline", "avx2", "avx512");
#else
  m.attr("cpu_instruction_sets") = pybind11::make_tuple("baseline");
#endif
}
