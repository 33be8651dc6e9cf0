// What the operators (ops.cpp) ask of one instruction-set level, as plain structs and function
// pointers: nothing from the standard library crosses this line, because an inline function
// compiled for AVX-512 could otherwise be merged by the linker into code for older processors.
#pragma once

#include <cstdint>

namespace at_fused {

enum class Dtype : int32_t { float32, float64, float16, bfloat16 };

// planar: channels outermost, positions adjacent (NCHW).
// interleaved: channels adjacent (channels_last, tokens).
enum class Layout : int32_t { planar, interleaved };

enum class Form : int32_t { code, paper };

// A feature map seen as (B, C, N). Strides in elements. The stride that the layout makes 1
// (position in planar, channel in interleaved) is not stored; `line` is the other one.
struct Feature {
  const void* data;
  Dtype dtype;
  Layout layout;
  int64_t B, C, N;
  int64_t batch;
  int64_t line;
};

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
