// CUDA's vector types. They have constructors where CUDA's are aggregates: g++ would split
// *p = uint4{...} into four stores, and the harness is to see the one that the GPU makes.
#pragma once

#define SIMT_VEC1(name, T)                 \
  struct name {                            \
    T x;                                   \
    name() = default;                      \
    constexpr explicit name(T a) : x(a) {} \
  };                                       \
  inline name make_##name(T a) { return name(a); }
#define SIMT_VEC2(name, T, align)            \
  struct alignas(align) name {               \
    T x, y;                                  \
    name() = default;                        \
    constexpr name(T a, T b) : x(a), y(b) {} \
  };                                         \
  inline name make_##name(T a, T b) { return name(a, b); }
#define SIMT_VEC3(name, T)                              \
  struct name {                                         \
    T x, y, z;                                          \
    name() = default;                                   \
    constexpr name(T a, T b, T c) : x(a), y(b), z(c) {} \
  };                                                    \
  inline name make_##name(T a, T b, T c) { return name(a, b, c); }
#define SIMT_VEC4(name, T, align)                                  \
  struct alignas(align) name {                                     \
    T x, y, z, w;                                                  \
    name() = default;                                              \
    constexpr name(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {} \
  };                                                               \
  inline name make_##name(T a, T b, T c, T d) { return name(a, b, c, d); }
#define SIMT_VECS(name, T)             \
  SIMT_VEC1(name##1, T)                \
  SIMT_VEC2(name##2, T, 2 * sizeof(T)) \
  SIMT_VEC3(name##3, T)                \
  SIMT_VEC4(name##4, T, 4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T))

SIMT_VECS(char, signed char)
SIMT_VECS(uchar, unsigned char)
SIMT_VECS(short, short)
SIMT_VECS(ushort, unsigned short)
SIMT_VECS(int, int)
SIMT_VECS(uint, unsigned)
SIMT_VECS(longlong, long long)
SIMT_VECS(ulonglong, unsigned long long)
SIMT_VECS(float, float)
SIMT_VECS(double, double)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
