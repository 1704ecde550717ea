// Vectors of W numbers in the compiler's own terms: elementwise operations, which give the same bits on every path.
//
// A function written with them is KMQ_PLAIN and is inlined into one function for each path, where W is what a register of the path holds:
// 16 on AVX-512, 8 on AVX2, 4 elsewhere. No call depends on how a target passes vectors (hence -Wno-psabi). Where numbers of a
// row are folded, 16 of them are kept apart on every path, in 16 / W vectors, so that the order of a sum is the same everywhere too.
#pragma once
#include <cstring>

#include "simd.h"

namespace kmq::cpu {

constexpr int64_t kWidth = 16;  // numbers that are kept apart
constexpr int kWidthAvx512 = 16, kWidthAvx2 = 8, kWidthScalar = 4;

template <typename T, int W>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};
template <int W>
using Floats = typename Vector<float, W>::type;
template <int W>
using Ints = typename Vector<int32_t, W>::type;
template <int W>
using Bits = typename Vector<uint32_t, W>::type;  // bits of floats, in arithmetic that wraps

template <int W>
KMQ_PLAIN Floats<W> all(float x) {
  return Floats<W>{} + x;
}

template <int W>
KMQ_PLAIN Floats<W> load_floats(const float* from) {
  Floats<W> x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// `count` of up to W, and `other` behind them; none where count is not positive.
template <int W>
KMQ_PLAIN Floats<W> load_floats(const float* from, int64_t count, float other = 0) {
  if (count >= W) return load_floats<W>(from);
  float lanes[W];
  for (int64_t l = 0; l < W; ++l) lanes[l] = l < count ? from[l] : other;
  return load_floats<W>(lanes);
}

template <int W>
KMQ_PLAIN void store_floats(float* to, Floats<W> x) {
  std::memcpy(to, &x, sizeof x);
}

template <int W>
KMQ_PLAIN void store_floats(float* to, Floats<W> x, int64_t count) {
  if (count >= W) store_floats<W>(to, x);
  else if (count > 0) std::memcpy(to, &x, sizeof(float) * size_t(count));
}

// a * b + c, rounded once. The loop becomes one instruction, or, where the path has none, calls of the C library, which gives the same.
template <int W>
KMQ_PLAIN Floats<W> fused(Floats<W> a, Floats<W> b, Floats<W> c) {
  float x[W], y[W], z[W];
  std::memcpy(x, &a, sizeof x);
  std::memcpy(y, &b, sizeof y);
  std::memcpy(z, &c, sizeof z);
  for (int l = 0; l < W; ++l) z[l] = __builtin_fmaf(x[l], y[l], z[l]);
  std::memcpy(&c, z, sizeof z);
  return c;
}

// The second where the comparison does not hold, so also where a number is NaN.
struct Sum {
  template <typename T>
  KMQ_PLAIN static T of(T x, T y) {
    return x + y;
  }
};
struct Larger {
  template <typename T>
  KMQ_PLAIN static T of(T x, T y) {
    return x > y ? x : y;
  }
};
struct Smaller {
  template <typename T>
  KMQ_PLAIN static T of(T x, T y) {
    return x < y ? x : y;
  }
};

// 16 numbers that are kept apart, number 16 i + l of a row in lane l.
template <typename T, int W>
struct Sixteen {
  static constexpr int kParts = kWidth / W;
  typename Vector<T, W>::type part[kParts]{};

  KMQ_PLAIN explicit Sixteen(T x) {
    for (auto& p : part) p = typename Vector<T, W>::type{} + x;
  }

  // By halves: lane l with l + 8, then with l + 4, and so on.
  template <typename Operation>
  KMQ_PLAIN T fold() const {
    Sixteen x = *this;
    for (int n = kParts / 2; n > 0; n /= 2)
      for (int i = 0; i < n; ++i) x.part[i] = Operation::of(x.part[i], x.part[i + n]);
    return lanes<Operation, W>(x.part[0]);
  }

 private:
  template <typename Operation, int count>
  KMQ_PLAIN static T lanes(typename Vector<T, count>::type x) {
    if constexpr (count == 2) {
      return Operation::of(T(x[0]), T(x[1]));
    } else {
      typename Vector<T, count / 2>::type low, high;
      std::memcpy(&low, &x, sizeof low);
      std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
      return lanes<Operation, count / 2>(Operation::of(low, high));
    }
  }
};

}  // namespace kmq::cpu
