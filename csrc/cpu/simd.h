// Vectors of one instruction-set level, in the compiler's own vector types, so that one source
// serves x86 and everything else. AT_FUSED_VECTOR_BYTES is set by the including kernels_*.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#define AT_FUSED_INLINE inline __attribute__((always_inline))
#define AT_FUSED_LAMBDA __attribute__((always_inline))

namespace at_fused {
namespace {

template <class E, int n>
struct VectorOf {
  typedef E type __attribute__((vector_size(n * sizeof(E))));
};

template <class A>
constexpr int lanes = AT_FUSED_VECTOR_BYTES / sizeof(A);

template <class A>
using Vec = typename VectorOf<A, lanes<A>>::type;

using Word = VectorOf<uint32_t, lanes<float>>::type;      // the bits of a Vec<float>
using HalfWord = VectorOf<uint16_t, lanes<float>>::type;  // as many 16-bit elements

template <class To, class From>
AT_FUSED_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast changes no size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class A>
AT_FUSED_INLINE Vec<A> splat(A value) {
  return value - Vec<A>{};
}

template <class V>
AT_FUSED_INLINE V read(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}

template <class V, class M>
AT_FUSED_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// The value as rounded here: the compiler must not fuse the multiplication that it comes from with
// what follows, or the difference of two alike values would not be 0.
template <class V>
AT_FUSED_INLINE V rounded(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

template <class V>
using MaskOf = decltype(V{} < V{});

template <class V>
AT_FUSED_INLINE V absolute(V x) {
  const auto sign = bit_cast<MaskOf<V>>(-V{});
  return bit_cast<V>(bit_cast<MaskOf<V>>(x) & ~sign);
}

// The lanes i... of `a` and, behind its own, `b`. gcc before 12 has another builtin for it.
template <int... i, class V>
AT_FUSED_INLINE V shuffle(V a, V b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, i...);
#else
  return __builtin_shuffle(a, b, MaskOf<V>{i...});
#endif
}

// Lane i: of segment i / segment of both, the half that begins at `begin`, a's and then b's.
template <int segment, int begin, class V, int... i>
AT_FUSED_INLINE V halves(V a, V b, std::integer_sequence<int, i...>) {
  constexpr int half = segment / 2, width = sizeof...(i);
  return shuffle<(i / segment * segment + i % half + begin + (i % segment < half ? 0 : width))...>(
      a, b);
}

// The sums of the lanes of `lanes<A>` vectors, as one vector: a third of the instructions of one
// sum after the other. Every sum folds its halves again and again, so its order depends on the
// vector's width alone.
template <class A, int count = lanes<A>>
AT_FUSED_INLINE Vec<A> sum_each(Vec<A> (&v)[lanes<A>]) {
  if constexpr (count > 1) {
    constexpr std::make_integer_sequence<int, lanes<A>> all;
    for (int i = 0; i < count / 2; ++i) {
      const Vec<A> a = v[i], b = v[i + count / 2];
      v[i] = halves<count, 0>(a, b, all) + halves<count, count / 2>(a, b, all);
    }
    return sum_each<A, count / 2>(v);
  } else {
    return v[0];
  }
}

// The lanes of the lower and the upper half in turns.
template <class V, int... i>
AT_FUSED_INLINE V alternate(V v, std::integer_sequence<int, i...>) {
  return shuffle<(i / 2 + i % 2 * int(sizeof...(i) / 2))...>(v, v);
}

AT_FUSED_INLINE Vec<float> alternate(Vec<float> v) {
  return alternate(v, std::make_integer_sequence<int, lanes<float>>{});
}

template <class A>
AT_FUSED_INLINE A sum(Vec<A> v) {
  Vec<A> all[lanes<A>] = {v};
  return sum_each<A>(all)[0];
}

}  // namespace
}  // namespace at_fused
