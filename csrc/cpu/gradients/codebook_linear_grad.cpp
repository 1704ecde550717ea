// The weight gradient is computed in tiles that stay in the second-level cache, and each is reduced into its codebooks at once:
// a tile of kTileOut x kTileIn (192 KiB) beside the packed operands of one step, 96 + 128 KiB.
#include <vector>

#include "cluster_sums.h"
#include "../linear/gemm.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kTileOut = 192, kTileIn = 256, kStep = 128;
static_assert(kTileIn % kBlock == 0);

template <typename T>
struct Problem {
  const T *grad_output, *input;  // [M, OUT], [M, IN]
  int64_t M, OUT, IN;
};

// tile [rows, kTileIn] = the weight gradient at (out, in) .. (out + rows, in + cols).
template <typename Gemm, typename T>
void multiply(const Problem<T>& p, int64_t out, int64_t rows, int64_t in, int64_t cols, float* tile, float* panels) {
  constexpr int64_t R = Gemm::kRows, W = Gemm::kCols;
  static_assert(kTileOut % R == 0 && kTileIn % W == 0);
  float *a = panels, *b = a + kStep * kTileOut;
  for (int64_t m = 0; m < p.M; m += kStep) {
    const int64_t depth = std::min(kStep, p.M - m);
    const T *left = p.grad_output + m * p.OUT + out, *right = p.input + m * p.IN + in;
    for (int64_t i = 0; i < rows; i += R) Gemm::template pack_cols<R>(left + i, p.OUT, std::min(R, rows - i), depth, a + i * depth);
    for (int64_t j = 0; j < cols; j += W) Gemm::template pack_cols<W>(right + j, p.IN, std::min(W, cols - j), depth, b + j * depth);
    for (int64_t j = 0; j < cols; j += W)
      for (int64_t i = 0; i < rows; i += R)
        Gemm::template tile<1, R>(std::min(R, rows - i), depth, a + i * depth, b + j * depth, tile + i * kTileIn + j, kTileIn, cols - j,
                                  nullptr, m > 0);
  }
}

template <typename T>
void fill_tile(const Problem<T>& p, int64_t out, int64_t rows, int64_t in, int64_t cols, float* tile, Scratch& panels) {
  if (!panels) panels = scratch(kStep * (kTileOut + kTileIn));
  with_gemm([&](auto gemm) { multiply<decltype(gemm)>(p, out, rows, in, cols, tile, panels.get()); });
}

void fill_tile(const Problem<double>& p, int64_t out, int64_t rows, int64_t in, int64_t cols, double* tile, Scratch&) {
  std::fill(tile, tile + rows * kTileIn, 0.0);
  for (int64_t m = 0; m < p.M; ++m)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) tile[i * kTileIn + j] += p.grad_output[m * p.OUT + out + i] * p.input[m * p.IN + in + j];
}

template <typename T>
void run(const void* grad_output, const void* input, int64_t M, const Packed& packed, int64_t num_codebooks, int64_t group_rows,
         void* out, const Parallel& parallel) {
  using Wide = std::conditional_t<sizeof(T) == 8, double, float>;
  const Problem<T> problem{static_cast<const T*>(grad_output), static_cast<const T*>(input), M, packed.rows, packed.cols};
  const int64_t K = int64_t(1) << packed.bits, across = (packed.cols + kTileIn - 1) / kTileIn;
  const int64_t tasks = M == 0 ? 0 : (packed.rows + kTileOut - 1) / kTileOut * across;
  // Partial sums of a task: one codebook after the other, from that of its first row on.
  const int64_t books = std::min(num_codebooks, (kTileOut - 1) / group_rows + 2);
  std::vector<double> partial(tasks * books * K, 0.0);
  parallel(tasks, 1, [&](int64_t begin_task, int64_t end_task) {
    std::vector<Wide> tile(kTileOut * kTileIn);
    Scratch panels;
    for (int64_t task = begin_task; task < end_task; ++task) {
      const int64_t first = task / across * kTileOut, last = std::min(first + kTileOut, packed.rows);
      const int64_t in = task % across * kTileIn, cols = std::min(kTileIn, packed.cols - in);
      fill_tile(problem, first, last - first, in, cols, tile.data(), panels);
      const uint8_t* blocks = packed.data + in / kBlock * kLanes * packed.bits;
      for (int64_t row = first; row < last;) {
        const int64_t group = row / group_rows, end = std::min(last, (group + 1) * group_rows);
        double* book = partial.data() + (task * books + group - first / group_rows) * K;
        ClusterSums sums(packed.bits, book, (end - row) * cols);
        for (; row < end; ++row) sums.add(tile.data() + (row - first) * kTileIn, blocks + row * packed.row_bytes(), cols);
        sums.finish();
      }
    }
  });
  std::vector<double> total(num_codebooks * K, 0.0);
  for (int64_t task = 0; task < tasks; ++task) {
    const int64_t first = task / across * kTileOut / group_rows;
    for (int64_t i = 0; i < std::min(books, num_codebooks - first) * K; ++i) total[first * K + i] += partial[task * books * K + i];
  }
  for (int64_t i = 0; i < num_codebooks * K; ++i) static_cast<Wide*>(out)[i] = static_cast<Wide>(total[i]);
}

}  // namespace

void codebook_linear_grad(const void* grad_output, const void* input, Dtype dtype, int64_t M, const Packed& packed,
                          int64_t num_codebooks, int64_t group_rows, void* out, const Parallel& parallel) {
  const auto kernel = dtype == Dtype::f32 ? &run<float> : dtype == Dtype::f64 ? &run<double> : dtype == Dtype::bf16 ? &run<bf16> : &run<f16>;
  kernel(grad_output, input, M, packed, num_codebooks, group_rows, out, parallel);
}

}  // namespace kmq::cpu
