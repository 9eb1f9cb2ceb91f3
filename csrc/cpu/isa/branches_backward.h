// The entry points of branches_backward's kernels.
#pragma once

#include "../fused.h"

namespace sdan_fast {

struct BackwardConv {
  BranchConv conv;       // of the taps that can touch the image
  const float* flipped;  // its weights turned by half a turn
  double* weight_sums;   // images x channels x kh x kw, null if they are not wanted
  double* bias_sums;     // images x channels, null likewise
};

// One branch. The data of `grad_x` is null where nobody asks for it, that of `addend` where nothing
// is to be added to it.
struct BackwardPlan {
  int64_t height, width;
  int first_channel, channels;
  const BackwardConv* convs;
  int conv_count;
  int used_inputs;  // convolutions, from the first on, up to the last whose weight sums are wanted
  int first_grad;   // gradients flow back to this convolution's output
  ImageView x, grad, addend, grad_x;
};

// What the planes left, added up over the images: values of kh x kw taps, of which the others of
// full_h x full_w are zero already.
struct SumsPlan {
  const double* sums;  // images x channels x kh x kw
  int64_t images, channels;
  int64_t kh, kw, i0, j0, full_h, full_w;
  DType dtype;
  void* out;
};

}  // namespace sdan_fast

// Bytes of scratch of one call: every input and two gradients of a plane.
SDAN_DECLARE_KERNEL(branch_backward_scratch, const ::sdan_fast::BackwardPlan* plan, int64_t* bytes)
// Image n; `channel` counts within the branch.
SDAN_DECLARE_KERNEL(branch_backward_run, const ::sdan_fast::BackwardPlan* plan, int64_t n,
                    int channel, void* scratch)

SDAN_DECLARE_KERNEL(add_up_images, const ::sdan_fast::SumsPlan* plan)
