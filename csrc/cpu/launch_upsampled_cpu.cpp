#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "launch_cpu.h"
#include "tasks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace oe_ext::cpu {
namespace {

constexpr int64_t kMaxClasses = int64_t(1) << 20;

// Results that are subnormal numbers become 0 while it exists. Powers of small exponentials pass
// through them, and each costs some hundred cycles on x86-64. Subnormal inputs stay: the conversion
// of half logits uses them.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
#endif
};

// Runs a kernel for every band, and adds up the gradients of the rows of elements that bands share.
template <typename acc_t, typename Args, typename Kernel>
TaskResult for_each_band(const Args& args, const GroupDivisors& divisors, const Kernel& kernel) {
  const int64_t num_classes = args.num_classes();
  if (args.rows.layout.num_rows() == 0) {
    return {};
  }
  // Kernels hold a class as a number of the arithmetic's type, and memory for a row of all classes.
  TORCH_CHECK(num_classes <= kMaxClasses,
              "outlier_exposure_loss: on the CPU, upsample='bilinear' takes at most ", kMaxClasses,
              " classes, got ", num_classes);
  const Upsampling<acc_t> cuts(args.vertical, args.horizontal, num_classes);
  const int64_t scratch_size = BandMemory<acc_t>(cuts, num_classes, nullptr).size;
  const int64_t num_bands = cuts.num_bands();
  const int64_t num_columns = args.horizontal.in;
  const int64_t row_size = num_classes * num_columns;
  const bool writes_gradient = args.rows.grad_logits != nullptr;
  const int64_t num_tasks = args.num_images * num_bands;
  const int64_t task_logits = args.rows.layout.num_rows() * num_classes / num_tasks;
  const int64_t grain = kGrainLogits / std::max<int64_t>(1, task_logits);
  const Scratch<acc_t> partial(writes_gradient ? num_tasks * row_size : 0);
  const TaskResult result =
      for_each_task(num_tasks, grain, [&](int64_t begin, int64_t end, TaskResult* results) {
        [[maybe_unused]] const FlushSubnormals flush;
        const Scratch<acc_t> scratch(scratch_size);
        std::fill_n(scratch.data(), scratch_size, acc_t(0));
        for (int64_t task = begin; task < end; ++task) {
          acc_t* shared = writes_gradient ? partial.data() + task * row_size : nullptr;
          results[task] = kernel(args, cuts, task, divisors, shared, scratch.data());
        }
      });
  if (!writes_gradient) {
    return result;
  }
  parallel_for(num_tasks, std::max<int64_t>(1, kGrainLogits / row_size),
               [&](int64_t begin, int64_t end) {
                 for (int64_t task = begin; task < end; ++task) {
                   const int64_t band = task % num_bands;
                   const int64_t element = args.vertical.first_element(cuts.begin_cell(band));
                   acc_t* row = args.grad.at(task / num_bands, element);
                   const acc_t* shared = partial.data() + task * row_size;
                   for (int64_t cls = 0; band > 0 && cls < num_classes; ++cls) {
                     acc_t* to = row + cls * args.grad.class_stride;
                     for (int64_t column = 0; column < num_columns; ++column) {
                       to[column * args.grad.column_stride] += shared[cls * num_columns + column];
                     }
                   }
                 }
               });
  return result;
}

}  // namespace

template <typename scalar_t, typename acc_t>
int64_t forward(const UpsampledForwardArgs<scalar_t, acc_t>& args) {
  return run_forward(args.rows, [&](const GroupDivisors& divisors) {
    return for_each_band<acc_t>(args, divisors,
                                chosen_kernels().template of<scalar_t>().upsampled_forward);
  });
}

template <typename scalar_t, typename acc_t>
int64_t backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args) {
  return for_each_band<acc_t>(args, {}, chosen_kernels().template of<scalar_t>().upsampled_backward)
      .bad_row;
}

#define OE_EXT_INSTANTIATE(scalar_t, acc_t)                                    \
  template int64_t forward(const UpsampledForwardArgs<scalar_t, acc_t>& args); \
  template int64_t backward(const UpsampledBackwardArgs<scalar_t, acc_t>& args)
OE_EXT_INSTANTIATE(double, double);
OE_EXT_INSTANTIATE(float, float);
OE_EXT_INSTANTIATE(c10::Half, float);
OE_EXT_INSTANTIATE(c10::BFloat16, float);
#undef OE_EXT_INSTANTIATE

}  // namespace oe_ext::cpu
