// codebook_grad in two stages, without atomics: the order of additions depends on the shape alone.
//
//   1. A block sums one piece of a codebook's rows. A thread takes a quarter of a packed block at a time, 4 lanes of 8 columns
//      (see kmq_kernels/packing.py), and adds its values to a column of its own in shared memory, sums[k][thread]; then the
//      columns are added in a fixed order and written to the workspace [tasks, K] in fp64.
//   2. A warp adds the pieces of one output in a fixed order.
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

#include "../kmq.h"

namespace kmq::cuda {
namespace {

constexpr int64_t kPiece = 16384;         // values of a task, about
constexpr int64_t kSharedBytes = 32768;   // of private sums
constexpr int64_t kMostBlocks = 1 << 20;  // of a grid; the rest is a loop
constexpr int kQuarters = 4;              // threads of a packed block

struct Task {
  int64_t rows, group_rows, piece, per_group, count;
};

Task tasks_of(const Packed& packed, int64_t num_codebooks, int64_t group_rows) {
  Task task{packed.rows, group_rows < packed.rows ? group_rows : packed.rows, 1 + kPiece / (packed.cols + 1), 0, 0};
  task.per_group = (task.group_rows + task.piece - 1) / task.piece;
  task.count = num_codebooks * task.per_group;
  return task;
}

struct Bf16 {
  uint16_t raw;
};
struct F16 {
  uint16_t raw;
};

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(Bf16 x) { return __uint_as_float(uint32_t(x.raw) << 16); }
__device__ __forceinline__ float widen(F16 x) { return __half2float(__half(__half_raw{x.raw})); }

template <typename T>
struct alignas(sizeof(T) == 8 ? 16 : 4 * sizeof(T)) Four {
  T x[4];
};

// The indices of 4 lanes, 32 columns: one word for each bit of an index.
template <int bits>
struct Codes {
  uint32_t word[bits];

  // `block` is 16-byte aligned.
  __device__ __forceinline__ void load(const uint8_t* block, int quarter) {
    load_plane<bits, 0>(block, quarter);
  }

  template <int left, int at>
  __device__ __forceinline__ void load_plane(const uint8_t* plane, int quarter) {
    if constexpr (left > 0) {
      constexpr int width = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      if constexpr (width == 4) {
        const uint4 w = *(reinterpret_cast<const uint4*>(plane) + quarter);
        word[at] = w.x, word[at + 1] = w.y, word[at + 2] = w.z, word[at + 3] = w.w;
      } else if constexpr (width == 2) {
        const uint2 w = *(reinterpret_cast<const uint2*>(plane) + quarter);
        word[at] = w.x, word[at + 1] = w.y;
      } else {
        word[at] = *(reinterpret_cast<const uint32_t*>(plane) + quarter);
      }
      load_plane<left - width, at + width>(plane + kLanes * width, quarter);
    }
  }

  // Field j of the lane: the index of column 16 * j + 4 * quarter + lane.
  __device__ __forceinline__ uint32_t index(int lane, int j) const { return plane_index<bits, 0>(lane, j); }

  template <int left, int at>
  __device__ __forceinline__ uint32_t plane_index(int lane, int j) const {
    if constexpr (left == 0) {
      return 0;
    } else {
      constexpr int width = left >= 4 ? 4 : left >= 2 ? 2 : 1, lanes_a_word = 4 / width;
      const uint32_t w = word[at + lane / lanes_a_word] >> (lane % lanes_a_word * 8 * width + j * width);
      return (w & ((1u << width) - 1)) << at | plane_index<left - width, at + width>(lane, j);
    }
  }
};

template <typename T, int bits, typename Wide>
__global__ void __launch_bounds__(256, 1) sum_pieces(const T* __restrict__ grad, const uint8_t* __restrict__ packed, int64_t cols,
                                                  int64_t row_bytes, Task task, bool aligned, double* __restrict__ partial) {
  extern __shared__ __align__(16) unsigned char shared[];
  constexpr int K = 1 << bits;
  Wide* const sums = reinterpret_cast<Wide*>(shared);  // [K, threads]
  const int threads = blockDim.x, thread = threadIdx.x;
  const int64_t units = (cols + kBlock - 1) / kBlock * kQuarters;  // of a row
  for (int64_t t = blockIdx.x; t < task.count; t += gridDim.x) {
    for (int k = 0; k < K; ++k) sums[k * threads + thread] = Wide(0);
    const int64_t group = t / task.per_group, first = group * task.group_rows;
    const int64_t group_end = first + task.group_rows < task.rows ? first + task.group_rows : task.rows;
    const int64_t begin = first + t % task.per_group * task.piece;
    const int64_t end = begin + task.piece < group_end ? begin + task.piece : group_end;
    for (int64_t unit = thread; unit < (end - begin) * units; unit += threads) {
      const int64_t row = begin + unit / units, block = unit % units / kQuarters;
      const int quarter = int(unit % kQuarters);
      Codes<bits> codes;
      codes.load(packed + row * row_bytes + block * kLanes * bits, quarter);
      const int64_t col = block * kBlock + 4 * quarter;
      const T* source = grad + row * cols + col;
      if (aligned && block * kBlock + kBlock <= cols) {
        // Half of the fields at a time: more loads in flight would spill.
#pragma unroll 1
        for (int first_field = 0; first_field < 8; first_field += 4) {
          Four<T> values[4];
#pragma unroll
          for (int j = 0; j < 4; ++j) values[j] = *reinterpret_cast<const Four<T>*>(source + kLanes * (first_field + j));
#pragma unroll
          for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int lane = 0; lane < 4; ++lane)
              sums[codes.index(lane, first_field + j) * threads + thread] += widen(values[j].x[lane]);
        }
      } else {
#pragma unroll 1
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int lane = 0; lane < 4; ++lane)
            if (col + kLanes * j + lane < cols)
              sums[codes.index(lane, j) * threads + thread] += widen(source[kLanes * j + lane]);
      }
    }
    __syncthreads();
    // `split` threads add the columns of one centroid, then one adds theirs.
    const int split = threads > K ? threads / K : 1;
    for (int i = thread; i < K * split; i += threads) {
      const int k = i / split;
      double sum = 0.0;
      for (int column = i % split; column < threads; column += split) sum += sums[k * threads + column];
      if (split == 1) partial[t * K + k] = sum;
      else sums[k * threads + i % split] = Wide(sum);  // read by no other thread before the barrier
    }
    __syncthreads();
    if (split > 1 && thread < K) {
      double sum = 0.0;
      for (int part = 0; part < split; ++part) sum += sums[thread * threads + part];
      partial[t * K + thread] = sum;
    }
    __syncthreads();
  }
}

template <typename Wide>
__global__ void __launch_bounds__(128) add_pieces(const double* __restrict__ partial, int64_t per_group, int64_t K, int64_t outputs,
                                                  Wide* __restrict__ out) {
  const int lane = threadIdx.x % 32;
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  for (int64_t o = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32; o < outputs; o += warps) {
    double sum = 0.0;
    for (int64_t piece = lane; piece < per_group; piece += 32) sum += partial[(o / K * per_group + piece) * K + o % K];
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
    if (lane == 0) out[o] = Wide(sum);
  }
}

template <typename T, int bits>
void launch(const void* grad, const Packed& packed, int64_t num_codebooks, int64_t group_rows, double* workspace, void* out,
            cudaStream_t stream) {
  using Wide = std::conditional_t<sizeof(T) == 8, double, float>;
  const int64_t K = int64_t(1) << bits;
  const Task task = tasks_of(packed, num_codebooks, group_rows);
  const int64_t piece_rows = task.piece < task.group_rows ? task.piece : task.group_rows;
  const int64_t units = piece_rows * ((packed.cols + kBlock - 1) / kBlock) * kQuarters;
  int64_t threads = kSharedBytes / (K * int64_t(sizeof(Wide)));
  if (threads > 256) threads = 256;
  while (threads > 32 && threads / 2 >= units) threads /= 2;
  const bool aligned = packed.cols % 4 == 0 && reinterpret_cast<uintptr_t>(grad) % sizeof(Four<T>) == 0;
  const unsigned grid = unsigned(task.count < kMostBlocks ? task.count : kMostBlocks);
  const size_t bytes = K * threads * sizeof(Wide);
  if (task.count > 0)
    sum_pieces<T, bits, Wide><<<grid, unsigned(threads), bytes, stream>>>(
        static_cast<const T*>(grad), packed.data, packed.cols, packed.row_bytes(), task, aligned, workspace);
  const int64_t outputs = num_codebooks * K, blocks = (outputs + 3) / 4;
  const unsigned out_grid = unsigned(blocks < kMostBlocks ? blocks : kMostBlocks);
  if (outputs > 0)
    add_pieces<Wide><<<out_grid, 128, 0, stream>>>(workspace, task.per_group, K, outputs, static_cast<Wide*>(out));
}

template <typename T>
void launch(const void* grad, const Packed& packed, int64_t num_codebooks, int64_t group_rows, double* workspace, void* out,
            cudaStream_t stream) {
  switch (packed.bits) {
    case 1: return launch<T, 1>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case 2: return launch<T, 2>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case 3: return launch<T, 3>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case 4: return launch<T, 4>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case 5: return launch<T, 5>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case 6: return launch<T, 6>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case 7: return launch<T, 7>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    default: return launch<T, 8>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
  }
}

}  // namespace

int64_t codebook_grad_workspace(const Packed& packed, int64_t num_codebooks, int64_t group_rows) {
  return tasks_of(packed, num_codebooks, group_rows).count << packed.bits;
}

void codebook_grad(const void* grad, Dtype dtype, const Packed& packed, int64_t num_codebooks, int64_t group_rows,
                   double* workspace, void* out, CUstream_st* stream) {
  switch (dtype) {
    case Dtype::f32: return launch<float>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case Dtype::f64: return launch<double>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case Dtype::bf16: return launch<Bf16>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
    case Dtype::f16: return launch<F16>(grad, packed, num_codebooks, group_rows, workspace, out, stream);
  }
}

}  // namespace kmq::cuda
