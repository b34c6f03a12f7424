#include "include/oe_ext/oe_ext.h"

#include "dispatch.h"

namespace oe_ext {

at::Tensor outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target, double alpha,
                                 std::string_view reduction, std::optional<int64_t> ignore_index,
                                 std::optional<int64_t> ood_index) {
  return loss_operator().call(logits, target, alpha, reduction, ignore_index, ood_index);
}

at::Tensor outlier_exposure_loss(const at::Tensor& logits, const at::Tensor& target,
                                 const at::Tensor& alpha, std::string_view reduction,
                                 std::optional<int64_t> ignore_index,
                                 std::optional<int64_t> ood_index) {
  return loss_tensor_alpha_operator().call(logits, target, alpha, reduction, ignore_index,
                                           ood_index);
}

}  // namespace oe_ext
