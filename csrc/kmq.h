// The contract of the compiled code: every launcher, over raw pointers. No torch header here nor in any file but bindings.cpp.
//
// A packed matrix is drawn in kmq_kernels/packing.py. Row r of a weight uses codebook r / group_rows.
#pragma once
#include <cstdint>
#include <functional>
#include <vector>

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

// The instruction set that the kernels use on this machine: "amx" (of which only the integer linear layer knows, all else is "avx512"),
// "avx512", "avxvnni" (likewise, all else is "avx2"), "avx2" or "scalar". KMQ_CPU_PATH in the environment lowers it, and is
// read once; throws std::runtime_error where it names what is not there.
const char* path();

// Whether AVX2, FMA and F16C may be used; also true on the paths above.
bool avx2();

// Whether that is so, AVX-512 is not used, and sums of products of 16-bit integers are one instruction of 256 bits: the "avxvnni" path.
bool avxvnni();

// Whether AVX-512 F, BW, DQ and VL, and BMI2, may be used.
bool avx512();

// Whether AVX-512 VNNI and VBMI may be used too.
bool vnni();

// Whether the tiles of AMX may be used for integers beside all of vnni(), the "amx" path.
bool amx();

// weight [rows, cols] = codebook [G, K] at the indices; both of dtype.
void dequantize(const Packed& packed, const void* codebook, Dtype dtype, int64_t group_rows, void* weight, const Parallel& parallel);

// Rows of `cols` indices to packed rows and back.
void pack(const uint8_t* assignments, int64_t rows, int64_t cols, int bits, uint8_t* packed, const Parallel& parallel);
void unpack(const Packed& packed, uint8_t* assignments, const Parallel& parallel);

// out [count, cols] = the rows `ids` of the weight, each id in [0, rows); codebook [G, K] and out of dtype.
void codebook_embedding(const int64_t* ids, int64_t count, const Packed& packed, const void* codebook, Dtype dtype,
                        int64_t group_rows, void* out, const Parallel& parallel);

// output [M, rows] = input [M, cols] @ weight.T + bias; input and output of dtype (not fp64), computed in fp32; bias [rows] or null.
void codebook_linear(const void* input, Dtype dtype, int64_t M, const Packed& packed, const float* codebook, int64_t group_rows,
                     const float* bias, void* output, const Parallel& parallel);

enum class Activation { none, gelu, gelu_tanh, relu, silu };

// A packed weight [rows, cols] with all that a layer adds to it. table, factor and row_sum are for integer arithmetic, see
// int8_codebook; without a table the weight is computed with in fp32.
struct LinearWeight {
  Packed packed;
  int64_t group_rows;
  const float* codebook;    // [G, K], fp32 arithmetic only
  const int8_t* table;      // [G, K] or null
  const float* factor;      // [rows]: the scale of the table, times row_scale
  const int32_t* row_sum;   // [rows]
  const float* row_scale;   // [rows] or null; fp32 arithmetic only
  const float* bias;        // [rows] or null
  const int32_t* outlier_index;  // [outliers], ascending flat positions
  const float* outlier_delta;    // [outliers]: what is missing there from the decoded weight
  int64_t outliers;
};

constexpr int kInt8Limit = 127;       // of the magnitudes in a table
constexpr int64_t kInt8Cols = 32768;  // more columns could overflow a sum

// A codebook [G, K] in integers: codebook ~ scale [G] * table [G, K], the scale being, of some tried, the one with the least squared
// error over the weights themselves, their mean weighted more; where entries of a few weights (one, or a 4096th at most) are twice as large
// as all others, those more than 1.4 times as large are 0 in the table, and are left to the outliers; and row_sum [rows], the sum of each
// row's entries of the table. A codebook that is not finite has the scale NaN.
void int8_codebook(const Packed& packed, const float* codebook, int64_t group_rows, int8_t* table, float* scale, int32_t* row_sum,
                   const Parallel& parallel);

// As codebook_linear, with the input rounded row by row to integers (see linear/int8.h) and exact integer sums.
void int8_linear(const void* input, Dtype dtype, int64_t M, const LinearWeight& weight, Activation activation, void* output,
                 const Parallel& parallel);

// A normalization of rows: (x - mean) / sqrt(variance + eps) * weight + bias; bias null for none, weight null for no normalization.
struct Norm {
  const float* weight;
  const float* bias;
  float eps;
};

// Rows of an embedding: `dense` [rows, cols], or packed with a codebook.
struct EmbeddingTable {
  const float* dense;
  Packed packed;
  int64_t group_rows;
  const float* codebook;
  const float* row_scale;        // [rows] or null
  const int32_t* outlier_index;  // [outliers], ascending flat positions
  const float* outlier_values;   // [outliers]: what stands there
  int64_t outliers, rows, cols;
};

// Which row of an embedding a token takes.
enum class TokenIds {
  given,    // the ids given for it, or row 0 where none are
  columns,  // the ids given, or else the place in the text
  counted,  // the ids given, or else padding + the number of tokens so far whose first id is not `padding` (of such a token: padding)
};

struct EncoderLayer {
  std::vector<LinearWeight> qkv;  // three, or one that holds the rows of all
  LinearWeight out, up, down;
  Norm attention_norm, output_norm;
  const float* rotary;  // [rotary_length, head_dim]: cosines, then sines, of half the head each; or null
  int64_t rotary_length;
  int64_t window;  // a token sees others at most so far away; 0 for all
};

// An encoder of the BERT family. Texts go through embeddings, their sum normalized, an optional projection, and layers of attention
// and two linear layers, with a normalization behind each half's sum with its input or before each half.
struct Encoder {
  int64_t hidden, heads;
  Activation activation;
  bool norm_first;
  bool gated;  // `up` has rows for a factor of the activated half
  std::vector<EmbeddingTable> embeddings;
  std::vector<TokenIds> ids;  // of each embedding
  int64_t padding;
  Norm embedding_norm;
  LinearWeight projection;  // packed.rows is 0 where there is none
  std::vector<EncoderLayer> layers;
  std::vector<int64_t> order;  // of the layers, which may run more than once
  Norm final_norm;
  const float* relative_bias;  // [heads, 2 * reach + 1], added to scores by key's place - query's place; or null
  int64_t reach;
};

struct EncoderInput {
  int64_t batch, length;
  std::vector<const int64_t*> ids;  // for each embedding [batch, length], or null
  const uint8_t* mask;              // [batch, length], 0 for a place without a token; or null
};

// out [batch, length, hidden] of the last layer, zeros where there is no token. Only tokens are computed. Throws std::out_of_range for
// ids beyond an embedding, or a text beyond `reach` or a rotary table. `threads` is how many run what `parallel` is given.
void encode(const Encoder& encoder, const EncoderInput& input, float* out, int threads, const Parallel& parallel);

// grad_input [M, cols] = grad_output [M, rows] @ weight; both of dtype (not fp64), computed in fp32.
void codebook_linear_input_grad(const void* grad_output, Dtype dtype, int64_t M, const Packed& packed, const float* codebook,
                                int64_t group_rows, void* grad_input, const Parallel& parallel);

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

// assignments [B, N] = nearest of centroids [B, K] (ascending) to values [B, N]; values and centroids of dtype, f32 or f64, or
// values of 16 bits with centroids f32.
void assign(const void* values, Dtype dtype, const void* centroids, int64_t batch, int64_t n, int num_centroids, uint8_t* assignments,
            const Parallel& parallel);

// sums, weights [B, K] fp64 += weight * value and weight over the members; sample_weight [B, N] of weight_dtype, or null for ones.
void update(const void* values, Dtype dtype, const uint8_t* assignments, const void* sample_weight, Dtype weight_dtype, int64_t batch,
            int64_t n, int num_centroids, double* sums, double* weights, const Parallel& parallel);

enum class KmeansAlgorithm { optimal, lloyd, exact };
enum class KmeansInit { plus_plus, linear, random, quantile };
enum class KmeansFault { none, values_not_finite, weights_not_finite, weights_negative, weights_zero };

struct KmeansOptions {
  KmeansAlgorithm algorithm;
  KmeansInit init;
  int64_t max_iter;
  double tol;
  uint64_t seed;
};

// Values [rows, cols] of dtype f32, bf16 or f16; group_rows rows share one problem, so there are G = ceil(rows / group_rows).
struct KmeansMatrix {
  const void* values;
  Dtype dtype;
  const float* sample_weight;  // [rows, cols] or null
  int64_t rows, cols, group_rows;
  int num_centroids;
  int bits;              // labels are packed with so many bits; 0 leaves them one byte each
  uint8_t* labels;       // [rows, row_bytes] or [rows, cols]
  float* centroids;      // [G, K]
  double* inertia;       // [G]
  int64_t* n_iter;       // [G]
  double* bound;         // [G]
  KmeansFault fault;     // out: the first fault of any problem; the other outputs of the matrix are then undefined
};

void kmeans(KmeansMatrix* matrices, int64_t count, const KmeansOptions& options, const Parallel& parallel);

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
