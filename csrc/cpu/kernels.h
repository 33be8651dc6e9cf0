// What the operators (ops.cpp) ask of one instruction-set level, as plain structs and function
// pointers: nothing from the standard library crosses this line, because an inline function
// compiled for AVX-512 could otherwise be merged by the linker into code for older processors.
#pragma once

#include <cstdint>

#include "../feature.h"

namespace at_fused {

// The two raw attention maps of one sample and what becomes of them. The maps hold fp64 for fp64
// features and fp32 otherwise; with `*_grad` a map is overwritten by its coefficient map k.
struct SampleLoss {
  void* student;
  void* teacher;
  bool student_double, teacher_double;
  bool student_grad, teacher_grad;
  int64_t B, N;
  Form form;
  double eps;
  double weight;
  double student_scale, teacher_scale;  // d Q / d |A|^p times p: p / C for mean, p for sum
};

struct Kernels {
  const char* name;

  // map[n] = scale * sum_c |A[b, c, n]|^p  for n in [begin, end), one sample.
  void (*attention_map)(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                        double scale, void* map);

  // Normalises both maps of a sample, returns its share of the loss and leaves k = dL/dQ * scale.
  double (*sample_loss)(const SampleLoss& sample);

  // out[b, c, n] = gradient * k[n] * |A|^(p-1) * sign(A) for the lines [begin, end) of a sample:
  // channels in planar, positions in interleaved. `out` has the layout and dtype of `feature`.
  void (*attention_map_backward)(const Feature& feature, int64_t b, int64_t begin, int64_t end,
                                 double p, double gradient, const void* k, const Feature& out,
                                 bool stream);
};

// The table of the level in use.
const Kernels& kernels();

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace at_fused
