// Computes one row of pixels in a strip of an upsampled map.
#pragma once

#include "upsampled_exponentials.h"

namespace oe_ext::cpu {
namespace {

// Rows of pixels in the order of lanes: their labels, options and outputs, and buffers for what a
// tensor has of each pixel.
template <typename Rows, typename acc_t>
class LaneRows {
 public:
  static constexpr bool kForward = requires(Rows rows) { rows.row_loss; };

  explicit LaneRows(const Rows& tensors) : in_lanes(tensors), tensors_(tensors) {
    point_to_buffer(in_lanes.alpha.values, alphas_);
    if constexpr (kForward) {
      for (int i = 0; i < kNumOutputs; ++i) {
        acc_t*& output = in_lanes.*output_of(i);
        output = output != nullptr ? outputs_[i] : nullptr;
      }
    } else {
      point_to_buffer(in_lanes.grad, outputs_[0]);
    }
  }

  // Reads the labels of a strip, whose first pixel is `first`, and what belongs to its pixels.
  TaskResult read(const Strip<acc_t>& strip, int64_t first, bool wants_cross_entropy,
                  TileRows<acc_t>& rows) {
    alignas(64) IntOf<acc_t> labels[kRowCapacity];
    const TaskResult result = read_classes(in_lanes.labels, first, strip.num_pixels, labels);
    if (result.bad_row >= 0) {
      return result;
    }
    std::fill_n(rows.label, rows.size, kIgnored);
    to_lanes(strip, labels, rows.label);
    read_buffer(strip, first, tensors_.alpha.values, alphas_);
    if constexpr (!kForward) {
      read_buffer(strip, first, tensors_.grad, outputs_[0]);
    }
    weigh_rows(in_lanes, wants_cross_entropy, rows);
    return result;
  }

  // Writes the outputs of a strip to the tensors.
  void write(const Strip<acc_t>& strip, int64_t first) const {
    for (int i = 0; i < kNumOutputs; ++i) {
      if (acc_t* tensor = tensors_.*output_of(i); tensor != nullptr) {
        to_pixels(strip, outputs_[i], tensor + first);
      }
    }
  }

  template <typename T, typename U>
  static void to_pixels(const Strip<acc_t>& strip, const T* lanes, U* pixels) {
    for (int64_t i = 0; i < strip.num_pixels; ++i) {
      pixels[i] = static_cast<U>(lanes[strip.place[i]]);
    }
  }

  Rows in_lanes;

 private:
  static constexpr int kNumOutputs = 4;  // of a forward, of each pixel

  static constexpr auto output_of(int i) {
    constexpr acc_t* Rows::* kOutputs[kNumOutputs] = {&Rows::row_loss, &Rows::row_cross_entropy,
                                                      &Rows::row_max, &Rows::row_sum_exp};
    return kOutputs[i];
  }

  static bool has_pixels(const PerRow<acc_t>& values) {
    return values.data != nullptr && values.stride != 0;
  }
  static void point_to_buffer(PerRow<acc_t>& values, acc_t* buffer) {
    if (has_pixels(values)) {
      std::fill_n(buffer, kRowCapacity, acc_t(0));
      values.data = buffer;
    }
  }
  static void read_buffer(const Strip<acc_t>& strip, int64_t first, const PerRow<acc_t>& values,
                          acc_t* buffer) {
    if (has_pixels(values)) {
      to_lanes(strip, values.data + first, buffer);
    }
  }
  template <typename T>
  static void to_lanes(const Strip<acc_t>& strip, const T* pixels, T* lanes) {
    for (int64_t i = 0; i < strip.num_pixels; ++i) {
      lanes[strip.place[i]] = pixels[i];
    }
  }

  const Rows& tensors_;
  alignas(64) acc_t alphas_[kRowCapacity];
  alignas(
      64) acc_t outputs_[kNumOutputs][kRowCapacity];  // or, of a backward, the upstream gradient
};

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

// Finishes the pixels of a strip from the sums of their exponentials.
template <typename Segment, typename acc_t, typename scalar_t, typename Rows>
void finish_pixels(const UpsampledForwardArgs<scalar_t, acc_t>& args, const Strip<acc_t>& strip,
                   int64_t first, const GroupDivisors& divisors, Line<acc_t> line,
                   const StripMemory<acc_t>& memory, LaneRows<Rows, acc_t>& pixels,
                   TileRows<acc_t>& rows, GroupSums& sums) {
  GroupSums of_line;
  finish_rows(pixels.in_lanes, divisors, rows, of_line);
  sums.merge(of_line);
  if (acc_t* max = pixels.in_lanes.row_max; max != nullptr) {
    acc_t* shift = rows.sum_shifted;  // not needed any more
    interpolate_pixels<Segment>(line, memory.end_x(args.num_classes() + 1), shift);
    for (int64_t i = 0; i < rows.size; ++i) {
      max[i] += shift[i];
    }
    pixels.to_pixels(strip, memory.argmax, args.row_argmax + first);
  }
  pixels.write(strip, first);
}

template <typename Segment, typename acc_t, typename scalar_t, typename Rows>
void finish_pixels(const UpsampledBackwardArgs<scalar_t, acc_t>&, const Strip<acc_t>&, int64_t,
                   const GroupDivisors&, Line<acc_t>, const StripMemory<acc_t>&,
                   LaneRows<Rows, acc_t>& pixels, TileRows<acc_t>& rows, GroupSums&) {
  set_gradients(pixels.in_lanes, rows);
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
template <typename Segment, typename Args, typename Rows, typename acc_t>
int64_t process_line(const Args& args, const Strip<acc_t>& strip, Line<acc_t> line, int64_t first,
                     const GroupDivisors& divisors, const StripMemory<acc_t>& memory,
                     LaneRows<Rows, acc_t>& pixels, GroupSums& sums) {
  using Fast = FromEnds<Segment, acc_t>;
  using Careful = FromMaxima<Segment, acc_t>;
  const int64_t num_classes = args.num_classes();
  bool wants_cross_entropy = false;
  bool wants_maxima = false;
  if constexpr (LaneRows<Rows, acc_t>::kForward) {
    wants_cross_entropy = args.rows.row_cross_entropy != nullptr;
    wants_maxima = args.rows.row_max != nullptr;
  }
  TileRows<acc_t> rows(0, Segment::kPixels * line.padded);
  const TaskResult labels = pixels.read(strip, first, wants_cross_entropy, rows);
  if (labels.bad_row >= 0) {
    return labels.bad_row;
  }
  sums.counts.merge(labels.sums.counts);

  bool is_safe = false;
  set_last_ends<Segment>(line, num_classes, memory);
  set_ends<Segment, false>(line, num_classes, memory);
  set_ends<Segment, false>(line, num_classes + 1, memory);
  if (!wants_maxima) {
    Fast::sum(line, num_classes, memory, rows.sum_exp);
    is_safe = are_sums_safe(rows);
  }
  if (is_safe) {
    std::fill_n(rows.max, rows.size, acc_t(0));
  } else {
    for (int64_t cls = 0; wants_maxima && cls < num_classes; ++cls) {
      set_ends<Segment, false>(line, cls, memory);
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
  finish_pixels<Segment>(args, strip, first, divisors, line, memory, pixels, rows, sums);
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
