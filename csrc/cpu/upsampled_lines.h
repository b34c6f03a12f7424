// Computes one row of pixels in a strip of an upsampled map.
#pragma once

#include "upsampled_exponentials.h"

namespace oe_ext::cpu {
namespace {

// Values of pixels in the order of a tensor, and in that of lanes.
template <typename acc_t>
class PixelOrder {
 public:
  PixelOrder(const Strip<acc_t>& strip, int64_t first) : strip_(strip), first_(first) {}

  template <typename T, typename U>
  void to_lanes(const T* pixels, U* lanes) const {
    for (int64_t i = 0; i < strip_.num_pixels; ++i) {
      lanes[strip_.place[i]] = pixels[i];
    }
  }

  // If there is such a tensor: writes the values of this strip.
  template <typename T, typename U>
  void to_tensor(const T* lanes, U* tensor) const {
    for (int64_t i = 0; tensor != nullptr && i < strip_.num_pixels; ++i) {
      tensor[first_ + i] = static_cast<U>(lanes[strip_.place[i]]);
    }
  }

  // If it has a value for each pixel: copies those of this strip to `lanes`, which take its place.
  void replace(PerRow<acc_t>& tensor, acc_t* lanes) const {
    if (tensor.data != nullptr && tensor.stride != 0) {
      std::fill_n(lanes, kRowCapacity, acc_t(0));
      to_lanes(tensor.data + first_, lanes);
      tensor.data = lanes;
    }
  }

 private:
  const Strip<acc_t>& strip_;
  int64_t first_;
};

// Sums of exponentials that are smaller would have lost terms to underflow.
template <typename acc_t>
constexpr acc_t kMinSum = sizeof(acc_t) == 4 ? acc_t(0x1p-84) : acc_t(0x1p-900);

// Are the exponentials from the ends of segments enough for these pixels? A NaN must not reach the
// factor 0 of a pixel that does not count.
template <typename acc_t>
bool are_sums_safe(const TileRows<acc_t>& rows) {
  IntOf<acc_t> num_unsafe = 0;
#pragma omp simd reduction(+ : num_unsafe)
  for (int64_t i = 0; i < rows.size; ++i) {
    const bool active = rows.active[i] != acc_t(0);
    const bool large = rows.sum_exp[i] >= kMinSum<acc_t>;
    const bool number = rows.sum_exp[i] == rows.sum_exp[i];
    num_unsafe += !(active ? large : number);
  }
  return num_unsafe == 0;
}

// Finishes the pixels of a strip from the sums of their exponentials, and writes their outputs.
template <typename Segment, typename acc_t, typename scalar_t>
void finish_pixels(const UpsampledForwardArgs<scalar_t, acc_t>& args,
                   const ForwardArgs<acc_t, acc_t>& options, const PixelOrder<acc_t>& order,
                   const GroupDivisors& divisors, Line<acc_t> line,
                   const StripMemory<acc_t>& memory, TileRows<acc_t>& rows, GroupSums& sums) {
  alignas(64) acc_t outputs[4][kRowCapacity];
  ForwardArgs<acc_t, acc_t> to_lanes = options;
  acc_t** const pointers[] = {&to_lanes.row_loss, &to_lanes.row_cross_entropy, &to_lanes.row_max,
                              &to_lanes.row_sum_exp};
  for (int i = 0; i < 4; ++i) {
    *pointers[i] = *pointers[i] != nullptr ? outputs[i] : nullptr;
  }
  GroupSums of_line;
  finish_rows(to_lanes, divisors, rows, of_line);
  sums.merge(of_line);
  order.to_tensor(outputs[0], options.row_loss);
  order.to_tensor(outputs[1], options.row_cross_entropy);
  order.to_tensor(outputs[3], options.row_sum_exp);
  order.to_tensor(memory.argmax, args.row_argmax);
  if (options.row_max != nullptr) {
    alignas(64) acc_t shift[kRowCapacity];
    interpolate_pixels<Segment>(line, memory.end_x(args.num_classes() + 1), shift);
    for (int64_t i = 0; i < rows.size; ++i) {
      shift[i] += outputs[2][i];
    }
    order.to_tensor(shift, options.row_max);
  }
}

template <typename Segment, typename acc_t, typename scalar_t>
void finish_pixels(const UpsampledBackwardArgs<scalar_t, acc_t>&,
                   const BackwardArgs<acc_t, acc_t>& options, const PixelOrder<acc_t>& order,
                   const GroupDivisors&, Line<acc_t>, const StripMemory<acc_t>&,
                   TileRows<acc_t>& rows, GroupSums&) {
  alignas(64) acc_t upstream[kRowCapacity];
  BackwardArgs<acc_t, acc_t> of_lanes = options;
  order.replace(of_lanes.grad, upstream);
  set_gradients(of_lanes, rows);
}

// The gradient of a single class is 0, or NaN: exactly, not but for roundings.
template <typename acc_t>
void clear_only_class(TileRows<acc_t>& rows) {
  for (int64_t i = 0; i < rows.size; ++i) {
    rows.factor[i] *= 0;
    rows.offset[i] = rows.at_label[i] = 0;
  }
}

template <typename Exponentials, typename Segment, typename acc_t>
void add_gradients(Line<acc_t> line, int64_t num_classes, const StripMemory<acc_t>& memory,
                   TileRows<acc_t>& rows) {
  if (num_classes == 1) {
    clear_only_class(rows);
  }
  acc_t* uniform_factors = memory.factors + 2 * Segment::kPixels * line.padded;
  set_factors<Segment>(line, rows.factor, memory.factors);
  set_factors<Segment>(line, rows.offset, uniform_factors);
  set_label_parts<Segment>(line, num_classes, rows, memory);
  Exponentials::add_gradients(line, 0, num_classes, memory.factors, rows, memory);
  // Exponentials of 1, in the same order of additions: equal logits get a gradient of exactly 0.
  FromEnds<Segment, acc_t>::add_gradients(line, num_classes, num_classes + 1, uniform_factors, rows,
                                          memory);
}

// One row of pixels in a strip, whose first pixel is `first` in the target; returns the first
// illegal label, or -1.
template <typename Segment, typename Args, typename acc_t>
int64_t process_line(const Args& args, const Strip<acc_t>& strip, Line<acc_t> line, int64_t first,
                     const GroupDivisors& divisors, const StripMemory<acc_t>& memory,
                     GroupSums& sums) {
  using Fast = FromEnds<Segment, acc_t>;
  using Careful = FromMaxima<Segment, acc_t>;
  constexpr bool kForward = requires { args.rows.row_loss; };
  const int64_t num_classes = args.num_classes();
  bool wants_cross_entropy = false;
  bool wants_maxima = false;
  if constexpr (kForward) {
    wants_cross_entropy = args.rows.row_cross_entropy != nullptr;
    wants_maxima = args.rows.row_max != nullptr;
  }
  alignas(64) IntOf<acc_t> labels[kRowCapacity];
  const TaskResult counted = read_classes(args.rows.labels, first, strip.num_pixels, labels);
  if (counted.bad_row >= 0) {
    return counted.bad_row;
  }
  sums.counts.merge(counted.sums.counts);
  const PixelOrder<acc_t> order(strip, first);
  TileRows<acc_t> rows(0, Segment::kPixels * line.padded);
  std::fill_n(rows.label, rows.size, kIgnored);
  order.to_lanes(labels, rows.label);
  alignas(64) acc_t alphas[kRowCapacity];
  auto options = args.rows;
  order.replace(options.alpha.values, alphas);
  weigh_rows(options, wants_cross_entropy, rows);

  bool is_safe = false;
  set_last_ends<Segment>(line, num_classes, memory);
  set_ends<Segment>(line, num_classes, memory);
  set_ends<Segment>(line, num_classes + 1, memory);
  if (!wants_maxima) {
    Fast::sum(line, num_classes, memory, rows.sum_exp);
    is_safe = are_sums_safe(rows);
  }
  if (is_safe) {
    std::fill_n(rows.max, rows.size, acc_t(0));
  } else {
    for (int64_t cls = 0; wants_maxima && cls < num_classes; ++cls) {
      set_ends<Segment>(line, cls, memory);
    }
    Careful::raise_maxima(line, num_classes, memory, rows.max);
    Careful::sum(line, num_classes, memory, rows.max, rows.sum_exp);
  }
  find_logits_at_labels<Segment>(line, num_classes, memory, rows);
  interpolate_pixels<Segment>(line, memory.end_x(num_classes), rows.sum_shifted);
  if (!is_safe) {
    for (int64_t i = 0; i < rows.size; ++i) {
      rows.sum_shifted[i] -= rows.max[i] * static_cast<acc_t>(num_classes);
    }
  }
  finish_pixels<Segment>(args, options, order, divisors, line, memory, rows, sums);
  if (args.rows.grad_logits != nullptr) {
    if (is_safe) {
      add_gradients<Fast, Segment>(line, num_classes, memory, rows);
    } else {
      add_gradients<Careful, Segment>(line, num_classes, memory, rows);
    }
  }
  return -1;
}

}  // namespace
}  // namespace oe_ext::cpu
