// The backward of depth-wise branches: checks, the filters' parts that matter, planes and threads.
#include "branches_backward.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "flat_conv.h"
#include "image_memory.h"
#include "isa/branches_backward.h"
#include "lka.h"
#include "tiling.h"

namespace sdan_fast {
namespace {

void check_call(const BranchesBackward& call) {
  const char* op = call.op;
  const Tensor& x = call.x;
  check_cpu(x, op, "x");
  check_like(x, x, 4, op, "x");
  const auto check_image_like_x = [&](const Tensor& t, const char* name) {
    check_cpu(t, op, name);
    STD_TORCH_CHECK(t.dim() == 4 && t.sizes() == x.sizes(), op, ": ", name,
                    " must have the shape of x, ", shape_of(x), ", got ", shape_of(t));
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type() ||
                        t.scalar_type() == torch::headeronly::ScalarType::Float,
                    op, ": ", name, " must have the dtype of x, ",
                    torch::headeronly::toString(x.scalar_type()), ", or float32, got ",
                    torch::headeronly::toString(t.scalar_type()));
  };
  check_image_like_x(call.grad, "grad_output");
  if (call.addend.has_value()) check_image_like_x(*call.addend, "addend");
  const size_t count = call.weights.size();
  STD_TORCH_CHECK(call.bias_mask.size() == count, op,
                  ": bias_mask must have one entry per weight, ", count, ", got ",
                  call.bias_mask.size());
  STD_TORCH_CHECK(call.dilations.size() == 2 * count, op,
                  ": dilations must have two entries per weight, ", 2 * count, ", got ",
                  call.dilations.size());
  const auto present = std::count(call.bias_mask.begin(), call.bias_mask.end(), true);
  STD_TORCH_CHECK(static_cast<int64_t>(call.biases.size()) == present, op,
                  ": biases must hold the ", present, " tensors that bias_mask announces, got ",
                  call.biases.size());
  const size_t slots = 1 + count + call.biases.size();
  STD_TORCH_CHECK(call.output_mask.size() == slots, op, ": output_mask must have ", slots,
                  " entries, got ", call.output_mask.size());
  int64_t total = 0;
  for (const int64_t n : call.lengths) {
    STD_TORCH_CHECK(n >= 1, op, ": lengths must be positive, got ", n);
    total += n;
  }
  STD_TORCH_CHECK(total == static_cast<int64_t>(count), op,
                  ": lengths must add up to the number of weights, ", count, ", got ", total);
  int64_t channels = 0;
  size_t i = 0, b = 0;
  for (const int64_t length : call.lengths) {
    const int64_t own = call.weights[i].dim() == 4 ? call.weights[i].size(0) : 0;
    for (const size_t end = i + static_cast<size_t>(length); i < end; ++i) {
      const Tensor& w = call.weights[i];
      check_like(w, x, 4, op, "each of weights");
      STD_TORCH_CHECK(
          w.size(0) == own && w.size(1) == 1 && w.size(2) % 2 == 1 && w.size(3) % 2 == 1, op,
          ": weights[", i,
          "] must have shape (channels of its branch, 1, kh, kw) with odd kh and kw, got shape ",
          shape_of(w));
      STD_TORCH_CHECK(call.dilations[2 * i] >= 1 && call.dilations[2 * i + 1] >= 1, op,
                      ": dilations must be positive, got (", call.dilations[2 * i], ", ",
                      call.dilations[2 * i + 1], ")");
      if (call.bias_mask[i]) check_vector(call.biases[b++], x, own, op, "each of biases");
    }
    channels += own;
  }
  STD_TORCH_CHECK(channels == x.size(1), op, ": the branches' channels must add up to x's ",
                  x.size(1), ", got ", channels);
}

// Images as the kernels read and write them: as they are where their rows are neighbouring pixels,
// else as planes in memory that is kept from call to call.
class PlaneCopies {
 public:
  // Its number in the other calls.
  size_t add(const Tensor& t, const char* op, const char* name) {
    const DType dtype = kernel_dtype(t, op, name);
    const bool readable = planar(t) || t.stride(1) == 1;
    images_.push_back({readable ? t : in_format(t, Format::kContiguous), {}, {}});
    Image& image = images_.back();
    image.own = image.planes = view_of(image.tensor, dtype);
    if (!planar(image.tensor)) bytes_ += bytes_of(image);
    return images_.size() - 1;
  }

  void allocate() {
    if (bytes_ == 0) return;
    memory_.emplace(bytes_);
    for (Image& image : images_) {
      const Tensor& t = image.tensor;
      if (planar(t)) continue;
      image.planes = memory_->take(t.size(0), t.size(1), t.size(2), t.size(3), image.own.dtype);
    }
  }

  const ImageView& view(size_t i) const { return images_[i].planes; }

  const ImageView& copied(size_t i) const {
    const Image& image = images_[i];
    if (!planar(image.tensor)) copy_format(image.own, image.planes, image.tensor);
    return image.planes;
  }

  void copy_back(size_t i) const {
    const Image& image = images_[i];
    if (!planar(image.tensor)) copy_format(image.planes, image.own, image.tensor);
  }

 private:
  struct Image {
    Tensor tensor;
    ImageView own, planes;
  };

  static size_t bytes_of(const Image& image) {
    const Tensor& t = image.tensor;
    return ImageMemory::bytes_of(t.size(0), t.size(1), t.size(2), t.size(3), image.own.dtype);
  }

  std::vector<Image> images_;
  size_t bytes_ = 0;
  std::optional<ImageMemory> memory_;
};

// The taps of one convolution that can touch the image, as the kernels take them, and where their
// sums and gradients go.
struct Filter {
  UsedTaps rows, columns;
  std::unique_ptr<double[]> weight_sums, bias_sums;
  Tensor grad_weight, grad_bias;
};

std::unique_ptr<double[]> unwritten(int64_t n) {
  return std::unique_ptr<double[]>(new double[static_cast<size_t>(n)]);
}

BackwardConv prepare(FloatArena& arena, Filter& filter, const Tensor& weight, const Tensor* bias,
                     const int64_t* dilation, const Tensor& x) {
  filter.rows = used_taps(weight.size(2), dilation[0], x.size(2));
  filter.columns = used_taps(weight.size(3), dilation[1], x.size(3));
  const int64_t channels = weight.size(0), full_h = weight.size(2), full_w = weight.size(3);
  const int64_t kh = filter.rows.count, kw = filter.columns.count;
  FloatArena whole(arena);
  const float* values = whole.values(weight);
  float* used = arena.take(channels * kh * kw);
  float* flipped = arena.take(channels * kh * kw);
  for (int64_t c = 0; c < channels; ++c) {
    float* taps = used + c * kh * kw;
    for (int64_t i = 0; i < kh; ++i) {
      std::copy_n(values + (c * full_h + filter.rows.first + i) * full_w + filter.columns.first, kw,
                  taps + i * kw);
    }
    std::reverse_copy(taps, taps + kh * kw, flipped + c * kh * kw);
  }
  return {{used, bias != nullptr ? arena.values(*bias) : arena.zeros(channels),
           static_cast<int>(kh), static_cast<int>(kw), static_cast<int>(kh == 1 ? 1 : dilation[0]),
           static_cast<int>(kw == 1 ? 1 : dilation[1])},
          flipped,
          filter.weight_sums.get(),
          filter.bias_sums.get()};
}

// A gradient of zeros for a parameter.
Tensor zeros_like(const Tensor& t) {
  Tensor zeros = empty_in_format(t.sizes(), t, output_format(t));
  std::memset(zeros.data_ptr(), 0, static_cast<size_t>(zeros.numel()) * zeros.element_size());
  return zeros;
}

void add_up(const double* sums, int64_t images, int64_t channels, UsedTaps rows, UsedTaps columns,
            int64_t full_h, int64_t full_w, DType dtype, Tensor& out) {
  static const auto kernel = SDAN_PICK_KERNEL(add_up_images);
  const SumsPlan plan{sums,          images, channels, rows.count, columns.count, rows.first,
                      columns.first, full_h, full_w,   dtype,      out.data_ptr()};
  kernel(&plan);
}

// The planes of every image, the branches with most to do first so that the threads finish
// together.
void run_planes(const std::vector<BackwardPlan>& plans, int64_t images) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(branch_backward_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(branch_backward_run);
  struct Tasks {
    const BackwardPlan* plan;
    int64_t first, work;
  };
  std::vector<Tasks> tasks;
  int64_t scratch = 0, work = 0;
  for (const BackwardPlan& plan : plans) {
    int64_t taps = 8;  // loading and storing
    for (int i = 0; i < plan.conv_count; ++i) {
      taps += 3 * int64_t{plan.convs[i].conv.kh} * plan.convs[i].conv.kw;
    }
    int64_t bytes = 0;
    scratch_kernel(&plan, &bytes);
    scratch = std::max(scratch, bytes);
    tasks.push_back({&plan, 0, taps * plan.height * plan.width});
    work += images * plan.channels * tasks.back().work;
  }
  std::sort(tasks.begin(), tasks.end(),
            [](const Tasks& a, const Tasks& b) { return a.work > b.work; });
  int64_t count = 0;
  for (Tasks& t : tasks) {
    t.first = count;
    count += images * t.plan->channels;
  }
  run_tasks(threads_for(work), count, [&](int64_t i) {
    size_t k = tasks.size() - 1;
    while (tasks[k].first > i) --k;
    const BackwardPlan& plan = *tasks[k].plan;
    const int64_t plane = i - tasks[k].first;
    run_kernel(&plan, plane / plan.channels, static_cast<int>(plane % plan.channels),
               thread_scratch(static_cast<size_t>(scratch)));
  });
}

// The gradients of one convolution in channels_last where the rows are read in place, or false. Few
// taps: a vector of the gradient is loaded again for each tap's input, while planes share both.
bool run_flat_backward(const BranchesBackward& call, const BackwardConv& conv, Tensor* grad_x) {
  const Tensor& x = call.x;
  const BranchConv& taps = conv.conv;
  DepthwiseArgs args{};
  args.dtype = kernel_dtype(x, call.op, "x");
  args.n = x.size(0), args.c = x.size(1), args.h = x.size(2), args.w = x.size(3);
  args.kh = args.kh_used = taps.kh, args.kw = args.kw_used = taps.kw;
  args.dh = taps.dh, args.dw = taps.dw;
  if (call.addend.has_value() || call.format != Format::kChannelsLast ||
      args.dtype != DType::kFloat32 || !reads_flat(args) || taps.kh * taps.kw > kMostFlatTaps) {
    return false;
  }
  const Tensor grad = in_format(call.grad, Format::kChannelsLast);
  args.x = grad.const_data_ptr();
  if (grad_x != nullptr) {
    args.weight = conv.flipped;
    args.y = grad_x->mutable_data_ptr();
    run_flat(args);
  }
  if (conv.weight_sums != nullptr || conv.bias_sums != nullptr) {
    const Tensor input = in_format(x, Format::kChannelsLast);
    FlatSums sums{};
    sums.x = static_cast<const float*>(input.const_data_ptr());
    sums.grad = static_cast<const float*>(grad.const_data_ptr());
    sums.h = args.h, sums.w = args.w, sums.c = args.c;
    sums.kh = args.kh, sums.kw = args.kw, sums.dh = args.dh, sums.dw = args.dw;
    run_flat_sums(sums, args.n, conv.weight_sums, conv.bias_sums);
  }
  return true;
}

}  // namespace

std::vector<Tensor> branches_backward(const BranchesBackward& call) {
  check_call(call);
  const Tensor& x = call.x;
  const DType dtype = kernel_dtype(x, call.op, "x");
  const size_t count = call.weights.size();
  const bool need_x = call.output_mask[0];
  const int64_t images = x.size(0);
  const bool empty = x.numel() == 0;

  FloatArena arena(dtype);
  std::vector<Filter> filters(count);
  std::vector<BackwardConv> convs;
  bool any_weight = false, any = need_x;
  for (size_t i = 0, b = 0; i < count; ++i) {
    Filter& filter = filters[i];
    const Tensor& weight = call.weights[i];
    const Tensor* bias = call.bias_mask[i] ? &call.biases[b++] : nullptr;
    const int64_t channels = weight.size(0);
    if (call.output_mask[1 + i]) {
      filter.grad_weight = zeros_like(weight);
      const int64_t taps = used_taps(weight.size(2), call.dilations[2 * i], x.size(2)).count *
                           used_taps(weight.size(3), call.dilations[2 * i + 1], x.size(3)).count;
      filter.weight_sums = unwritten(images * channels * taps);
      any_weight = any = true;
    }
    if (bias != nullptr && call.output_mask[count + b]) {
      filter.grad_bias = zeros_like(*bias);
      filter.bias_sums = unwritten(images * channels);
      any = true;
    }
    convs.push_back(prepare(arena, filter, weight, bias, &call.dilations[2 * i], x));
  }

  Tensor grad_x;
  if (need_x) grad_x = empty_in_format(x.sizes(), x, call.format);
  if (any && !empty &&
      !(count == 1 && run_flat_backward(call, convs[0], need_x ? &grad_x : nullptr))) {
    const bool add = need_x && call.addend.has_value();
    PlaneCopies planes;
    const size_t grad = planes.add(call.grad, call.op, "grad_output");
    const size_t input = any_weight ? planes.add(x, call.op, "x") : 0;
    const size_t addend = add ? planes.add(*call.addend, call.op, "addend") : 0;
    const size_t result = need_x ? planes.add(grad_x, call.op, "x") : 0;
    planes.allocate();
    BackwardPlan plan{};
    plan.height = x.size(2);
    plan.width = x.size(3);
    plan.grad = planes.copied(grad);
    if (any_weight) plan.x = planes.copied(input);
    if (add) plan.addend = planes.copied(addend);
    if (need_x) plan.grad_x = planes.view(result);
    std::vector<BackwardPlan> plans;
    const BackwardConv* conv = convs.data();
    for (const int64_t length : call.lengths) {
      plan.convs = conv;
      plan.conv_count = static_cast<int>(length);
      const Tensor& weight = call.weights[static_cast<size_t>(conv - convs.data())];
      plan.channels = static_cast<int>(weight.size(0));
      plan.used_inputs = 0;
      plan.first_grad = need_x ? 0 : plan.conv_count;
      for (int i = 0; i < plan.conv_count; ++i) {
        const bool sums = conv[i].weight_sums != nullptr || conv[i].bias_sums != nullptr;
        if (conv[i].weight_sums != nullptr) plan.used_inputs = i + 1;
        if (sums && i < plan.first_grad) plan.first_grad = i;
      }
      if (plan.first_grad < plan.conv_count) plans.push_back(plan);
      plan.first_channel += plan.channels;
      conv += length;
    }
    run_planes(plans, images);
    if (need_x) planes.copy_back(result);
  }

  std::vector<Tensor> gradients, biases;
  if (need_x) gradients.push_back(grad_x);
  for (size_t i = 0; i < count; ++i) {
    Filter& f = filters[i];
    const Tensor& w = call.weights[i];
    if (f.weight_sums != nullptr) {
      if (!empty) {
        add_up(f.weight_sums.get(), images, w.size(0), f.rows, f.columns, w.size(2), w.size(3),
               dtype, f.grad_weight);
      }
      gradients.push_back(f.grad_weight);
    }
    if (f.bias_sums != nullptr) {
      if (!empty) {
        add_up(f.bias_sums.get(), images, w.size(0), {0, 1}, {0, 1}, 1, 1, dtype, f.grad_bias);
      }
      biases.push_back(f.grad_bias);
    }
  }
  gradients.insert(gradients.end(), biases.begin(), biases.end());
  return gradients;
}

}  // namespace sdan_fast
