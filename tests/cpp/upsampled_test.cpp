// The CPU kernels of upsampled logits on raw memory: nothing outside the buffers is touched, every
// element of the gradient is written, and any number of threads gives the same bits. Their values
// are tested in Python (tests/ops/test_upsampled.py).
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "core/upsampled_args.h"
#include "cpu/launch_cpu.h"
#include "cpu_kernels.h"
#include "kernel_memory.h"

namespace oe_ext::testing {
namespace {

struct Map {
  int64_t images;
  int64_t classes;
  int64_t height;
  int64_t width;
  int64_t high;
  int64_t wide;
  bool align_corners;

  int64_t elements() const { return images * classes * height * width; }
};

// As in test_upsampled.py: patches of four, two and one pixels; more cells than a strip holds; a
// cell of more pixels than that.
const Map kMaps[] = {
    {2, 19, 9, 131, 36, 524, false}, {1, 3, 5, 4, 40, 32, false}, {2, 2, 3, 150, 6, 300, false},
    {1, 5, 4, 5, 13, 33, true},      {1, 5, 3, 17, 7, 50, false}, {1, 4, 2, 3, 4, 1300, false},
    {1, 70, 3, 2, 6, 600, true},     {1, 1, 1, 1, 9, 9, true},
};

template <typename T>
ImageView<T> view_of(T* data, const Map& map, bool channels_last) {
  const int64_t image = map.classes * map.height * map.width;
  return channels_last ? ImageView<T>{data, image, 1, map.width * map.classes, map.classes}
                       : ImageView<T>{data, image, map.height * map.width, map.width, 1};
}

// The outputs of a forward for "mean", and of a backward for "none".
template <typename scalar_t, typename acc_t>
struct Outputs {
  Outputs(const Map& map, const Buffer<scalar_t>& logits, const Labels& labels, bool channels_last)
      : loss(1),
        counts(2),
        statistics(2 * map.images * map.high * map.wide),
        argmax(map.images * map.high * map.wide, -1),
        unit_gradient(map.elements()),
        gradient(map.elements()) {
    const int64_t pixels = argmax.size();
    const auto fill = [&](auto& args, const char* reduction, Buffer<acc_t>& grad) {
      args.logits = view_of(logits.data(), map, channels_last);
      args.vertical = {map.height, map.high, map.align_corners};
      args.horizontal = {map.width, map.wide, map.align_corners};
      args.num_images = map.images;
      args.rows.layout = {1, pixels, map.classes, 0, 0, 0};
      args.rows.labels = labels;
      args.rows.alpha.value = acc_t(0.5);
      args.rows.divisor_rule = find_reduction(reduction)->divisors;
      args.rows.grad_logits = grad.data();
      args.grad = view_of(grad.data(), map, channels_last);
    };
    UpsampledForwardArgs<scalar_t, acc_t> forward;
    fill(forward, "mean", unit_gradient);
    forward.rows.output = {loss.data(), counts.data()};
    EXPECT_EQ(cpu::forward(forward), -1);
    // The statistics need each pixel's maximum, which takes another way.
    forward.rows.row_max = statistics.data();
    forward.rows.row_sum_exp = statistics.data() + pixels;
    forward.row_argmax = argmax.data();
    EXPECT_EQ(cpu::forward(forward), -1);
    UpsampledBackwardArgs<scalar_t, acc_t> backward;
    fill(backward, "none", gradient);
    const Buffer<acc_t> upstream(pixels, acc_t(3));
    backward.rows.grad = {upstream.data(), 1};
    EXPECT_EQ(cpu::backward(backward), -1);
  }

  void expect_bits_of(const Outputs& other) const {
    EXPECT_TRUE(loss.has_bits_of(other.loss));
    EXPECT_TRUE(counts.has_bits_of(other.counts));
    EXPECT_TRUE(statistics.has_bits_of(other.statistics));
    EXPECT_TRUE(argmax.has_bits_of(other.argmax));
    EXPECT_TRUE(unit_gradient.has_bits_of(other.unit_gradient));
    EXPECT_TRUE(gradient.has_bits_of(other.gradient));
  }

  void expect_numbers() const {
    for (const Buffer<acc_t>* buffer : {&loss, &statistics, &unit_gradient, &gradient}) {
      for (int64_t i = 0; i < buffer->size(); ++i) {
        ASSERT_FALSE(is_nan((*buffer)[i])) << i;
      }
    }
  }

  Buffer<acc_t> loss;
  Buffer<double> counts;
  Buffer<acc_t> statistics;
  Buffer<int32_t> argmax;
  Buffer<acc_t> unit_gradient;
  Buffer<acc_t> gradient;
};

template <typename scalar_t, typename acc_t>
void check(const Map& map, bool channels_last) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal(0, 3);
  Buffer<scalar_t> logits(map.elements(), scalar_t(0));
  for (int64_t i = 0; i < logits.size(); ++i) {
    logits[i] = static_cast<scalar_t>(normal(random));
  }
  const LabelBuffer target(LabelType::kUInt8, {map.images, map.high * map.wide, map.classes},
                           random);
  num_threads = 1;
  const Outputs<scalar_t, acc_t> expected(map, logits, target.labels, channels_last);
  expected.expect_numbers();
  for (const int64_t threads : {2, 3, 8}) {
    num_threads = threads;
    Outputs<scalar_t, acc_t>(map, logits, target.labels, channels_last).expect_bits_of(expected);
  }
}

TEST(ResizeAxis, CellsBeginWhereTheirPixelsAre) {
  for (const bool align_corners : {false, true}) {
    for (int64_t in = 1; in <= 12; ++in) {
      for (int64_t out = in; out <= 60; ++out) {
        const ResizeAxis axis = {in, out, align_corners};
        std::vector<int64_t> sizes(in + 1);
        for (int64_t pixel = 0; pixel < out; ++pixel) {
          const ResizeAxis::Place place = axis.place(pixel);
          ASSERT_GE(pixel, axis.begin(place.cell)) << in << " -> " << out;
          ASSERT_LT(pixel, axis.begin(place.cell + 1)) << in << " -> " << out;
          ++sizes.at(place.cell);
        }
        EXPECT_EQ(axis.begin(0), 0);
        EXPECT_EQ(axis.begin(in + 1), out);
        EXPECT_GE(axis.max_pixels(), *std::max_element(sizes.begin(), sizes.end()));
        EXPECT_LE(axis.max_pixels(), in == 1 ? out : out / (in - 1) + 1);
      }
    }
  }
}

TEST(Upsampled, AnyNumberOfThreadsGivesTheSameBits) {
  for (const Map& map : kMaps) {
    for (const bool channels_last : {false, true}) {
      SCOPED_TRACE(::testing::Message() << map.width << " to " << map.wide);
      check<float, float>(map, channels_last);
      check<double, double>(map, channels_last);
      check<c10::Half, float>(map, channels_last);
      check<c10::BFloat16, float>(map, channels_last);
    }
  }
}

}  // namespace
}  // namespace oe_ext::testing
