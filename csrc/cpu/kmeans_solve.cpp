// One problem on points: the dynamic program over cells, Lloyd on all points, and the lower bound of the optimum.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kmeans.h"

namespace kmq::cpu {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Prefix sums of weight, weight * x and weight * x^2; x is shifted to its mean, where differences cancel least.
struct Sums {
  std::vector<double> w, wx, wxx;
  double mean = 0;

  Sums(const std::vector<double>& x, const std::vector<double>& weight) : w(x.size() + 1), wx(x.size() + 1), wxx(x.size() + 1) {
    double total = 0, first = 0;
    for (size_t i = 0; i < x.size(); ++i) {
      total += weight[i];
      first += weight[i] * x[i];
    }
    mean = first / total;
    for (size_t i = 0; i < x.size(); ++i) {
      const double y = x[i] - mean;
      w[i + 1] = w[i] + weight[i];
      wx[i + 1] = wx[i] + weight[i] * y;
      wxx[i + 1] = wxx[i] + weight[i] * y * y;
    }
  }
  double cost(int64_t i, int64_t j) const {
    const double first = wx[j] - wx[i];
    const double cost = (wxx[j] - wxx[i]) - first * first / (w[j] - w[i]);
    return cost > 0 ? cost : 0;
  }
};

// Mean of points [i, j). Next to weights ten decades larger, the prefix sums hold little of a light cluster: it is added afresh.
double mean_of(const Points& points, const Sums& sums, int64_t i, int64_t j) {
  double weight = sums.w[j] - sums.w[i], first = sums.wx[j] - sums.wx[i];
  if (weight < 1e-4 * sums.w.back()) {
    weight = first = 0;
    for (int64_t p = i; p < j; ++p) {
      weight += points.w[p];
      first += points.w[p] * (points.x[p] - sums.mean);
    }
  }
  return std::clamp(sums.mean + first / weight, points.x[i], points.x[j - 1]);
}

using Edges = std::vector<int64_t>;

// One layer of the dynamic program, by divide and conquer: the best last edge moves right with the end of the range.
void fill_layer(const Sums& sums, const double* before, double* after, int32_t* split, int64_t begin, int64_t end, int64_t low,
                int64_t high) {
  while (begin <= end) {
    const int64_t j = (begin + end) / 2;
    double best = kInfinity;
    int64_t answer = low;
    for (int64_t i = low; i <= std::min(high, j - 1); ++i) {
      const double total = before[i] + sums.cost(i, j);
      if (total < best) {
        best = total;
        answer = i;
      }
    }
    after[j] = best;
    split[j] = static_cast<int32_t>(answer);
    fill_layer(sums, before, after, split, begin, j - 1, low, answer);
    begin = j + 1;
    low = answer;
  }
}

Edges edges_by_layers(const Sums& sums, int64_t n, int num_centroids) {
  std::vector<double> before(n + 1, kInfinity), after(n + 1, kInfinity);
  std::vector<int32_t> split(num_centroids * (n + 1));
  for (int64_t j = 1; j <= n; ++j) before[j] = sums.cost(0, j);
  for (int k = 1; k < num_centroids; ++k) {
    std::fill(after.begin(), after.end(), kInfinity);
    fill_layer(sums, before.data(), after.data(), split.data() + k * (n + 1), k + 1, n, k, n - 1);
    before.swap(after);
  }
  Edges edges(num_centroids + 1, 0);
  edges[num_centroids] = n;
  for (int k = num_centroids - 1; k > 0; --k) edges[k] = split[k * (n + 1) + edges[k + 1]];
  return edges;
}

// The best partition where every interval costs `price` extra. Candidates for the last edge wait in a queue, each with the end
// from which on it is the best one; a later candidate, once better, stays better.
Edges priced_edges(const Sums& sums, int64_t n, double price) {
  struct Candidate { int64_t edge, from; };
  std::vector<double> best(n + 1);
  std::vector<int64_t> last(n + 1);
  std::vector<Candidate> queue(n + 1);
  int64_t head = 0, tail = 0;
  queue[tail++] = {0, 1};
  best[0] = 0;
  for (int64_t j = 1; j <= n; ++j) {
    while (head + 1 < tail && queue[head + 1].from <= j) ++head;
    last[j] = queue[head].edge;
    best[j] = best[last[j]] + sums.cost(last[j], j) + price;
    if (j == n) break;
    const auto beats = [&](const Candidate& other, int64_t end) {
      return best[j] + sums.cost(j, end) < best[other.edge] + sums.cost(other.edge, end);
    };
    while (tail - head > 1 && queue[tail - 1].from > j && beats(queue[tail - 1], queue[tail - 1].from)) --tail;
    int64_t low = std::max(queue[tail - 1].from, j + 1), step = 1;
    while (low + step <= n && !beats(queue[tail - 1], low + step)) {
      low += step;
      step *= 2;
    }
    int64_t high = std::min(low + step, n + 1);
    if (beats(queue[tail - 1], low)) high = low;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (beats(queue[tail - 1], middle)) high = middle;
      else low = middle + 1;
    }
    if (low <= n) queue[tail++] = {j, low};
  }
  Edges edges;
  for (int64_t j = n; j > 0; j = last[j]) edges.push_back(j);
  edges.push_back(0);
  std::reverse(edges.begin(), edges.end());
  return edges;
}

// The optimum for K intervals is convex in K, so some price per interval makes K intervals the best choice. The search starts
// at the price that high-resolution theory gives: the optimum falls like K^-2, hence the count like price^-1/3.
Edges optimal_edges(const Sums& sums, int64_t n, int num_centroids, double growth) {
  constexpr int kPricedFrom = 8;  // fewer layers are filled faster than a price is found
  if (num_centroids < kPricedFrom) return edges_by_layers(sums, n, num_centroids);
  double low = 0, high = kInfinity;
  double price = growth * growth * growth / 6 / std::pow(num_centroids, 3);
  for (int probe = 0; probe < 40 && price > 0 && std::isfinite(price); ++probe) {
    Edges edges = priced_edges(sums, n, price);
    const int64_t count = static_cast<int64_t>(edges.size()) - 1;
    if (count == num_centroids) return edges;
    (count > num_centroids ? low : high) = price;
    double next = price * std::pow(double(count) / num_centroids, 3);
    if (!(next > low && next < high)) next = std::isfinite(high) ? (low > 0 ? std::sqrt(low) * std::sqrt(high) : high / 8) : low * 8;
    if (!(next > low && next < high)) break;
    price = next;
  }
  return edges_by_layers(sums, n, num_centroids);
}

// A number near the cube root, monotone in x; only the resolution of the grid depends on it.
double rough_cube_root(double x) {
  uint64_t u;
  std::memcpy(&u, &x, 8);
  u = u / 3 + 0x2A9F7893782DA1CEull;
  double root;
  std::memcpy(&root, &u, 8);
  return root;
}

// Edges of at most about 2 * count cells of neighbouring points. Optimal intervals lie where density^(1/3) grows, so that is
// where the cells are; equal steps over the range keep cells in the tails narrow. `growth` is the integral of density^(1/3).
Edges make_cells(const Points& points, int64_t count, double& growth) {
  const std::vector<double>&x = points.x, &w = points.w;
  const int64_t n = static_cast<int64_t>(x.size());
  std::vector<double> grows(n);
  for (int64_t i = 0; i < n; ++i) {
    const double step = i + 1 < n ? x[i + 1] - x[i] : x[i] - x[i - 1];
    const double mass = w[i] * step * step;
    grows[i] = mass > 1e-280 ? rough_cube_root(mass) : 0;
  }
  double total = 0;
  for (int round = 0; round < 5; ++round) {  // a gap before an outlier needs one cell, not most of them
    const double limit = round ? total / count : kInfinity;
    total = 0;
    for (double& g : grows) total += g = std::min(g, limit);
  }
  growth = total;
  Edges cells{0};
  const double by_density = total > 0 ? count / total : 0, by_range = count / (x[n - 1] - x[0]);
  double grown = 0;
  int64_t density_cell = 0, range_cell = 0;
  for (int64_t i = 0; i < n; ++i) {
    grown += grows[i];
    const int64_t d = static_cast<int64_t>(grown * by_density), r = static_cast<int64_t>((x[i] - x[0]) * by_range);
    if (i && (d != density_cell || r != range_cell)) cells.push_back(i);
    density_cell = d;
    range_cell = r;
  }
  cells.push_back(n);
  return cells;
}

// Gives every cluster a member: one without any takes the end point of the cluster that loses most by keeping it.
void fill_empty(const Points& points, const Sums& sums, Edges& edges) {
  const int64_t K = static_cast<int64_t>(edges.size()) - 1;
  for (;;) {
    int64_t empty = 0;
    while (empty < K && edges[empty + 1] > edges[empty]) ++empty;
    if (empty == K) return;
    double most = -1;
    int64_t cut = 0;
    for (int64_t k = 0; k < K; ++k) {
      if (edges[k + 1] - edges[k] < 2) continue;
      const double c = mean_of(points, sums, edges[k], edges[k + 1]);
      for (const int64_t i : {edges[k], edges[k + 1] - 1}) {
        const double gain = points.w[i] * (points.x[i] - c) * (points.x[i] - c);
        if (gain > most) {
          most = gain;
          cut = i == edges[k] ? i + 1 : i;
        }
      }
    }
    edges.erase(edges.begin() + (empty + 1 < K ? empty + 1 : empty));
    edges.insert(std::lower_bound(edges.begin(), edges.end(), cut), cut);
  }
}

// Lloyd iterations until the partition stands still, the centroids move less than tol * variance, or max_iter.
void lloyd(const Points& points, const Sums& sums, const KmeansOptions& options, double tol, Solution& solution) {
  const int64_t n = static_cast<int64_t>(points.x.size()), K = static_cast<int64_t>(solution.centroids.size());
  const double threshold = tol * (sums.cost(0, n) / sums.w[n]);
  std::vector<double>& c = solution.centroids;
  Edges next(K + 1);
  while (solution.n_iter < options.max_iter) {
    ++solution.n_iter;
    next[0] = 0;
    next[K] = n;
    for (int64_t k = 1; k < K; ++k)
      next[k] = std::upper_bound(points.x.begin() + next[k - 1], points.x.end(), (c[k - 1] + c[k]) / 2) - points.x.begin();
    fill_empty(points, sums, next);
    if (next == solution.edges) return;
    solution.edges = next;
    double shift = 0;
    for (int64_t k = 0; k < K; ++k) {
      const double moved = mean_of(points, sums, next[k], next[k + 1]);
      shift += (moved - c[k]) * (moved - c[k]);
      c[k] = moved;
    }
    if (tol > 0 && shift <= threshold) return;
  }
}

// splitmix64
struct Random {
  uint64_t state;
  uint64_t next() {
    uint64_t z = state += 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  double uniform() { return double(next() >> 11) * 0x1p-53; }
};

// k-means++: each centroid is drawn with chances weight * squared distance to the nearest one so far. The mass of a range of
// points that share their nearest centroid comes from the prefix sums, so a draw costs K + log n and not n.
std::vector<double> plus_plus(const Points& points, const Sums& sums, int num_centroids, Random random) {
  const int64_t n = static_cast<int64_t>(points.x.size());
  std::vector<double> chosen;
  {
    const double at = random.uniform() * sums.w[n];
    const int64_t i = std::upper_bound(sums.w.begin() + 1, sums.w.end(), at) - sums.w.begin() - 1;
    chosen.push_back(points.x[std::min(i, n - 1)]);
  }
  while (static_cast<int>(chosen.size()) < num_centroids) {
    const int64_t K = static_cast<int64_t>(chosen.size());
    const auto mass = [&](int64_t i, int64_t j, double c) {
      const double y = c - sums.mean;
      return std::max(0.0, (sums.wxx[j] - sums.wxx[i]) - 2 * y * (sums.wx[j] - sums.wx[i]) + y * y * (sums.w[j] - sums.w[i]));
    };
    Edges edges(K + 1, 0);
    std::vector<double> grown(K + 1, 0.0);
    edges[K] = n;
    for (int64_t k = 1; k < K; ++k)
      edges[k] = std::upper_bound(points.x.begin(), points.x.end(), (chosen[k - 1] + chosen[k]) / 2) - points.x.begin();
    for (int64_t k = 0; k < K; ++k) grown[k + 1] = grown[k] + mass(edges[k], edges[k + 1], chosen[k]);
    const double at = random.uniform() * grown[K];
    const int64_t k = std::min<int64_t>(std::upper_bound(grown.begin() + 1, grown.end(), at) - grown.begin() - 1, K - 1);
    int64_t low = edges[k], high = edges[k + 1] - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (grown[k] + mass(edges[k], middle + 1, chosen[k]) > at) high = middle;
      else low = middle + 1;
    }
    chosen.insert(std::lower_bound(chosen.begin(), chosen.end(), points.x[low]), points.x[low]);
  }
  return chosen;
}

std::vector<double> initial(const Points& points, const Sums& sums, int num_centroids, const KmeansOptions& options) {
  const int64_t n = static_cast<int64_t>(points.x.size());
  std::vector<double> out(num_centroids);
  Random random{options.seed};
  switch (options.init) {
    case KmeansInit::plus_plus: return plus_plus(points, sums, num_centroids, random);
    case KmeansInit::linear:
      for (int k = 0; k < num_centroids; ++k)
        out[k] = num_centroids == 1 ? points.x[0] : points.x[0] + (points.x[n - 1] - points.x[0]) * k / (num_centroids - 1);
      return out;
    case KmeansInit::quantile:
      for (int k = 0; k < num_centroids; ++k) {
        const double at = (k + 0.5) / num_centroids * sums.w[n];
        out[k] = points.x[std::min<int64_t>(std::lower_bound(sums.w.begin() + 1, sums.w.end(), at) - sums.w.begin() - 1, n - 1)];
      }
      return out;
    case KmeansInit::random: break;
  }
  std::vector<int64_t> drawn;  // Floyd's sampling without replacement
  for (int64_t j = n - num_centroids; j < n; ++j) {
    const int64_t i = static_cast<int64_t>(random.uniform() * double(j + 1));
    drawn.push_back(std::find(drawn.begin(), drawn.end(), i) == drawn.end() ? i : j);
  }
  std::sort(drawn.begin(), drawn.end());
  for (int k = 0; k < num_centroids; ++k) out[k] = points.x[drawn[k]];
  return out;
}

// Lower bound of the optimum from the optimum over whole cells. `inside` is the squared error of the points of each cell
// around their mean. The best centroids C split at most K - 1 cells. Move the points of these cells to their means: the vector
// of distances to C changes by no more than sqrt(S), S the sum of the K - 1 largest of `inside`. Now no cell is split, so the
// moved points cost at least the optimum over whole cells less the error inside the split ones:
//     sqrt(optimum) >= sqrt(whole - S) - sqrt(S).
// The spread of values inside a point is left out of `whole`, which only lowers the bound, but belongs to S: points whose
// values are spread are cells of their own kind, so their spread must be given in `inside` too.
double lower_bound(double cell_cost, double rounding, std::vector<double> inside, std::vector<double> spread, double blur, double weight,
                   int num_centroids) {
  double whole = cell_cost - rounding, split = 0;
  for (size_t i = 0; i < inside.size(); ++i) {
    whole += inside[i];
    spread[i] += inside[i];
  }
  const size_t most = std::min<size_t>(num_centroids - 1, spread.size());
  std::partial_sort(spread.begin(), spread.begin() + most, spread.end(), std::greater<double>());
  for (size_t i = 0; i < most; ++i) split += spread[i];
  const double root = std::sqrt(std::max(whole - split, 0.0)) - std::sqrt(split) - std::sqrt(weight) * blur;
  return root > 0 ? root * root : 0;
}

}  // namespace

Solution solve(const Points& points, int num_centroids, const KmeansOptions& options) {
  const int64_t n = static_cast<int64_t>(points.x.size());
  Solution out;
  if (n <= num_centroids) {
    out.centroids = points.x;
    out.centroids.resize(num_centroids, points.x.back());
    return out;
  }
  const Sums sums(points.x, points.w);
  if (options.algorithm == KmeansAlgorithm::lloyd) {
    out.centroids = initial(points, sums, num_centroids, options);
    lloyd(points, sums, options, options.tol, out);
    out.lower_bound = -1;
    return out;
  }
  const int64_t count = std::min<int64_t>(std::max<int64_t>(32 * num_centroids, 1024), 4096);
  double growth = 0;
  Edges cells = make_cells(points, count, growth);
  const bool every_point = options.algorithm == KmeansAlgorithm::exact || n <= 2 * count;
  if (every_point) {
    cells.resize(n + 1);
    for (int64_t i = 0; i <= n; ++i) cells[i] = i;
  }
  const bool exact = every_point && points.spread.empty();
  const int64_t m = static_cast<int64_t>(cells.size()) - 1;
  Sums over_cells = sums;
  std::vector<double> inside(m, 0.0), spread(m, 0.0);
  if (!every_point) {
    for (int64_t i = 0; i <= m; ++i) {
      over_cells.w[i] = sums.w[cells[i]];
      over_cells.wx[i] = sums.wx[cells[i]];
    }
    over_cells.wxx[0] = 0;
    for (int64_t i = 0; i < m; ++i) {
      const double c = mean_of(points, sums, cells[i], cells[i + 1]) - sums.mean;
      over_cells.wxx[i + 1] = over_cells.wxx[i] + (over_cells.w[i + 1] - over_cells.w[i]) * c * c;
      inside[i] = sums.cost(cells[i], cells[i + 1]);
    }
  }
  if (!points.spread.empty())
    for (int64_t i = 0; i < m; ++i)
      for (int64_t p = cells[i]; p < cells[i + 1]; ++p) spread[i] += points.spread[p];
  const Edges edges = optimal_edges(over_cells, m, num_centroids, growth);
  double cost = 0;
  for (int k = 0; k < num_centroids; ++k) {
    out.centroids.push_back(mean_of(points, sums, cells[edges[k]], cells[edges[k + 1]]));
    out.edges.push_back(cells[edges[k]]);
    cost += over_cells.cost(edges[k], edges[k + 1]);
  }
  out.edges.push_back(n);
  const double rounding = 1e-13 * sums.wxx[n];
  out.lower_bound = lower_bound(cost, exact ? 0 : rounding, inside, spread, points.blur, sums.w[n], num_centroids);
  if (!exact) {
    out.edges.clear();
    lloyd(points, sums, options, 0.0, out);
  }
  return out;
}

}  // namespace kmq::cpu
