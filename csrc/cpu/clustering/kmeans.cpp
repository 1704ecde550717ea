// The scheduler: all problems of all matrices, spread over threads across problems and inside large ones.
//
// A large problem is opened, its segments are counted, it is solved, the values near its edges are gathered from its segments and
// it is settled, its pieces are labelled. Each of these is a task; a thread
// takes the task that finishes what was begun before one that begins something, so that few histograms are alive and the values
// are labelled while they may still be in the cache. Small problems follow, a run of them a task.
#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <deque>
#include <exception>
#include <memory>
#include <mutex>
#include <numeric>

#include "kmeans.h"

namespace kmq::cpu {
namespace {

constexpr int64_t kRun = 32;       // small problems of one task
constexpr int kZoomed = 64;        // centroids; with more of them, values near an edge are a large part of all
constexpr double kBlurred = 4;     // a bound above which the bins of the histogram hide what counts, as where small values weigh most
constexpr int kMostGathers = 4;    // of one problem; one is nearly always enough
constexpr int64_t kPiece = 65536;  // values labelled by one task, whose errors are summed as one

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

// Labels one piece; returns its weighted squared error.
double label(const Problem& problem, const Labeller& labeller, const Piece& piece) {
  const KmeansMatrix& matrix = *problem.matrix;
  const int64_t item = matrix.dtype == Dtype::f32 ? 4 : 2, row_bytes = Packed{nullptr, matrix.rows, matrix.cols, matrix.bits}.row_bytes();
  double error[8] = {};
  for (int64_t r = 0; r < piece.rows; ++r) {
    const int64_t row = problem.first_row + piece.row + r, at = row * matrix.cols + piece.col;
    uint8_t* out = matrix.labels + (matrix.bits ? row * row_bytes + piece.col / kBlock * (kLanes * matrix.bits) : at);
    labeller.run(static_cast<const char*>(matrix.values) + at * item, matrix.dtype, matrix.sample_weight ? matrix.sample_weight + at : nullptr,
                 piece.cols, matrix.bits, out, error);
  }
  double sum = 0;
  for (const double lane : error) sum += lane;
  return sum;
}

Labeller labeller_of(const Problem& problem) {
  float midpoints[256];
  const float* c = problem.centroids();
  for (int k = 0; k + 1 < problem.matrix->num_centroids; ++k) midpoints[k] = std::midpoint(c[k], c[k + 1]);  // whose sum may be Inf
  return Labeller(midpoints, c, problem.matrix->num_centroids);
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

// A cluster of three points has a value inside its cell whatever the spread of its points; so has one of a point without spread.
bool surely_used(const Points& points, const Solution& solution) {
  if (points.spread.empty()) return true;
  for (size_t k = 0; k + 1 < solution.edges.size(); ++k) {
    const int64_t i = solution.edges[k];
    if (solution.edges[k + 1] - i < 3 && points.spread[i] > 0) return false;
  }
  return true;
}

// Whether every centroid is the nearest one of some value.
bool all_used(const Problem& problem, const Labeller& labeller) {
  const KmeansMatrix& matrix = *problem.matrix;
  const int64_t item = matrix.dtype == Dtype::f32 ? 4 : 2, n = problem.size();
  bool used[256] = {};
  uint8_t index[1024];
  double error[8] = {};
  for (int64_t i = 0; i < n; i += 1024) {
    const int64_t count = std::min<int64_t>(1024, n - i);
    labeller.run(static_cast<const char*>(problem.values()) + i * item, matrix.dtype, nullptr, count, 0, index, error);
    for (int64_t j = 0; j < count; ++j) used[index[j]] = true;
  }
  return std::find(used, used + matrix.num_centroids, false) == used + matrix.num_centroids;
}

KmeansFault solve_sorted(const Problem& problem, const KmeansOptions& options, Scratch& scratch, double& lower_bound) {
  const KmeansFault fault =
      sorted_points(problem.values(), problem.matrix->dtype, problem.weight(), problem.size(), scratch, scratch.points);
  if (fault != KmeansFault::none) return fault;
  solve(scratch.points, problem.matrix->num_centroids, options, scratch, scratch.solution);
  store(problem, scratch.solution);
  lower_bound = scratch.solution.lower_bound;
  return fault;
}

struct Large {
  Problem problem;
  KmeansFault fault = KmeansFault::none;
  double lower_bound = 0;
  std::unique_ptr<Histogram> histogram;
  Points points;
  Solution solution;
  Gathered gathered;
  Edges asked;                 // points whose values are being gathered
  int gathers = 0;
  std::unique_ptr<Labeller> labeller;
  std::vector<Piece> pieces;
  std::vector<double> errors;  // of the pieces, summed in their order
  int64_t left = 0;            // tasks of the present stage that are not done
};

class Schedule {
 public:
  Schedule(std::vector<Large>& large, const std::vector<Problem>& small, std::vector<KmeansFault>& small_faults, const KmeansOptions& options)
      : large_(large), small_(small), small_faults_(small_faults), options_(options),
        runs_((static_cast<int64_t>(small.size()) + kRun - 1) / kRun),
        left_(static_cast<int64_t>(large.size()) + runs_) {}

  // Works until all is done, beside other threads that do the same.
  void work() {
    Scratch scratch;
    try {
      while (std::function<void(Scratch&)> task = take()) task(scratch);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(mutex_);
      failed_ = true;
      changed_.notify_all();
      throw;
    }
  }

 private:
  using Task = std::function<void(Scratch&)>;

  Task take() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      if (left_ == 0 || failed_) return nullptr;
      for (std::deque<Task>* tasks : {&to_finish_, &to_count_}) {
        if (tasks->empty()) continue;
        Task task = std::move(tasks->front());
        tasks->pop_front();
        return task;
      }
      if (next_large_ < large_.size()) return [this, i = next_large_++](Scratch& scratch) { open(large_[i], scratch); };
      if (next_run_ < runs_) return [this, run = next_run_++](Scratch& scratch) { solve_run(run, scratch); };
      changed_.wait(lock);
    }
  }

  // Adds one task for each i in [0, count) of a stage.
  void add(Large& large, std::deque<Task>& tasks, int64_t count, void (Schedule::*stage)(Large&, int64_t, Scratch&)) {
    const std::lock_guard<std::mutex> lock(mutex_);
    large.left = count;
    for (int64_t i = 0; i < count; ++i) tasks.push_back([this, &large, i, stage](Scratch& scratch) { (this->*stage)(large, i, scratch); });
    changed_.notify_all();
  }

  // Whether this was the last task of its stage.
  bool last(Large& large) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return --large.left == 0;
  }

  void finished() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--left_ == 0) changed_.notify_all();
  }

  void open(Large& large, Scratch& scratch) {
    const Problem& problem = large.problem;
    if (options_.algorithm != KmeansAlgorithm::optimal) {
      large.fault = solve_sorted(problem, options_, scratch, large.lower_bound);
      begin_labels(large);
      return;
    }
    large.histogram = std::make_unique<Histogram>(problem.values(), problem.matrix->dtype, problem.weight(), problem.size(),
                                                  problem.matrix->num_centroids);
    add(large, to_count_, large.histogram->segments(), &Schedule::count);
  }

  void count(Large& large, int64_t segment, Scratch& scratch) {
    large.histogram->count(segment);
    if (!last(large)) return;
    large.fault = large.histogram->points(scratch, large.points);
    if (large.fault != KmeansFault::none) return begin_labels(large);
    solve(large.points, large.problem.matrix->num_centroids, options_, scratch, large.solution);
    if (!large.points.spread.empty() && kBlurred * large.solution.lower_bound < large.solution.cost) {
      large.histogram.reset();
      large.points = {};
      large.fault = solve_sorted(large.problem, options_, scratch, large.lower_bound);
      return begin_labels(large);
    }
    zoom_in(large, scratch);
  }

  void gather(Large& large, int64_t segment, Scratch& scratch) {
    large.histogram->gather(segment);
    if (!last(large)) return;
    const std::vector<int64_t> starts = large.histogram->take(large.gathered);
    for (size_t i = 0; i < large.asked.size(); ++i) {
      Points::Members& members = large.points.members[large.asked[i]];
      members.bin = -1;
      members.first = starts[i];
      members.last = starts[i + 1];
    }
    zoom_in(large, scratch);
  }

  void zoom_in(Large& large, Scratch& scratch) {
    if (large.problem.matrix->num_centroids <= kZoomed && large.gathers++ <= kMostGathers)
      large.asked = zoom(large.points, large.gathered, options_, scratch, large.solution);
    else
      large.asked.clear();
    if (!large.asked.empty()) {
      std::vector<int32_t> bins;
      for (const int64_t i : large.asked) bins.push_back(large.points.members[i].bin);
      large.histogram->mark(bins);
      return add(large, to_finish_, large.histogram->segments(), &Schedule::gather);
    }
    large.histogram.reset();
    store(large.problem, large.solution);
    large.lower_bound = large.solution.lower_bound;
    if (!surely_used(large.points, large.solution) && !all_used(large.problem, labeller_of(large.problem)))
      solve_sorted(large.problem, options_, scratch, large.lower_bound);  // the bins were too wide for these centroids
    large.points = {};
    large.gathered = {};
    begin_labels(large);
  }

  void begin_labels(Large& large) {
    if (large.fault != KmeansFault::none) return finished();
    large.labeller = std::make_unique<Labeller>(labeller_of(large.problem));
    large.pieces = pieces_of(large.problem);
    large.errors.resize(large.pieces.size());
    add(large, to_finish_, static_cast<int64_t>(large.pieces.size()), &Schedule::label_piece);
  }

  void label_piece(Large& large, int64_t piece, Scratch&) {
    large.errors[piece] = label(large.problem, *large.labeller, large.pieces[piece]);
    if (!last(large)) return;
    double inertia = 0;
    for (const double error : large.errors) inertia += error;
    store_inertia(large.problem, large.lower_bound, inertia);
    finished();
  }

  // Within a run, a problem tells the next its price; where runs begin does not depend on threads.
  void solve_run(int64_t run, Scratch& scratch) {
    scratch.known = Known();
    for (int64_t i = run * kRun; i < std::min<int64_t>(small_.size(), (run + 1) * kRun); ++i) {
      const Problem& problem = small_[i];
      double lower_bound = 0, inertia = 0;
      small_faults_[i] = solve_sorted(problem, options_, scratch, lower_bound);
      if (small_faults_[i] != KmeansFault::none) continue;
      const Labeller labeller = labeller_of(problem);
      for (const Piece& piece : pieces_of(problem)) inertia += label(problem, labeller, piece);
      store_inertia(problem, lower_bound, inertia);
    }
    finished();
  }

  std::vector<Large>& large_;
  const std::vector<Problem>& small_;
  std::vector<KmeansFault>& small_faults_;
  const KmeansOptions& options_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> to_finish_, to_count_;
  size_t next_large_ = 0;
  int64_t next_run_ = 0, runs_, left_;
  bool failed_ = false;
};

}  // namespace

void kmeans(KmeansMatrix* matrices, int64_t count, const KmeansOptions& options, const Parallel& parallel) {
  std::vector<Problem> small;
  std::vector<Large> large;
  for (int64_t m = 0; m < count; ++m) {
    KmeansMatrix& matrix = matrices[m];
    matrix.fault = KmeansFault::none;
    for (int64_t row = 0; row < matrix.rows; row += matrix.group_rows) {
      const Problem problem{&matrix, row / matrix.group_rows, row, std::min(matrix.group_rows, matrix.rows - row)};
      if (problem.size() <= kSmall) {
        small.push_back(problem);
      } else {
        large.emplace_back();
        large.back().problem = problem;
      }
    }
  }
  // The largest first, so that the last ones to finish are short.
  std::stable_sort(large.begin(), large.end(), [](const Large& a, const Large& b) { return a.problem.size() > b.problem.size(); });
  std::vector<KmeansFault> faults(small.size(), KmeansFault::none);
  Schedule schedule(large, small, faults, options);
  constexpr int64_t kManyThreads = 1024;
  parallel(kManyThreads, 1, [&](int64_t, int64_t) { schedule.work(); });
  for (const Large& one : large)
    if (one.problem.matrix->fault == KmeansFault::none) one.problem.matrix->fault = one.fault;
  for (size_t i = 0; i < small.size(); ++i)
    if (small[i].matrix->fault == KmeansFault::none) small[i].matrix->fault = faults[i];
}

}  // namespace kmq::cpu
