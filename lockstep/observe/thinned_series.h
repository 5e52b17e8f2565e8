// A curve of bounded size over any number of points: when it is full, neighbours are merged to
// their mean, so that its resolution halves and nothing is forgotten. A value; one thread.
#pragma once

#include <array>
#include <cmath>
#include <cstddef>
#include <vector>

namespace lockstep {

// A point is a place on the axis and N values; a value that is not a number takes no part in means.
template <std::size_t N>
class ThinnedSeries {
 public:
  struct Point {
    double x = 0;  // of the last point merged into it
    std::array<double, N> values{};
  };

  explicit ThinnedSeries(std::size_t most) : most_(most) {}

  void add(double x, const std::array<double, N>& values) {
    merge({x, values});
    if (merged_ < stride_) return;
    points_.push_back(open());
    merged_ = 0;
    if (points_.size() < most_) return;
    for (std::size_t i = 0; i + 1 < points_.size(); i += 2)
      points_[i / 2] = mean(points_[i], points_[i + 1]);
    points_.resize(points_.size() / 2);
    stride_ *= 2;
  }

  std::vector<Point> points() const {  // at most `most`; the last one may stand for fewer points
    std::vector<Point> all = points_;
    if (merged_ > 0) all.push_back(open());
    return all;
  }

 private:
  void merge(const Point& point) {
    if (merged_++ == 0) sums_ = {}, counts_ = {};
    x_ = point.x;
    for (std::size_t i = 0; i < N; ++i) {
      if (!std::isfinite(point.values[i])) continue;
      sums_[i] += point.values[i];
      ++counts_[i];
    }
  }
  Point open() const {
    Point point{.x = x_};
    for (std::size_t i = 0; i < N; ++i)
      point.values[i] = sums_[i] / double(counts_[i]);  // 0/0: NaN
    return point;
  }
  static Point mean(const Point& a, const Point& b) {
    Point point{.x = b.x};
    for (std::size_t i = 0; i < N; ++i) {
      const double left = a.values[i], right = b.values[i];
      point.values[i] = !std::isfinite(left)    ? right
                        : !std::isfinite(right) ? left
                                                : (left + right) / 2;
    }
    return point;
  }

  std::size_t most_, stride_ = 1, merged_ = 0;
  double x_ = 0;
  std::array<double, N> sums_{};
  std::array<std::size_t, N> counts_{};
  std::vector<Point> points_;
};

}  // namespace lockstep
