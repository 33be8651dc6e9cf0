// Rows of elements of any dtype, some at a time.
#pragma once

#include "block.cuh"
#include "numbers.cuh"

namespace at_fused {

// Elements that a thread takes in a turn.
template <class A>
constexpr int kTurn = sizeof(A) == 8 ? 4 : 8;

// How `threads` threads share a row: element j of a thread's turn is `at + j * step`. With
// `vector` adjacent ones are a thread's own, to be moved by 128 bits; else its neighbours'.
template <class A>
struct Turns {
  int64_t at, advance, end;
  int step;
  bool vector;

  __device__ __forceinline__ Turns(int thread, int threads, bool vector, int64_t begin, int64_t end)
      : at(begin + thread * (vector ? kTurn<A> : 1)),
        advance(threads * kTurn<A>),
        end(end),
        step(vector ? 1 : threads),
        vector(vector) {}
  __device__ __forceinline__ bool more() const { return at < end; }
  __device__ __forceinline__ void next() { at += advance; }
  __device__ __forceinline__ bool has(int j) const { return at + int64_t(j) * step < end; }
};

template <class A, class T>
constexpr int kPart = kTurn<A> < kVector<T> ? kTurn<A> : kVector<T>;

// A turn's elements; `fill` beyond the row's end.
template <class A>
__device__ __forceinline__ void load_turn(const void* row, Dtype dtype, const Turns<A>& turn,
                                          A fill, A (&x)[kTurn<A>]) {
  with_dtype<sizeof(A) == 8>(dtype, [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(row) + turn.at;
    if (turn.vector) {
      constexpr int n = kPart<A, T>;
#pragma unroll
      for (int j = 0; j < kTurn<A>; j += n) {
        Accumulator<T> part[n];
        load_constant<T, n>(from + j).get(part);
#pragma unroll
        for (int i = 0; i < n; ++i) x[j + i] = A(part[i]);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTurn<A>; ++j) {
        Accumulator<T> one[1];
        x[j] = fill;
        if (turn.has(j)) {
          load_constant<T, 1>(from + j * turn.step).get(one);
          x[j] = A(one[0]);
        }
      }
    }
  });
}

template <class A>
__device__ __forceinline__ void store_turn(void* row, Dtype dtype, const Turns<A>& turn,
                                           const A (&x)[kTurn<A>]) {
  with_dtype<sizeof(A) == 8>(dtype, [&](auto element) {
    using T = decltype(element);
    T* to = static_cast<T*>(row) + turn.at;
    if (turn.vector) {
      constexpr int n = kPart<A, T>;
#pragma unroll
      for (int j = 0; j < kTurn<A>; j += n) {
        Accumulator<T> part[n];
#pragma unroll
        for (int i = 0; i < n; ++i) part[i] = Accumulator<T>(x[j + i]);
        Pack<T, n> pack;
        pack.set(part);
        store(to + j, pack);
      }
    } else {
#pragma unroll
      for (int j = 0; j < kTurn<A>; ++j) {
        if (turn.has(j)) to[j * turn.step] = narrow<T>(Accumulator<T>(x[j]));
      }
    }
  });
}

}  // namespace at_fused
