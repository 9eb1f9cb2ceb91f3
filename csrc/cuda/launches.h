// The functions that the torch side (module.cpp) calls and the .cu files define; free of torch and
// of CUDA headers.
//
// Keeping torch's headers out of the .cu files keeps nvcc, which reads each file once per
// architecture, fast. Every function works on the current device, is asynchronous on `stream`, and
// throws std::runtime_error on a launch error.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace sdan_fast::cuda {

using Stream = void*;  // a cudaStream_t

enum class DType : int { kFloat32, kBFloat16, kFloat16 };

// Architectures in this build: {750, 800, ...} as in __CUDA_ARCH_LIST__; empty on the host.
std::vector<int> compiled_archs();

// Makes `device` current for this library's own copy of the CUDA runtime.
void set_device(int device);

// sum_parts.cu: sum (r, c), of outer * inner, is that over images n and splits s of parts[r *
// outer_stride + c * inner_stride + n * image_stride + s * split_stride]. It goes to the output k
// that has its column: as element (r, c - first[k]) of outer x (first[k + 1] - first[k]). A null
// output is not wanted.
constexpr int kSumOutputs = 4;
struct SumParams {
  DType dtype;  // of the outputs
  int32_t splits;
  int64_t outer, inner, images;
  int64_t outer_stride, inner_stride, image_stride, split_stride;
  void* to[kSumOutputs];
  int64_t first[kSumOutputs + 1];
  // sum_parts fills these in: a thread's way to its next term, in floats; the floats from one term
  // to the next, 0 if they are not evenly spaced, and then the way in images and splits as well,
  // and the floats that the end of an image's splits adds.
  int64_t on, term_stride;
  int32_t images_on, splits_on;
  int64_t wrap;
};
void sum_parts(const float* parts, SumParams sums, Stream stream);

// The same of several, up to kSumJobs of them in a launch: what a gradient of many parts leaves to
// the end.
constexpr int kSumJobs = 4;
struct SumJob {
  const float* parts;
  SumParams sums;
};
void sum_parts_together(const std::vector<SumJob>& jobs, Stream stream);

// One row of sums, `count` for each of `outputs` in turn.
SumParams flat_sums(DType dtype, std::initializer_list<void*> outputs, int64_t count,
                    int64_t images, int64_t splits, int64_t image_stride, int64_t sum_stride,
                    int64_t split_stride);
// `taps` sums of a weight and one of a bias for each channel, which lie together in rows; the
// strides are in rows.
SumParams weight_sums(DType dtype, void* grad_weight, void* grad_bias, int64_t channels,
                      int64_t taps, int64_t images, int64_t splits, int64_t image_stride,
                      int64_t channel_stride, int64_t split_stride);

// star.cu. n elements, all tensors in one dense layout. A null gradient is not wanted.
void star_forward(DType dtype, const void* a, const void* b, void* y, int64_t n, int activation,
                  int outer, Stream stream);
void star_backward(DType dtype, const void* grad, const void* a, const void* b, void* grad_a,
                   void* grad_b, int64_t n, int activation, int outer, Stream stream);

// depthwise_conv2d*.cu. x, y: N x C x H x W, contiguous or channels_last; weight C x kh x kw, bias
// C or null; odd kh, kw.
struct ConvShape {
  int64_t n, c, h, w;
  int kh, kw, dh, dw;
  bool channels_last;
  bool operator==(const ConvShape&) const = default;
};

// Whether the kernels have room for the shape in its layout. Where they have none for contiguous
// tensors (far dilations), they may for channels_last ones.
bool conv_fits(DType dtype, const ConvShape& shape);

// flip: with the taps reversed, which is the gradient of the input.
void conv_forward(DType dtype, const void* x, const void* weight, const void* bias, void* y,
                  const ConvShape& shape, bool flip, Stream stream);

// The first launch of two of the weight gradient, if the kernels have room, and what sum_parts is
// to do then; `partial` holds conv_partial_floats floats. A null gradient is not wanted.
bool conv_wgrad_fits(DType dtype, const ConvShape& shape);
int64_t conv_partial_floats(DType dtype, const ConvShape& shape);
SumJob conv_weight_gradient(DType dtype, const void* grad, const void* x, float* partial,
                            void* grad_weight, void* grad_bias, const ConvShape& shape,
                            Stream stream);

// strip_conv_chain*.cu. One or two 1-D depth-wise convolutions along one axis, 1 x k or k x 1, in
// one pass: see strip_conv_chain.cuh.
struct Strip {
  const void *weight = nullptr, *bias = nullptr;  // c x taps; c or null
  int taps = 1, dilation = 1;
};
struct StripPass {
  const void* x = nullptr;
  void* y = nullptr;
  const void* gate = nullptr;  // null, or a tensor like y that multiplies a vertical pass's result
  int64_t n = 0, c = 0, h = 0, w = 0;
  bool channels_last = false, vertical = false, flip = false;
  int steps = 1;
  Strip strip[2];
  // A second bias of the first convolution of a vertical pass (bias is null if there is none),
  // which this horizontal convolution, done already, has spread over the row: by its taps that meet
  // the image.
  Strip edge;
};

// Whether the kernels have room for it: not for the farthest dilations. If not, convolve_strips
// does nothing and returns false.
bool strips_fit(DType dtype, const StripPass& pass);
bool convolve_strips(DType dtype, const StripPass& pass, Stream stream);

// strip_conv_chain_bias.cu. The bias gradients of a whole chain, `strips` its 2 * stages horizontal
// and vertical convolutions in turn; their `bias` does not matter. `scratch` holds
// chain_bias_floats floats; a null gradient is not wanted. N * C and H * W < 2^31.
struct ChainShape {
  int64_t n, c, h, w, stages;
  bool channels_last;
};
int64_t chain_bias_floats(DType dtype, const ChainShape& shape);
void chain_bias_gradients(DType dtype, const void* grad, const Strip* strips, float* scratch,
                          void* const* grad_biases, const ChainShape& shape, Stream stream);

// layer_norm2d.cu. weight, bias: C; bias may be null. `pixels` is H * W. At most 4096 channels.
struct NormShape {
  int64_t n, pixels;
  int channels;
  bool channels_last;
};
void norm_forward(DType dtype, const void* x, const void* weight, const void* bias, void* y,
                  const NormShape& shape, float eps, Stream stream);
// A null gradient is not wanted; `partial`, null if neither of weight and bias is, holds
// norm_partial_floats(shape) floats. The shape has to fit: channels_last tensors of many channels
// do not.
bool norm_backward_fits(const NormShape& shape);
int64_t norm_partial_floats(const NormShape& shape);
void norm_backward(DType dtype, const void* grad, const void* x, const void* weight, void* grad_x,
                   float* partial, void* grad_weight, void* grad_bias, const NormShape& shape,
                   float eps, Stream stream);

// star_conv.cu: outer(GELU(DW3x3(p) + bias) * b). y and its gradient are dense; p, b and their
// gradients may be slices: `step` elements from one image (contiguous) or pixel (channels_last) to
// the next. weight C x 3 x 3, bias C or null. H * W < 2^31.
struct StarConvShape {
  int64_t n, step;
  int channels, height, width;
  bool channels_last;
};
void star_conv_forward(DType dtype, const void* p, const void* b, const void* weight,
                       const void* bias, void* y, const StarConvShape& shape, int outer,
                       Stream stream);
// grad_p and grad_b are null, or neither is; `partial`, null if neither of weight and bias is
// wanted, holds star_conv_partial_floats(shape) floats. A null gradient is not wanted.
int64_t star_conv_partial_floats(const StarConvShape& shape);
void star_conv_backward(DType dtype, const void* grad, const void* p, const void* b,
                        const void* weight, const void* bias, void* grad_p, void* grad_b,
                        float* partial, void* grad_weight, void* grad_bias,
                        const StarConvShape& shape, int outer, Stream stream);

// pointwise_gate.cu: y = a * (t + bias), if y is not null; h = a * b, if b is not null (h may be),
// and grad_bias = the sums of h by channel, if `partial` is not null, which then holds
// gate_partial_floats(shape) floats. All dense; bias may be null.
struct GateShape {
  int64_t n, pixels;
  int channels;
  bool channels_last;
};
int64_t gate_partial_floats(const GateShape& shape);
void gate(DType dtype, const void* a, const void* t, const void* b, const void* bias, void* y,
          void* h, float* partial, void* grad_bias, const GateShape& shape, Stream stream);

}  // namespace sdan_fast::cuda
