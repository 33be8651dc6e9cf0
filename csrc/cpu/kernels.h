// The kernels of one instruction set, as the operators call them: plain structs and function
// pointers. Nothing from the standard library crosses this line, because an inline function
// compiled for AVX-512 could otherwise be merged by the linker into code for older processors.
#pragma once

#include <cstdint>

#include "../feature.h"

namespace at_fused {

// The two raw attention maps of one sample and what becomes of them: fp64 for fp64 features and
// fp32 otherwise. A result is the coefficient map k, and may lie where the raw map does; null: not
// wanted.
struct SampleLoss {
  const void* student;
  const void* teacher;
  void* student_result;
  void* teacher_result;
  bool student_fp64, teacher_fp64;
  int64_t N;
  Form form;
  EpsMode eps_mode;
  double eps;
  double weight;                        // of the sample, before a division by N
  double student_scale, teacher_scale;  // d Q / d |A|^p times p: p / C for mean, p for sum
};

// out[b, c, n] = gradient * k[n] * |A|^(p-1) * sign(A) for the lines [begin, end) of sample b:
// channels in planar, positions in interleaved. It is added to `add`, which may be `out`, unless
// that is null; with `channels` only those have a gradient. All have one layout and dtype.
struct Sweep {
  const Feature &feature, &out;
  const Feature* add;
  int64_t b, begin, end;
  double p, gradient;
  const void* k;
  const int32_t* channels;
  bool stream;  // past the caches
};

struct Kernels {
  const char* name;

  // map[n] = scale * sum_c |A[b, c, n]|^p  for n in [begin, end), one sample. With `channels` the
  // maximum over the channels, without `scale`, and channels[n], which has it.
  void (*attention_map)(const Feature& feature, int64_t b, int64_t begin, int64_t end, double p,
                        double scale, void* map, int32_t* channels);

  // Normalises both maps of a sample, returns its share of the loss and leaves k = dL/dQ * scale.
  double (*sample_loss)(const SampleLoss& sample);

  void (*sweep)(const Sweep& sweep);
};

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace at_fused
