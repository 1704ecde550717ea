// Vectors of 16 numbers in the compiler's own terms: elementwise operations, which give the same bits on every path.
//
// A function written with them is KMQ_PLAIN and is inlined into one function for each path, where a vector is one AVX-512 register,
// two of AVX2, or four of the baseline: no call depends on how a target passes vectors (hence -Wno-psabi). Lanes are folded in halves, so
// that the order of a sum is the same everywhere too.
#pragma once
#include <cstring>

#include "simd.h"

namespace kmq::cpu {

template <typename T, int count>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * count)));
};
constexpr int64_t kWidth = 16;
using Floats = Vector<float, kWidth>::type;
using Ints = Vector<int32_t, kWidth>::type;

KMQ_PLAIN Floats load_floats(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// `count` of up to 16, and `other` behind them.
KMQ_PLAIN Floats load_floats(const float* from, int64_t count, float other = 0) {
  if (count >= kWidth) return load_floats(from);
  float lanes[kWidth];
  for (int64_t l = 0; l < kWidth; ++l) lanes[l] = l < count ? from[l] : other;
  return load_floats(lanes);
}

KMQ_PLAIN void store_floats(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

KMQ_PLAIN void store_floats(float* to, Floats x, int64_t count) {
  if (count >= kWidth) store_floats(to, x);
  else std::memcpy(to, &x, sizeof(float) * size_t(count));
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

template <typename Operation, typename T, int count = kWidth>
KMQ_PLAIN T fold(typename Vector<T, count>::type x) {
  if constexpr (count == 2) {
    return Operation::of(T(x[0]), T(x[1]));
  } else {
    typename Vector<T, count / 2>::type low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return fold<Operation, T, count / 2>(Operation::of(low, high));
  }
}

}  // namespace kmq::cpu
