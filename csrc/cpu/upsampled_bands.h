// The kernels of one band of an upsampled map: loads rows of the source, walks the rows of patches
// between two of them, and adds the gradient to the source's elements.
#pragma once

#include "upsampled_exponentials.h"
#include "upsampled_pixels.h"
#include "upsampled_source.h"

namespace oe_ext::cpu {
namespace {

// Are the exponentials from the ends enough for these pixels? A NaN must not reach the factor 0 of
// a pixel that does not count.
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

// The gradient of a single class is 0, or NaN: exactly, not but for roundings.
template <typename acc_t>
void clear_only_class(TileRows<acc_t>& rows) {
  for (int64_t i = 0; i < rows.size; ++i) {
    rows.factor[i] *= 0;
    rows.offset[i] = rows.at_label[i] = 0;
  }
}

// One band of an image: one row of patches after the other, strip by strip.
template <typename Patch, typename acc_t, typename Tensors>
class Band {
 public:
  using Fast = FromEnds<Patch, acc_t>;
  using Careful = FromMaxima<Patch, acc_t>;
  using Row = PatchRow<Patch, acc_t>;

  // `partial`: for the gradient of the row of elements that a band shares with the band before.
  // `scratch` holds zeros, but for what other bands of the same map left of it.
  Band(const UpsampledMap<Tensors>& args, const SourceRows<acc_t>& source,
       const Upsampling<acc_t>& cuts, int64_t task, const GroupDivisors& divisors, acc_t* partial,
       acc_t* scratch)
      : args_(args),
        source_(source),
        cuts_(cuts),
        image_(task / cuts.num_bands()),
        band_(task % cuts.num_bands()),
        divisors_(divisors),
        partial_(partial),
        columns_(cuts.columns(), args.horizontal),
        memory_(cuts, args.num_classes(), scratch),
        pixels_(args.rows, cuts.columns()) {
    std::fill(memory_.exps + num_classes() * Patch::kPixels * Patch::kLanes, memory_.has_label,
              acc_t(1));
    if constexpr (LaneRows<Patch, Tensors, acc_t>::kForward) {
      wants_cross_entropy_ = args.rows.row_cross_entropy != nullptr;
      wants_maxima_ = args.rows.row_max != nullptr;
    }
  }

  TaskResult process() {
    load(args_.vertical.first_element(begin_cell()));
    for (int64_t cell = begin_cell(); cell < end_cell(); ++cell) {
      std::swap(memory_.top, memory_.bottom);
      load(args_.vertical.second_element(cell));
      const int64_t end = cuts_.rows().begin(cell + 1);
      for (int64_t patch = cuts_.rows().begin(cell); patch < end; ++patch) {
        process_row(Row(cuts_.rows(), args_.vertical, patch));
      }
      if (writes_gradient()) {
        flush(args_.vertical.first_element(cell), args_.vertical.second_element(cell));
      }
    }
    if (writes_gradient()) {
      store(args_.vertical.second_element(end_cell() - 1));
      std::fill_n(memory_.top_gradient, size_of_gradient(), acc_t(0));
    }
    return result_;
  }

 private:
  int64_t num_classes() const { return args_.num_classes(); }
  bool writes_gradient() const { return args_.rows.grad_logits != nullptr; }
  int64_t begin_cell() const { return cuts_.begin_cell(band_); }
  int64_t end_cell() const { return cuts_.begin_cell(band_ + 1); }
  int64_t first_pixel() const { return image_ * args_.vertical.out * args_.horizontal.out; }
  int64_t size_of_gradient() const {
    return (num_classes() + 1) * Patch::kEnds * memory_.end_stride;
  }

  // Loads a row of elements as that below.
  void load(int64_t element) {
    const PatchAxis<acc_t>& axis = cuts_.columns();
    acc_t* columns = axis.phases == 1 ? memory_.bottom : memory_.columns;
    source_.load(image_, element, num_classes(), columns_, memory_.column_stride, columns);
    shift_columns(num_classes(), memory_.column_stride, columns);
    if (axis.phases == 1) {
      return;
    }
    interpolate_rows(axis, num_classes() + 2, columns, memory_.column_stride, memory_.bottom,
                     memory_.end_stride);
  }

  // A row of cells is done: the gradient of the row of elements above is complete, unless that
  // below is the same one. The row below is above the next cells.
  void flush(int64_t above, int64_t below) {
    if (above == below) {
#pragma omp simd
      for (int64_t i = 0; i < size_of_gradient(); ++i) {
        memory_.bottom_gradient[i] += memory_.top_gradient[i];
      }
    } else {
      store(above);
    }
    std::fill_n(memory_.top_gradient, size_of_gradient(), acc_t(0));
    std::swap(memory_.top_gradient, memory_.bottom_gradient);
  }

  // Writes the gradient of a row of elements, that above.
  void store(int64_t element) {
    // The first row of a band belongs to the band before, too; its part is added later.
    const bool is_shared = band_ > 0 && element < begin_cell();
    acc_t* row = is_shared ? partial_ : args_.grad.at(image_, element);
    const int64_t class_stride = is_shared ? args_.horizontal.in : args_.grad.class_stride;
    const int64_t column_stride = is_shared ? 1 : args_.grad.column_stride;
    const int64_t stride = memory_.end_stride;
    const PatchAxis<acc_t>& axis = cuts_.columns();
    const int64_t class_size = Patch::kEnds * stride;
    join_ends<Patch::kEnds, acc_t>(memory_.top_gradient + num_classes() * class_size, nullptr,
                                   stride, memory_.uniform);
    for (int64_t cls = 0; cls < num_classes(); cls += kColumnsAtOnce) {
      const int64_t count = std::min(kColumnsAtOnce, num_classes() - cls);
      for (int64_t k = 0; k < count; ++k) {
        join_ends<Patch::kEnds, acc_t>(memory_.top_gradient + (cls + k) * class_size,
                                       memory_.uniform, stride, memory_.ends + k * stride);
      }
      acc_t* columns = memory_.ends;
      if (axis.phases != 1) {
        columns = memory_.columns;  // a row of the source is not needed any more
        sum_at_columns(axis, memory_.ends, stride, columns, memory_.column_stride);
      }
      for (int64_t k = 0; k < count; ++k) {
        store_columns(columns_, columns + k * memory_.column_stride, column_stride,
                      row + (cls + k) * class_stride);
      }
    }
  }

  // Computes one row of patches.
  void process_row(const Row& row) {
    const TaskResult labels = pixels_.read_labels(row, first_pixel());
    if (labels.bad_row >= 0) {
      if (result_.bad_row < 0) {
        result_.bad_row = labels.bad_row;
      }
      return;
    }
    result_.sums.merge(labels.sums);
    for (const Strip& strip : cuts_.strips()) {
      process_strip(strip, {row, strip, memory_});
    }
  }

  void process_strip(const Strip& strip, const StripRow<Patch, acc_t>& patches) {
    TileRows<acc_t> rows(0, Patch::kArea * Patch::kLanes);
    pixels_.load(strip, patches.row, first_pixel(), wants_cross_entropy_, rows);
    const CommonLabels<Patch, acc_t> common(rows);
    const bool is_safe = sum(patches, rows);
    find_logits_at_labels(patches, num_classes(), common, rows);
    interpolate_pixels(patches, num_classes(), rows.sum_shifted);
    if (!is_safe) {
      for (int64_t i = 0; i < rows.size; ++i) {
        rows.sum_shifted[i] -= rows.max[i] * static_cast<acc_t>(num_classes());
      }
    }
    finish(strip, patches, rows);
    if (writes_gradient()) {
      add_gradients(patches, common, is_safe, rows);
    }
  }

  // Sets the maxima and the sums of exponentials; returns whether those from the ends are enough.
  bool sum(const StripRow<Patch, acc_t>& patches, TileRows<acc_t>& rows) {
    if (!wants_maxima_) {
      std::fill_n(rows.sum_exp, rows.size, acc_t(0));
      Fast::sum(patches, num_classes(), memory_, rows.sum_exp);
      if (are_sums_safe(rows)) {
        std::fill_n(rows.max, rows.size, acc_t(0));
        return true;
      }
    }
    Careful::sum(patches, num_classes(), memory_, rows);
    return false;
  }

  // Finishes the pixels from the sums of their exponentials.
  void finish(const Strip& strip, const StripRow<Patch, acc_t>& patches, TileRows<acc_t>& rows) {
    if constexpr (LaneRows<Patch, Tensors, acc_t>::kForward) {
      GroupSums sums;
      finish_rows(pixels_.in_lanes, divisors_, rows, sums);
      result_.sums.merge(sums);
      if (acc_t* max = pixels_.in_lanes.row_max; max != nullptr) {
        acc_t* shift = rows.sum_shifted;  // not needed any more
        interpolate_pixels(patches, num_classes() + 1, shift);
        for (int64_t i = 0; i < rows.size; ++i) {
          max[i] += shift[i];
        }
        pixels_.for_each_pixel(
            strip, patches.row, first_pixel(), [&](int64_t in_lanes, int64_t pixel) {
              args_.row_argmax[pixel] = static_cast<int32_t>(memory_.argmax[in_lanes]);
            });
      }
      pixels_.write(strip, patches.row, first_pixel());
    } else {
      set_gradients(pixels_.in_lanes, rows);
    }
  }

  void add_gradients(const StripRow<Patch, acc_t>& patches,
                     const CommonLabels<Patch, acc_t>& common, bool is_safe,
                     TileRows<acc_t>& rows) {
    if (num_classes() == 1) {
      clear_only_class(rows);
    }
    set_label_parts(patches, num_classes(), common, memory_, rows);
    if (is_safe) {
      Fast::add_gradients(patches, 0, num_classes(), rows.factor, memory_);
    } else {
      Careful::add_gradients(patches, num_classes(), memory_, rows);
    }
    // Exponentials of 1, in the same order of additions: equal logits get a gradient of exactly 0.
    Fast::add_gradients(patches, num_classes(), num_classes() + 1, rows.offset, memory_);
  }

  const UpsampledMap<Tensors>& args_;
  const SourceRows<acc_t>& source_;
  const Upsampling<acc_t>& cuts_;
  int64_t image_;
  int64_t band_;
  const GroupDivisors& divisors_;
  acc_t* partial_;
  Columns columns_;
  BandMemory<acc_t> memory_;
  LaneRows<Patch, Tensors, acc_t> pixels_;
  bool wants_cross_entropy_ = false;
  bool wants_maxima_ = false;
  TaskResult result_;
};

template <typename acc_t, typename Tensors>
TaskResult run_band(const UpsampledMap<Tensors>& args, const SourceRows<acc_t>& source,
                    const Upsampling<acc_t>& cuts, int64_t task, const GroupDivisors& divisors,
                    acc_t* partial, acc_t* scratch) {
  const auto run = [&]<typename Patch>(Patch) {
    return Band<Patch, acc_t, Tensors>(args, source, cuts, task, divisors, partial, scratch)
        .process();
  };
  switch (cuts.patch_pixels() + cuts.centered()) {
    case 5:
      return run(Patch<4, true>());
    case 4:
      return run(Patch<4, false>());
    case 3:
      return run(Patch<2, true>());
    case 2:
      return run(Patch<2, false>());
    default:
      return run(Patch<1, false>());
  }
}

template <typename scalar_t, typename acc_t, typename Tensors>
TaskResult upsampled_band(const UpsampledArgs<scalar_t, Tensors>& args,
                          const Upsampling<acc_t>& cuts, int64_t task,
                          const GroupDivisors& divisors, acc_t* partial, acc_t* scratch) {
  return run_band(args, SourceRows<acc_t>(args.logits), cuts, task, divisors, partial, scratch);
}

}  // namespace
}  // namespace oe_ext::cpu
