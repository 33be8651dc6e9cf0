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

// The sums of the lanes of `lanes<A>` vectors, as one vector: a third of the instructions of one
// sum after the other. Every sum folds its halves again and again, so its order depends on the
// vector's width alone.
template <int segment, class A, int... i>
AT_FUSED_INLINE Vec<A> fold(Vec<A> a, Vec<A> b, std::integer_sequence<int, i...>) {
  // Lane i of the result: segment i / segment of both, its first half from a, its second from b.
  constexpr int half = segment / 2;
  const auto low = __builtin_shufflevector(
      a, b, (i / segment * segment + i % half + (i % segment < half ? 0 : lanes<A>))...);
  const auto high = __builtin_shufflevector(
      a, b, (i / segment * segment + i % half + half + (i % segment < half ? 0 : lanes<A>))...);
  return low + high;
}

template <class A, int count = lanes<A>>
AT_FUSED_INLINE Vec<A> sum_each(Vec<A> (&v)[lanes<A>]) {
  if constexpr (count > 1) {
    for (int i = 0; i < count / 2; ++i) {
      v[i] = fold<count, A>(v[i], v[i + count / 2], std::make_integer_sequence<int, lanes<A>>{});
    }
    return sum_each<A, count / 2>(v);
  } else {
    return v[0];
  }
}

// The lanes of the lower and the upper half in turns.
template <class V, int... i>
AT_FUSED_INLINE V alternate(V v, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(v, v, (i / 2 + i % 2 * int(sizeof...(i) / 2))...);
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
