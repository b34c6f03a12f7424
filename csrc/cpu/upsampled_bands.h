// The kernels of one band of an upsampled map: loads rows of the source, walks the rows of pixels
// between two of them, and adds the gradient to the source's elements.
#pragma once

#include "upsampled_lines.h"
#include "upsampled_source.h"

namespace oe_ext::cpu {
namespace {

// The gradients of its last rows of elements are a band's own. That of its first row belongs to the
// band before, unless there is none; a band has its part of it in `partial`.
template <typename Args, typename acc_t>
void clear_gradient(const Args& args, const Upsampling<acc_t>& cuts, int64_t image, int64_t band,
                    acc_t* partial) {
  const int64_t num_columns = args.horizontal.in;
  std::fill_n(partial, args.num_classes() * num_columns, acc_t(0));
  const int64_t begin = band == 0 ? 0 : cuts.begin_cell(band);
  const int64_t last = band + 1 == cuts.num_bands()
                           ? args.vertical.in - 1
                           : args.vertical.second_element(cuts.begin_cell(band + 1) - 1);
  for (int64_t cls = 0; cls < args.num_classes(); ++cls) {
    for (int64_t row = begin; row <= last; ++row) {
      acc_t* to = args.grad.at(image, row) + cls * args.grad.class_stride;
      for (int64_t i = 0; i < num_columns; ++i) {
        to[i * args.grad.column_stride] = 0;
      }
    }
  }
}

template <typename Segment, typename Args, typename acc_t>
TaskResult process_band(const Args& args, const Upsampling<acc_t>& cuts, int64_t task,
                        const GroupDivisors& divisors, acc_t* partial, acc_t* scratch) {
  const int64_t num_classes = args.num_classes();
  const int64_t image = task / cuts.num_bands();
  const int64_t band = task % cuts.num_bands();
  const bool writes_gradient = args.rows.grad_logits != nullptr;
  const acc_t phase = acc_t(1) / static_cast<acc_t>(cuts.phases());
  StripMemory<acc_t> memory(cuts, num_classes, scratch);
  const int64_t gradient_size = memory.of_end(num_classes + 1, 0);
  // Zeros also where nothing is written but padding is read: whether a row of pixels is safe must
  // not depend on what this memory held before.
  std::fill_n(scratch, memory.size, acc_t(0));
  std::fill_n(memory.end_exps(num_classes), memory.ends, acc_t(1));
  // The first row of elements belongs to the band before, too; its part is added later.
  const ImageView<acc_t> first_row = {partial, 0, args.horizontal.in, 0, 1};

  if (writes_gradient) {
    clear_gradient(args, cuts, image, band, partial);
  }

  LaneRows<decltype(args.rows), acc_t> pixels(args.rows);
  TaskResult result;
  for (const Strip<acc_t>& strip : cuts.strips()) {
    const StripElements elements(strip, args.horizontal);
    const auto load = [&](int64_t element, acc_t* ends, acc_t* last) {
      load_columns(args.logits, args.logits.at(image, element), num_classes, elements,
                   cuts.padded_cells(), memory.columns);
      shift_columns(num_classes, elements.num_columns, cuts.padded_cells(), memory.columns);
      set_ends_of_source(strip, num_classes + 2, memory.columns, cuts.padded_cells(), ends,
                         memory.lanes, last);
    };
    const auto flush = [&](int64_t element, const acc_t* gradient) {
      const bool is_shared = band > 0 && element < cuts.begin_cell(band);
      const ImageView<acc_t>& grad = is_shared ? first_row : args.grad;
      add_to_source<Segment>(strip, phase, elements, num_classes, memory, gradient, grad,
                             is_shared ? partial : args.grad.at(image, element));
    };
    load(args.vertical.first_element(cuts.begin_cell(band)), memory.bottom, memory.bottom_last);
    for (int64_t cell = cuts.begin_cell(band); cell < cuts.begin_cell(band + 1); ++cell) {
      std::swap(memory.top, memory.bottom);
      std::swap(memory.top_last, memory.bottom_last);
      load(args.vertical.second_element(cell), memory.bottom, memory.bottom_last);
      for (int64_t y = cuts.rows().begin(cell); y < cuts.rows().begin(cell + 1); ++y) {
        const acc_t position = cuts.rows().position[y];
        const Line<acc_t> line = {
            strip.num_lanes,     strip.padded_lanes(),
            strip.num_cells,     strip.num_cells == strip.num_lanes ? 1 : strip.num_cells,
            acc_t(1) - position, position};
        const int64_t first =
            (image * args.vertical.out + y) * args.horizontal.out + strip.first_pixel;
        const int64_t bad_row =
            process_line<Segment>(args, strip, line, first, divisors, memory, pixels, result.sums);
        if (bad_row >= 0 && (result.bad_row < 0 || bad_row < result.bad_row)) {
          result.bad_row = bad_row;
        }
      }
      if (writes_gradient) {
        // The row below is above the next cells.
        flush(args.vertical.first_element(cell), memory.top_gradient);
        std::swap(memory.top_gradient, memory.bottom_gradient);
        std::fill_n(memory.bottom_gradient, gradient_size, acc_t(0));
      }
    }
    if (writes_gradient) {
      flush(args.vertical.second_element(cuts.begin_cell(band + 1) - 1), memory.top_gradient);
      std::fill_n(memory.top_gradient, gradient_size, acc_t(0));
    }
  }
  return result;
}

template <typename Args, typename acc_t>
TaskResult upsampled_band(const Args& args, const Upsampling<acc_t>& cuts, int64_t task,
                          const GroupDivisors& divisors, acc_t* partial, acc_t* scratch) {
  const auto run = [&]<typename Segment>(Segment) {
    return process_band<Segment>(args, cuts, task, divisors, partial, scratch);
  };
  switch (cuts.segment_pixels() + cuts.centered()) {
    case 5:
      return run(Segment<4, true>());
    case 4:
      return run(Segment<4, false>());
    case 3:
      return run(Segment<2, true>());
    case 2:
      return run(Segment<2, false>());
    default:
      return run(Segment<1, false>());
  }
}

}  // namespace
}  // namespace oe_ext::cpu
