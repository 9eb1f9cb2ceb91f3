// Checks and set-up of MM-LKA, shared by mm_lka.cpu and rsdam.cpu.
#pragma once

#include "star_chain.h"

namespace sdan_fast {

constexpr int64_t kMostBranchConvs = 16;

struct Branches {
  std::vector<Branch> branches;
  std::vector<BranchConv> convs;
};

inline Branches make_branches(FloatArena& arena, const Tensor& x, int64_t channels,
                              const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                              const std::vector<bool>& bias_mask,
                              const std::vector<int64_t>& dilations,
                              const std::vector<int64_t>& lengths, const char* op) {
  const size_t count = weights.size();
  STD_TORCH_CHECK(bias_mask.size() == count, op, ": bias_mask must have one entry per weight, ",
                  count, ", got ", bias_mask.size());
  STD_TORCH_CHECK(dilations.size() == 2 * count, op,
                  ": dilations must have two entries per weight, ", 2 * count, ", got ",
                  dilations.size());
  int64_t present = 0, total = 0;
  for (const bool b : bias_mask) present += b ? 1 : 0;
  STD_TORCH_CHECK(static_cast<int64_t>(biases.size()) == present, op, ": biases must hold the ",
                  present, " tensors that bias_mask announces, got ", biases.size());
  for (const int64_t n : lengths) {
    STD_TORCH_CHECK(n >= 1 && n <= kMostBranchConvs, op, ": lengths must be between 1 and ",
                    kMostBranchConvs, ", got ", n);
    total += n;
  }
  STD_TORCH_CHECK(total == static_cast<int64_t>(count), op,
                  ": lengths must add up to the number of weights, ", count, ", got ", total);
  Branches result;
  size_t conv = 0, bias = 0;
  int64_t first = 0;
  for (const int64_t length : lengths) {
    Branch branch{static_cast<int>(first), 0, static_cast<int>(conv), static_cast<int>(length)};
    for (int64_t j = 0; j < length; ++j, ++conv) {
      const Tensor& w = weights[conv];
      check_like(w, x, 4, op, "each of weights");
      if (j == 0) branch.channels = static_cast<int>(w.size(0));
      STD_TORCH_CHECK(
          w.size(0) == branch.channels && w.size(0) >= 1 && w.size(1) == 1 && w.size(2) % 2 == 1 &&
              w.size(3) % 2 == 1,
          op, ": weights[", static_cast<int64_t>(conv),
          "] must have shape (channels of its branch, 1, kh, kw) with odd kh and kw, got shape ",
          shape_of(w));
      const int64_t dh = dilations[2 * conv], dw = dilations[2 * conv + 1];
      constexpr int64_t kFar = 1 << 20;
      STD_TORCH_CHECK(
          dh >= 1 && dw >= 1 && dh * w.size(2) < kFar && dw * w.size(3) < kFar, op,
          ": dilations must be positive and the dilated kernel shorter than 2^20, got dilation (",
          dh, ", ", dw, ") of a kernel of shape ", shape_of(w));
      BranchConv c{arena.values(w),
                   nullptr,
                   static_cast<int>(w.size(2)),
                   static_cast<int>(w.size(3)),
                   static_cast<int>(dh),
                   static_cast<int>(dw)};
      if (bias_mask[conv]) {
        check_vector(biases[bias], x, w.size(0), op, "each of biases");
        c.bias = arena.values(biases[bias++]);
      } else {
        c.bias = arena.zeros(w.size(0));
      }
      result.convs.push_back(c);
    }
    first += branch.channels;
    result.branches.push_back(branch);
  }
  STD_TORCH_CHECK(first == channels, op, ": the branches' channels must add up to x's ", channels,
                  ", got ", first);
  return result;
}

// The depth-wise half over every image, plane by plane; regions where a plane outgrows the cache.
inline void run_branches(const BranchPlan& plan, const std::vector<Branch>& branches,
                         int64_t images) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(branch_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(branch_run);
  if (images == 0 || plan.height == 0 || plan.width == 0) return;
  struct Tasks {
    int branch;
    RegionGrid grid;
    int64_t first, cost;
  };
  int64_t planes = 0, work = 0;
  for (const Branch& b : branches) {
    planes += images * b.channels;
    for (int j = 0; j < b.conv_count; ++j) {
      const BranchConv& c = plan.convs[b.first_conv + j];
      work += static_cast<int64_t>(b.channels) * c.kh * c.kw;
    }
  }
  const int64_t threads = threads_for(images * plan.height * plan.width * work);
  std::vector<Tasks> tasks;
  int64_t scratch = 0;
  for (size_t i = 0; i < branches.size(); ++i) {
    const Branch& b = branches[i];
    int64_t pad_y = 0, pad_x = 0, taps = 0;
    for (int j = 0; j < b.conv_count; ++j) {
      const BranchConv& c = plan.convs[b.first_conv + j];
      pad_y += static_cast<int64_t>(c.dh) * (c.kh / 2);
      pad_x += static_cast<int64_t>(c.dw) * (c.kw / 2);
      taps += static_cast<int64_t>(c.kh) * c.kw;
    }
    RegionGrid grid{images, plan.height, plan.width, 1, 1};
    // Halve the longer side, seen against its halo, until the buffers fit.
    int64_t bytes = 0;
    for (;;) {
      const int64_t h = (plan.height + grid.bands - 1) / grid.bands,
                    w = (plan.width + grid.tiles - 1) / grid.tiles;
      scratch_kernel(&plan, static_cast<int>(i), h, w, &bytes);
      const bool idle = planes * grid.bands * grid.tiles < threads;
      const bool tall = h > 2 * pad_y + 16, wide = w > 2 * pad_x + 64;
      if ((bytes <= cache_bytes() && !idle) || (!tall && !wide)) break;
      if (tall && (!wide || h * (pad_x + 16) >= w * (pad_y + 4))) {
        ++grid.bands;
      } else {
        ++grid.tiles;
      }
    }
    scratch = std::max(scratch, bytes);
    tasks.push_back({static_cast<int>(i), grid, 0,
                     taps * plan.height * plan.width / (grid.bands * grid.tiles)});
  }
  // The long ones first, so that the threads finish together.
  std::sort(tasks.begin(), tasks.end(),
            [](const Tasks& a, const Tasks& b) { return a.cost > b.cost; });
  int64_t count = 0;
  for (Tasks& t : tasks) {
    t.first = count;
    count += t.grid.count() * branches[t.branch].channels;
  }
  run_tasks(threads, count, [&](int64_t i) {
    size_t k = tasks.size() - 1;
    while (tasks[k].first > i) --k;
    const Tasks& t = tasks[k];
    const int64_t channels = branches[t.branch].channels;
    const Region region = t.grid.at((i - t.first) / channels);
    run_kernel(&plan, t.branch, static_cast<int>((i - t.first) % channels), &region,
               thread_scratch(static_cast<size_t>(scratch)));
  });
}

inline void run_edge(const EdgePlan& plan, int64_t images) {
  static const auto scratch_kernel = SDAN_PICK_KERNEL(edge_scratch);
  static const auto run_kernel = SDAN_PICK_KERNEL(edge_run);
  if (images == 0 || plan.height == 0 || plan.width == 0) return;
  const int64_t threads = threads_for(images * plan.height * plan.width *
                                      (multiply_adds(plan.pw) + multiply_adds(plan.up)));
  RegionGrid grid{images, plan.height, plan.width, 1, 1};
  int64_t bytes = 0;
  for (;; ++grid.tiles) {
    scratch_kernel(&plan, (plan.width + grid.tiles - 1) / grid.tiles, &bytes);
    if (bytes <= cache_bytes() || plan.width / grid.tiles < 256) break;
  }
  const int64_t least = std::max<int64_t>(16, plan.height / (4 * threads));
  // Each piece computes a halo of its own. The dense convolution pairs its rows the same way for
  // any number of threads, since pieces begin at even rows.
  run_rows(threads, grid.count(), plan.height, least, [&](int64_t part, int64_t y0, int64_t y1) {
    Region region = grid.at(part);
    region.y0 = y0;
    region.y1 = y1;
    run_kernel(&plan, &region, thread_scratch(static_cast<size_t>(bytes)));
  });
}

// Whether the depth-wise half may read t's planes and write them directly.
inline bool planar(const Tensor& t) {
  return t.stride(3) == 1 || t.size(3) == 1;
}

// An image's values into another's memory format, both of shape `like` and of one dtype.
inline void copy_format(const ImageView& from, const ImageView& to, const Tensor& like) {
  static const auto copy_kernel = SDAN_PICK_KERNEL(copy_image);
  constexpr int64_t kWork = 8;  // multiply-adds that take as long as moving an element
  run_rows(threads_for(kWork * like.numel()), like.size(0), like.size(2), 4,
           [&](int64_t n, int64_t y0, int64_t y1) {
             const Region region{n, y0, y1, 0, like.size(3)};
             copy_kernel(&from, &to, static_cast<int>(like.size(1)), &region);
           });
}

// x with rows of neighbouring pixels: x itself, or a copy.
inline Tensor in_planes(const Tensor& x, DType dtype) {
  if (planar(x)) return x;
  if (x.stride(1) != 1) return in_format(x, Format::kContiguous);
  Tensor planes = empty_in_format(x.sizes(), x, Format::kContiguous);
  prefer_huge_pages(planes.data_ptr(), static_cast<size_t>(planes.numel()) * planes.element_size());
  copy_format(view_of(x, dtype), view_of(planes, dtype), x);
  return planes;
}

// How an image between two sweeps is stored: as what the products read, if they multiply pairs of
// bfloat16, else in float32.
inline DType between_dtype(const FloatArena& arena) {
  return arena.pairs() ? DType::kBFloat16 : DType::kFloat32;
}

inline Tensor empty_planes(const Tensor& x, torch::headeronly::IntHeaderOnlyArrayRef shape,
                           DType dtype) {
  using torch::headeronly::ScalarType;
  Tensor planes = torch::stable::empty(
      shape, dtype == DType::kBFloat16 ? ScalarType::BFloat16 : ScalarType::Float, std::nullopt,
      x.device(), std::nullopt, torch::headeronly::MemoryFormat::Contiguous);
  // A sweep touches a row of every plane, that is, one small page for each.
  prefer_huge_pages(planes.data_ptr(), static_cast<size_t>(planes.numel()) * planes.element_size());
  return planes;
}

}  // namespace sdan_fast
