// Random sequences of operations against an oracle that keeps every rank's memory in one process,
// and a soak. A failure prints the sequence's seed; LOCKSTEP_TEST_SEED=N draws other sequences.
#include <gtest/gtest.h>

#include <cstdlib>
#include <random>

#include "lockstep/collective/backends_test.h"

namespace lockstep {
namespace {

constexpr std::size_t kMaxPart = 40;  // elements for each rank
constexpr int kOperations = 6;        // of one sequence

// All ranks' two buffers as they should be, of `size` parts of `part` elements each.
template <typename T>
struct Oracle {
  using Values = std::vector<T>;
  int size;
  std::size_t part;
  std::vector<Values> a, b;  // by rank

  Oracle(std::uint64_t seed, int ranks, std::size_t elements) : size(ranks), part(elements) {
    for (std::uint64_t rank = 0; rank < static_cast<std::uint64_t>(ranks); ++rank) {
      a.push_back(fill(mix({seed, rank, 1})));
      b.push_back(fill(mix({seed, rank, 2})));
    }
  }
  Values fill(std::uint64_t seed) const {
    Values values;
    for (std::size_t i = 0; i < size * part; ++i) values.push_back(naive::input<T>(seed, i));
    return values;
  }
  // The value of element i over the ranks given.
  T reduced(const std::vector<int>& ranks, std::size_t i, Reduction reduction) const {
    std::vector<decltype(naive::widen(T{}))> values;
    for (const int rank : ranks) values.push_back(naive::widen(a[rank][i]));
    auto value = naive::tree(values, 0, static_cast<int>(ranks.size()), reduction, [](auto wide) {
      return std::is_integral_v<T> ? naive::widen(naive::narrow<T>(wide)) : wide;
    });
    if (reduction == Reduction::mean) value /= static_cast<decltype(value)>(ranks.size());
    return naive::narrow<T>(value);
  }
  void all_reduce(const std::vector<int>& ranks, Reduction reduction) {
    Values result;
    for (std::size_t i = 0; i < size * part; ++i) result.push_back(reduced(ranks, i, reduction));
    for (const int rank : ranks) a[rank] = result;
  }
};

template <typename T>
class Sequence {
 public:
  Sequence(Group& group, Group& half, std::span<std::byte> arena, Dtype dtype, std::uint64_t seed)
      : group_(group),
        half_(half),
        dtype_(dtype),
        random_(seed),
        oracle_(seed, group.size(), draw(kMaxPart + 1)),
        own_(2 * bytes()) {
    for (int rank = 0; rank < size(); ++rank) everybody_.push_back(rank);
    std::span<std::byte> memory = draw(2) == 0 ? arena : std::span(own_);
    // Ordinary memory on some ranks alone now and then.
    if (draw(3) == 0 && rank() % 2 == 0) memory = own_;
    a_ = memory.first(bytes());
    b_ = memory.subspan(bytes(), bytes());
    copy(oracle_.a[rank()], a_);
    copy(oracle_.b[rank()], b_);
  }

  bool run() {
    for (int i = 0; i < kOperations; ++i) step();
    return equal(oracle_.a[rank()], a_) && equal(oracle_.b[rank()], b_);
  }

 private:
  int rank() const { return group_.rank(); }
  int size() const { return group_.size(); }
  std::size_t bytes() const { return oracle_.size * oracle_.part * sizeof(T); }
  std::size_t draw(std::size_t below) { return random_() % below; }
  std::span<std::byte> elements(std::span<std::byte> of, std::size_t from, std::size_t count) {
    return of.subspan(from * sizeof(T), count * sizeof(T));
  }
  static void copy(const std::vector<T>& from, std::span<std::byte> to) {
    if (!from.empty()) std::memcpy(to.data(), from.data(), to.size());
  }
  static bool equal(const std::vector<T>& expected, std::span<const std::byte> found) {
    return expected.empty() || std::memcmp(expected.data(), found.data(), found.size()) == 0;
  }
  // Sums of sums of floating-point numbers would leave the range of 16 bits.
  Reduction draw_reduction() {
    constexpr Reduction kBounded[] = {Reduction::mean, Reduction::min, Reduction::max};
    return std::is_integral_v<T> ? kReductions[draw(5)] : kBounded[draw(3)];
  }

  void step() {
    switch (draw(6)) {
      case 0:
        return reduce();
      case 1:
        return gather_or_scatter();
      case 2:
        return exchange();
      case 3:
        return exchange_unevenly();
      case 4:
        return send();
      default:
        return draw(2) == 0 ? group_.barrier() : broadcast();
    }
  }
  void reduce() {
    const Reduction reduction = draw_reduction();
    const int root = static_cast<int>(draw(size()));
    switch (draw(4)) {
      case 0:
        group_.all_reduce(a_, dtype_, reduction);
        return oracle_.all_reduce(everybody_, reduction);
      case 1: {
        group_.reduce(a_, dtype_, reduction, root);
        auto after = oracle_;
        after.all_reduce(everybody_, reduction);
        oracle_.a[root] = after.a[root];
        return;
      }
      case 2: {
        const std::size_t part = oracle_.part;
        group_.reduce_scatter(a_, elements(b_, 0, part), dtype_, reduction);
        for (int to = 0; to < size(); ++to)
          for (std::size_t i = 0; i < part; ++i)
            oracle_.b[to][i] = oracle_.reduced(everybody_, to * part + i, reduction);
        return;
      }
      default:
        half_.all_reduce(a_, dtype_, reduction);
        for (const int parity : {0, 1}) {
          std::vector<int> ranks;
          for (int other = parity; other < size(); other += 2) ranks.push_back(other);
          if (!ranks.empty()) oracle_.all_reduce(ranks, reduction);
        }
    }
  }
  void broadcast() {
    const int root = static_cast<int>(draw(size()));
    group_.broadcast(a_, dtype_, root);
    for (auto& a : oracle_.a) a = std::vector<T>(oracle_.a[root]);
  }
  void gather_or_scatter() {
    const std::size_t part = oracle_.part;
    const int root = static_cast<int>(draw(size()));
    const std::size_t kind = draw(3);
    const auto at_root = rank() == root ? a_ : std::span<std::byte>();
    if (kind == 0) group_.all_gather(elements(b_, 0, part), a_, dtype_);
    if (kind == 1) group_.gather(elements(b_, 0, part), at_root, dtype_, root);
    if (kind == 2) group_.scatter(at_root, elements(b_, 0, part), dtype_, root);
    for (int other = 0; other < size(); ++other) {
      if (kind == 2)
        std::copy_n(oracle_.a[root].begin() + other * part, part, oracle_.b[other].begin());
      for (int to = 0; kind != 2 && to < size(); ++to)
        if (kind == 0 || to == root)
          std::copy_n(oracle_.b[other].begin(), part, oracle_.a[to].begin() + other * part);
    }
  }
  void exchange() {
    group_.all_to_all(a_, b_, dtype_);
    for (int from = 0; from < size(); ++from)
      for (int to = 0; to < size(); ++to)
        std::copy_n(oracle_.a[from].begin() + to * oracle_.part, oracle_.part,
                    oracle_.b[to].begin() + from * oracle_.part);
  }
  void exchange_unevenly() {
    // counts[from][to], at most a part each.
    std::vector<std::vector<std::uint64_t>> counts(size());
    for (auto& row : counts)
      for (int to = 0; to < size(); ++to) row.push_back(draw(oracle_.part + 1));
    if (draw(2) == 0) {  // all_gather of the first column
      std::vector<std::uint64_t> column;
      std::size_t sum = 0;
      for (int from = 0; from < size(); ++from) {
        column.push_back(counts[from][0]);
        for (auto& a : oracle_.a)
          std::copy_n(oracle_.b[from].begin(), column.back(), a.begin() + sum);
        sum += column.back();
      }
      return group_.all_gather_uneven(elements(b_, 0, column[rank()]), elements(a_, 0, sum), column,
                                      dtype_);
    }
    std::vector<std::uint64_t> received;
    std::vector<std::size_t> read(size()), written(size());
    for (int from = 0; from < size(); ++from)
      for (int to = 0; to < size(); ++to) {
        const std::uint64_t count = counts[from][to];
        std::copy_n(oracle_.a[from].begin() + read[from], count,
                    oracle_.b[to].begin() + written[to]);
        read[from] += count;
        written[to] += count;
        if (to == rank()) received.push_back(count);
      }
    group_.all_to_all_uneven(elements(a_, 0, read[rank()]), counts[rank()],
                             elements(b_, 0, written[rank()]), received, dtype_);
  }
  void send() {
    if (size() == 1) return;
    const int from = static_cast<int>(draw(size()));
    const int to = (from + 1 + static_cast<int>(draw(size() - 1))) % size();
    if (rank() == from) group_.send(a_, dtype_, to);
    if (rank() == to) group_.recv(b_, dtype_, from);
    oracle_.b[to] = oracle_.a[from];
  }

  Group& group_;
  Group& half_;
  const Dtype dtype_;
  std::mt19937_64 random_;  // the same on all ranks
  Oracle<T> oracle_;
  std::vector<std::byte> own_;
  std::vector<int> everybody_;
  std::span<std::byte> a_, b_;
};

std::uint64_t first_seed() {
  const char* text = std::getenv("LOCKSTEP_TEST_SEED");
  return text != nullptr ? std::strtoull(text, nullptr, 10) : 1;
}

TEST(RandomTest, TenThousandSequencesGiveWhatTheOracleGives) {
  constexpr std::uint64_t kSequences = kThreadSanitizer ? 1000 : 10'000;
  constexpr int kSizes[] = {1, 2, 3, 4, 5};
  for (const int size : kSizes)
    run_shm_threads(size, [&](Group& group) {
      auto half = group.split(group.rank() % 2, 0);
      auto arena = group.allocate(2 * 8 * kMaxPart * size, "buffers");
      for (std::uint64_t i = 0; i < kSequences / std::size(kSizes); ++i) {
        const std::uint64_t seed = mix({first_seed(), static_cast<std::uint64_t>(size), i});
        const auto dtype = static_cast<Dtype>(seed % kDtypeCount);
        naive::with_type(dtype, [&]<typename T>(T) {
          EXPECT_TRUE(Sequence<T>(group, *half, arena, dtype, seed).run())
              << "sequence " << i << ", seed " << seed << ", " << name_of(dtype) << ", rank "
              << group.rank() << " of " << size;
        });
        // All ranks stop together.
        std::uint8_t failed = ::testing::Test::HasFailure();
        group.all_reduce(std::as_writable_bytes(std::span(&failed, 1)), Dtype::uint8,
                         Reduction::max);
        if (failed != 0) return;
      }
    });
}

// Not in the suite: ctest -C soak -L soak.
TEST(Soak, DISABLED_AMillionSmallOperations) {
  run_shm_processes(2, [](Group& group) {
    auto arena = group.allocate(64, "data");
    std::vector<std::byte> ordinary(64);
    for (std::int64_t i = 0; i < 1'000'000; ++i) {
      const auto data = (i % 2 == 0 ? arena : std::span(ordinary)).first(8);
      const std::int64_t mine = i * 2 + group.rank();
      std::memcpy(data.data(), &mine, sizeof(mine));
      std::int64_t expected = i * 2 + 1;
      if (i % 3 == 0) {
        group.broadcast(data, Dtype::int64, 1);
      } else {
        group.all_reduce(data, Dtype::int64, Reduction::sum);
        expected += i * 2;
      }
      ASSERT_EQ(std::memcmp(data.data(), &expected, sizeof(expected)), 0) << "operation " << i;
    }
    EXPECT_GE(group.statistics().operations, 1'000'000u);
  });
}

}  // namespace
}  // namespace lockstep
