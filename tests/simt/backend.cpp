// The operators once more, in a namespace of their own: the CUDA launchers and kernels on CPU
// tensors, each allowed to touch the buffers that it is given and nothing else.
#include "../../csrc/cuda/launch.h"
#include "../../csrc/operator.h"
#include "../../csrc/schemas.h"
#include "watch.h"

namespace oe_ext {
namespace {

size_t extent(const RowLayout& layout) {
  return (layout.num_outer - 1) * layout.outer_stride +
         (layout.num_inner - 1) * layout.inner_stride +
         (layout.num_classes - 1) * layout.class_stride + 1;
}

size_t bytes_of(const Labels& labels, int64_t num_rows) {
  switch (labels.type) {
    case LabelType::kInt64:
      return num_rows * sizeof(int64_t);
    case LabelType::kInt32:
      return num_rows * sizeof(int32_t);
    case LabelType::kInt16:
      return num_rows * sizeof(int16_t);
    default:
      return num_rows;
  }
}

template <typename T>
size_t bytes_of(const PerRow<T>& values, int64_t num_rows) {
  return ((num_rows - 1) * values.stride + 1) * sizeof(T);
}

struct SimtBackend {
  template <typename scalar_t, typename acc_t>
  static int64_t forward(const ForwardArgs<scalar_t, acc_t>& args) {
    const int64_t num_rows = args.layout.num_rows();
    const size_t row_bytes = num_rows * sizeof(acc_t);
    const simt::Watch logits(args.logits, extent(args.layout) * sizeof(scalar_t));
    const simt::Watch labels(args.labels.data, bytes_of(args.labels, num_rows));
    const simt::Watch alpha(args.alpha.values.data, bytes_of(args.alpha.values, num_rows));
    const simt::Watch loss(args.row_loss, row_bytes);
    const simt::Watch cross_entropy(args.row_cross_entropy, row_bytes);
    const simt::Watch max(args.row_max, row_bytes);
    const simt::Watch sum_exp(args.row_sum_exp, row_bytes);
    cuda::forward(args, nullptr);
    return -1;
  }

  template <typename scalar_t, typename acc_t>
  static int64_t backward(const BackwardArgs<scalar_t, acc_t>& args) {
    const int64_t num_rows = args.layout.num_rows();
    const size_t row_bytes = num_rows * sizeof(acc_t);
    const simt::Watch logits(args.logits, extent(args.layout) * sizeof(scalar_t));
    const simt::Watch gradient(args.grad_logits, extent(args.grad_layout) * sizeof(scalar_t));
    const simt::Watch labels(args.labels.data, bytes_of(args.labels, num_rows));
    const simt::Watch alpha(args.alpha.values.data, bytes_of(args.alpha.values, num_rows));
    const simt::Watch upstream(args.grad.data, bytes_of(args.grad, num_rows));
    const simt::Watch max(args.row_max, row_bytes);
    const simt::Watch sum_exp(args.row_sum_exp, row_bytes);
    const simt::Watch counts(args.counts, 2 * sizeof(int64_t));
    cuda::backward(args, nullptr);
    return -1;
  }

  template <typename acc_t>
  static void reduce(const ReduceArgs<acc_t>& args) {
    std::vector<GroupSums> partials(cuda::num_partials(args.num_rows));
    const simt::Watch sums(partials.data(), partials.size() * sizeof(GroupSums));
    const simt::Watch rows(args.row_loss, args.num_rows * sizeof(acc_t));
    const simt::Watch labels(args.labels.data, bytes_of(args.labels, args.num_rows));
    const simt::Watch loss(args.loss, sizeof(acc_t));
    const simt::Watch counts(args.counts, 2 * sizeof(int64_t));
    cuda::reduce(args, partials.data(), nullptr);
  }
};

}  // namespace

TORCH_LIBRARY(oe_ext_simt, m) { define_operators(m); }

TORCH_LIBRARY_IMPL(oe_ext_simt, CPU, m) { Operator<SimtBackend>::register_for(m); }

}  // namespace oe_ext
