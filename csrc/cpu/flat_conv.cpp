#include "flat_conv.h"

#include <memory>

#include "tensor_util.h"
#include "tiling.h"

namespace sdan_fast {
namespace {

const auto conv_kernel = SDAN_PICK_KERNEL(flat_conv_run);
const auto sums_kernel = SDAN_PICK_KERNEL(flat_sums_run);

// Rows of a task: whole groups of `group` rows where there are so many, about four tasks for each
// thread if there is much to do.
int64_t task_rows(const DepthwiseArgs& a, int64_t group, int64_t work) {
  if (work <= (1 << 20)) return a.h;
  const int64_t parts = (4 * torch::stable::get_num_threads() + a.n - 1) / a.n;
  const int64_t rows = (a.h + parts - 1) / parts;
  return 2 * group <= a.h ? (rows + group - 1) / group * group : rows;
}

}  // namespace

bool loads_flat(DType dtype) {
  return dtype == DType::kFloat32 || picked_isa() != Isa::kPortable;
}

bool reads_flat(const DepthwiseArgs& a) {
  const int64_t taps = a.kh_used * a.kw_used;
  return loads_flat(a.dtype) && a.c >= vector_lanes() && a.w * a.c < (1 << 28) &&
         taps <= (picked_isa() == Isa::kAvx512 ? 64 : 128) && taps * a.c <= 8 * 1024;
}

void run_flat(DepthwiseArgs args) {
  const int64_t work = args.n * args.c * args.h * args.w * (args.kh_used * args.kw_used + 8);
  const int64_t rows = task_rows(args, args.kh_used == 1 ? 4 : 4 * args.dh, work);
  args.grid = {rows, args.w, (args.h + rows - 1) / rows, 1};
  const int64_t tasks = args.n * args.grid.tiles_h;
  parallel_for(tasks, grain_for(work / tasks / 4),
               [&](int64_t begin, int64_t end) { conv_kernel(args, begin, end); });
}

void run_flat_sums(FlatSums args, int64_t images, double* weight_sums, double* bias_sums) {
  // The strips are the same for any number of threads.
  args.strip_rows = args.h > 16 * 8 ? (args.h + 15) / 16 : 8;
  args.strips = (args.h + args.strip_rows - 1) / args.strip_rows;
  args.weights = weight_sums != nullptr;
  args.bias = bias_sums != nullptr;
  const int64_t taps = args.kh * args.kw, strip = (taps + 1) * args.c;
  const int64_t tasks = images * args.strips;
  const std::unique_ptr<double[]> sums(new double[static_cast<size_t>(tasks * strip)]);
  args.sums = sums.get();
  parallel_for(tasks, grain_for(args.strip_rows * args.w * args.c * (taps + 4) / 4),
               [&](int64_t begin, int64_t end) { sums_kernel(args, begin, end); });
  for (int64_t n = 0; n < images; ++n) {
    for (int64_t c = 0; c < args.c; ++c) {
      for (int64_t t = 0; t <= taps; ++t) {
        double* out = t < taps ? weight_sums : bias_sums;
        if (out == nullptr) continue;
        double sum = 0.0;
        for (int64_t s = 0; s < args.strips; ++s) {
          sum += sums[static_cast<size_t>((n * args.strips + s) * strip + t * args.c + c)];
        }
        out[t < taps ? (n * args.c + c) * taps + t : n * args.c + c] = sum;
      }
    }
  }
}

}  // namespace sdan_fast
