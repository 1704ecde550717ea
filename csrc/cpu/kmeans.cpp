// The scheduler: all problems of all matrices, spread over threads across problems and inside large ones.
#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <memory>

#include "encode.h"
#include "kmeans.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kSmall = 16384;       // values; below, sorting costs less than clearing and reading a histogram
constexpr int64_t kWaveSegments = 16;   // histograms alive at a time: 0.3 MB each, 0.6 MB with weights
constexpr int64_t kPiece = 65536;       // values labelled by one task, whose errors are summed as one

struct Problem {
  KmeansMatrix* matrix;
  int64_t group, first_row, rows;
  int64_t size() const { return rows * matrix->cols; }
  int64_t start() const { return first_row * matrix->cols; }
  const void* values() const { return static_cast<const char*>(matrix->values) + start() * (matrix->dtype == Dtype::f32 ? 4 : 2); }
  const float* weight() const { return matrix->sample_weight ? matrix->sample_weight + start() : nullptr; }
  float* centroids() const { return matrix->centroids + group * matrix->num_centroids; }
};

struct Piece { int64_t row, rows, col, cols; };

std::vector<Piece> pieces_of(const Problem& problem) {
  std::vector<Piece> out;
  const int64_t cols = problem.matrix->cols;
  if (cols > kPiece) {
    for (int64_t row = 0; row < problem.rows; ++row)
      for (int64_t col = 0; col < cols; col += kPiece) out.push_back({row, 1, col, std::min(kPiece, cols - col)});
    return out;
  }
  const int64_t step = std::max<int64_t>(1, kPiece / cols);
  for (int64_t row = 0; row < problem.rows; row += step) out.push_back({row, std::min(step, problem.rows - row), 0, cols});
  return out;
}

// Labels one piece; returns its weighted squared error, and marks the centroids that have members where asked to.
double label(const Problem& problem, const Labeller& labeller, const Piece& piece, bool* used) {
  const KmeansMatrix& matrix = *problem.matrix;
  const int64_t item = matrix.dtype == Dtype::f32 ? 4 : 2;
  double error[8] = {};
  const auto run = [&](int64_t at, int64_t n, uint8_t* index) {
    labeller.run(static_cast<const char*>(matrix.values) + at * item, matrix.dtype,
                 matrix.sample_weight ? matrix.sample_weight + at : nullptr, n, index, error);
    if (used)
      for (int64_t i = 0; i < n; ++i) used[index[i]] = true;
  };
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t row = problem.first_row + piece.row + r, at = row * matrix.cols + piece.col;
    if (matrix.bits == 0) {
      run(at, piece.cols, matrix.labels + at);
      continue;
    }
    const int64_t block_bytes = kLanes * matrix.bits;
    uint8_t* block = matrix.labels + (row * ((matrix.cols + kBlock - 1) / kBlock) + piece.col / kBlock) * block_bytes;
    for (int64_t col = 0; col < piece.cols; col += kBlock, block += block_bytes) {
      uint8_t index[kBlock] = {};
      run(at + col, std::min(kBlock, piece.cols - col), index);
      encode_block(index, matrix.bits, block);
    }
  }
  double sum = 0;
  for (const double lane : error) sum += lane;
  return sum;
}

void store(const Problem& problem, const Solution& solution) {
  for (int k = 0; k < problem.matrix->num_centroids; ++k) problem.centroids()[k] = static_cast<float>(solution.centroids[k]);
  problem.matrix->n_iter[problem.group] = solution.n_iter;
}

void store_inertia(const Problem& problem, double lower_bound, double inertia) {
  problem.matrix->inertia[problem.group] = inertia;
  double bound = HUGE_VAL;
  if (lower_bound >= 0 && inertia <= lower_bound) bound = 1;
  else if (lower_bound > 0) bound = inertia / lower_bound;
  problem.matrix->bound[problem.group] = bound;
}

Labeller labeller_of(const Problem& problem) {
  float midpoints[256];
  const float* c = problem.centroids();
  for (int k = 0; k + 1 < problem.matrix->num_centroids; ++k) midpoints[k] = (c[k + 1] + c[k]) / 2;
  return Labeller(midpoints, c, problem.matrix->num_centroids);
}

// A cluster of three points has a value inside its cell whatever the spread of its points; so has one of a point without spread.
bool surely_used(const Points& points, const Solution& solution) {
  if (points.spread.empty()) return true;
  for (size_t k = 0; k + 1 < solution.edges.size(); ++k) {
    const int64_t i = solution.edges[k];
    if (solution.edges[k + 1] - i < 3 && points.spread[i] > 0) return false;
  }
  return true;
}

KmeansFault solve_sorted(const Problem& problem, const KmeansOptions& options, double& lower_bound) {
  Points points;
  const KmeansFault fault = sorted_points(problem.values(), problem.matrix->dtype, problem.weight(), problem.size(), points);
  if (fault != KmeansFault::none) return fault;
  const Solution solution = solve(points, problem.matrix->num_centroids, options);
  store(problem, solution);
  lower_bound = solution.lower_bound;
  return fault;
}

// Calls body(i) for each i in [0, n), each thread taking the next one when it is free.
void each(int64_t n, const Parallel& parallel, const std::function<void(int64_t)>& body) {
  std::atomic<int64_t> next{0};
  parallel(n, 1, [&](int64_t begin, int64_t end) {
    for (int64_t turn = begin; turn < end; ++turn) body(next++);
  });
}

struct Large {
  Problem problem;
  std::unique_ptr<Histogram> histogram;
  double lower_bound = 0;
  bool check_used = false;
  KmeansFault fault = KmeansFault::none;
};

struct Task { size_t large; Piece piece; double error; };

void run_wave(std::vector<Large>& wave, const KmeansOptions& options, const Parallel& parallel) {
  const bool counted = options.algorithm == KmeansAlgorithm::optimal;
  std::vector<std::pair<Histogram*, int64_t>> segments;
  if (counted)
    for (Large& large : wave) {
      large.histogram =
          std::make_unique<Histogram>(large.problem.values(), large.problem.matrix->dtype, large.problem.weight(), large.problem.size());
      for (int64_t s = 0; s < large.histogram->segments(); ++s) segments.emplace_back(large.histogram.get(), s);
    }
  each(static_cast<int64_t>(segments.size()), parallel, [&](int64_t i) { segments[i].first->count(segments[i].second); });
  each(static_cast<int64_t>(wave.size()), parallel, [&](int64_t i) {
    Large& large = wave[i];
    if (!counted) {
      large.fault = solve_sorted(large.problem, options, large.lower_bound);
      return;
    }
    Points points;
    large.fault = large.histogram->points(points);
    large.histogram.reset();
    if (large.fault != KmeansFault::none) return;
    const Solution solution = solve(points, large.problem.matrix->num_centroids, options);
    store(large.problem, solution);
    large.lower_bound = solution.lower_bound;
    large.check_used = !surely_used(points, solution);
  });
  std::vector<Labeller> labellers;
  std::vector<Task> tasks;
  std::vector<std::array<bool, 256>> used(wave.size());
  for (size_t i = 0; i < wave.size(); ++i) {
    used[i].fill(false);
    if (wave[i].fault != KmeansFault::none) {
      if (wave[i].problem.matrix->fault == KmeansFault::none) wave[i].problem.matrix->fault = wave[i].fault;
      continue;
    }
    for (const Piece& piece : pieces_of(wave[i].problem)) tasks.push_back({i, piece, 0});
  }
  for (const Large& large : wave) {
    if (large.fault != KmeansFault::none) std::fill_n(large.problem.centroids(), large.problem.matrix->num_centroids, 0.0f);
    labellers.push_back(labeller_of(large.problem));
  }
  each(static_cast<int64_t>(tasks.size()), parallel, [&](int64_t i) {
    Task& task = tasks[i];
    const Large& large = wave[task.large];
    task.error = label(large.problem, labellers[task.large], task.piece, nullptr);
  });
  std::vector<double> inertia(wave.size(), 0.0);
  for (const Task& task : tasks) inertia[task.large] += task.error;
  for (size_t i = 0; i < wave.size(); ++i) {
    Large& large = wave[i];
    if (large.fault != KmeansFault::none) continue;
    if (large.check_used) {
      const int K = large.problem.matrix->num_centroids;
      for (const Task& task : tasks)
        if (task.large == i) label(large.problem, labellers[i], task.piece, used[i].data());
      if (std::find(used[i].begin(), used[i].begin() + K, false) != used[i].begin() + K) {
        // The bins were too wide for these centroids.
        solve_sorted(large.problem, options, large.lower_bound);
        const Labeller labeller = labeller_of(large.problem);
        inertia[i] = 0;
        for (const Task& task : tasks)
          if (task.large == i) inertia[i] += label(large.problem, labeller, task.piece, nullptr);
      }
    }
    store_inertia(large.problem, large.lower_bound, inertia[i]);
  }
  wave.clear();
}

}  // namespace

void kmeans(KmeansMatrix* matrices, int64_t count, const KmeansOptions& options, const Parallel& parallel) {
  std::vector<Problem> small;
  std::vector<Large> wave;
  int64_t segments = 0;
  for (int64_t m = 0; m < count; ++m) {
    KmeansMatrix& matrix = matrices[m];
    matrix.fault = KmeansFault::none;
    for (int64_t row = 0; row < matrix.rows; row += matrix.group_rows) {
      const Problem problem{&matrix, row / matrix.group_rows, row, std::min(matrix.group_rows, matrix.rows - row)};
      if (problem.size() <= kSmall) {
        small.push_back(problem);
        continue;
      }
      wave.push_back(Large{problem, nullptr});
      segments += (problem.size() + Histogram::kSegment - 1) / Histogram::kSegment;
      if (segments >= kWaveSegments) {
        run_wave(wave, options, parallel);
        segments = 0;
      }
    }
  }
  if (!wave.empty()) run_wave(wave, options, parallel);
  std::vector<KmeansFault> faults(small.size(), KmeansFault::none);
  each(static_cast<int64_t>(small.size()), parallel, [&](int64_t i) {
    const Problem& problem = small[i];
    double lower_bound = 0, inertia = 0;
    faults[i] = solve_sorted(problem, options, lower_bound);
    if (faults[i] != KmeansFault::none) return;
    const Labeller labeller = labeller_of(problem);
    for (const Piece& piece : pieces_of(problem)) inertia += label(problem, labeller, piece, nullptr);
    store_inertia(problem, lower_bound, inertia);
  });
  for (size_t i = 0; i < small.size(); ++i)
    if (faults[i] != KmeansFault::none && small[i].matrix->fault == KmeansFault::none) small[i].matrix->fault = faults[i];
}

}  // namespace kmq::cpu
