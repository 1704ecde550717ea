// The contract of the compiled code: every launcher, over raw pointers. No torch header here nor in any file but bindings.cpp.
//
// A packed matrix is drawn in kmq_kernels/packing.py. Row r of a weight uses codebook r / group_rows.
#pragma once
#include <cstdint>
#include <functional>

namespace kmq {

constexpr int64_t kBlock = 128;  // columns per block of a packed row
constexpr int64_t kLanes = 16;

enum class Dtype { f32, f64, bf16, f16 };

struct Packed {
  const uint8_t* data;  // [rows, row_bytes]
  int64_t rows, cols;
  int bits;
  int64_t row_bytes() const { return (cols + kBlock - 1) / kBlock * kLanes * bits; }
};

// Calls body(begin, end) over a partition of [0, n) into ranges of at least `grain` items, possibly on several threads.
// Results must not depend on the partition.
using Parallel = std::function<void(int64_t n, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body)>;

namespace cpu {

// The instruction set that the kernels use on this machine: "avx2" or "scalar".
const char* path();

// Whether that is "avx2" (with FMA and F16C). KMQ_CPU_PATH=scalar in the environment says no; it is read once.
bool avx2();

// weight [rows, cols] = codebook [G, K] at the indices; both of dtype.
void dequantize(const Packed& packed, const void* codebook, Dtype dtype, int64_t group_rows, void* weight, const Parallel& parallel);

// out [G, K] (fp64 for an fp64 gradient, else fp32) = sums of grad [rows, cols] over the members of each centroid.
void codebook_grad(const void* grad, Dtype dtype, const Packed& packed, int64_t num_codebooks, int64_t group_rows, void* out,
                   const Parallel& parallel);

// out [G, K] = the same sums for the weight gradient grad_output [M, OUT] ^T @ input [M, IN], which is never stored.
void codebook_linear_grad(const void* grad_output, const void* input, Dtype dtype, int64_t M, const Packed& packed,
                          int64_t num_codebooks, int64_t group_rows, void* out, const Parallel& parallel);

// out [G, K] = the same sums for the scatter of grad_output [count, cols] to the rows `ids`, without those of padding_idx.
// The ids lie in [0, rows).
void codebook_embedding_grad(const void* grad_output, Dtype dtype, const int64_t* ids, int64_t count, const Packed& packed,
                             int64_t num_codebooks, int64_t group_rows, int64_t padding_idx, void* out,
                             const Parallel& parallel);

}  // namespace cpu
}  // namespace kmq

struct CUstream_st;  // cudaStream_t points to one

namespace kmq::cuda {

// Doubles of workspace that codebook_grad needs; depends on the shape only.
int64_t codebook_grad_workspace(const Packed& packed, int64_t num_codebooks, int64_t group_rows);

// As cpu::codebook_grad, for device pointers; packed.data is 16-byte aligned. Launch errors are left to cudaGetLastError.
void codebook_grad(const void* grad, Dtype dtype, const Packed& packed, int64_t num_codebooks, int64_t group_rows,
                   double* workspace, void* out, CUstream_st* stream);

}  // namespace kmq::cuda
