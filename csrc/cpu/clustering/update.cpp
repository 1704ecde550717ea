#include <algorithm>
#include <vector>

#include "../half.h"
#include "../../kmq.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kChunk = 1 << 16;  // values of one partial sum: fixed, so that the order of additions is

double wide(float x) { return x; }
double wide(double x) { return x; }
double wide(bf16 x) { return float(x); }
double wide(f16 x) { return float(x); }

template <typename F>
void with_type(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::f32: return run(float{});
    case Dtype::f64: return run(double{});
    case Dtype::bf16: return run(bf16{});
    case Dtype::f16: return run(f16{});
  }
}

}  // namespace

void update(const void* values, Dtype dtype, const uint8_t* assignments, const void* sample_weight, Dtype weight_dtype, int64_t batch,
            int64_t n, int num_centroids, double* sums, double* weights, const Parallel& parallel) {
  const int64_t chunks = (n + kChunk - 1) / kChunk, K = num_centroids;
  std::vector<double> partial(batch * chunks * 2 * K, 0.0);
  parallel(batch * chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t problem = task / chunks, first = problem * n + task % chunks * kChunk;
      const int64_t last = std::min(first + kChunk, (problem + 1) * n);
      double *sum = partial.data() + task * 2 * K, *weight = sum + K;
      with_type(dtype, [&](auto value_type) {
        const auto* x = static_cast<const decltype(value_type)*>(values);
        // An assignment that is out of range, which no check has seen, must not write out of bounds.
        if (!sample_weight) {
          for (int64_t i = first; i < last; ++i) {
            if (assignments[i] >= K) continue;
            sum[assignments[i]] += wide(x[i]);
            weight[assignments[i]] += 1;
          }
          return;
        }
        with_type(weight_dtype, [&](auto weight_type) {
          const auto* w = static_cast<const decltype(weight_type)*>(sample_weight);
          for (int64_t i = first; i < last; ++i) {
            if (assignments[i] >= K) continue;
            sum[assignments[i]] += wide(w[i]) * wide(x[i]);
            weight[assignments[i]] += wide(w[i]);
          }
        });
      });
    }
  });
  std::fill(sums, sums + batch * K, 0.0);
  std::fill(weights, weights + batch * K, 0.0);
  for (int64_t task = 0; task < batch * chunks; ++task)
    for (int64_t k = 0; k < K; ++k) {
      sums[task / chunks * K + k] += partial[task * 2 * K + k];
      weights[task / chunks * K + k] += partial[task * 2 * K + K + k];
    }
}

}  // namespace kmq::cpu
