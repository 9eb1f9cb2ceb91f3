// GELU by a table of polynomials, where a permutation of two registers looks 16 lanes up at once.
//
// gelu(x) = max(x, 0) - g(|x|) with g(t) = t P(X > t), X standard normal. On each interval of 3/16
// around i * 3/16 g is a polynomial of degree 4 in the distance from the middle, good to 3e-9; the
// first one has no constant term, so that the relative error stays small towards zero. From 5.72 on
// g counts as zero: it is below 3.1e-8 there. 16 instructions for 16 lanes, a third of what vec.h's
// gelu() takes, which is exact to the last places everywhere and is what other instruction sets use
// here.
#pragma once

#include "vec.h"

namespace sdan_fast {
namespace SDAN_ISA {

#if SDAN_IS_AVX512

// kGeluTable[k][i]: the coefficient of degree k of interval i.
alignas(64) static const float kGeluTable[5][32] = {
    {0.000000000e+00f, 7.980643213e-02f, 1.326863319e-01f, 1.613743305e-01f, 1.699705124e-01f,
     1.633600444e-01f, 1.465813369e-01f, 1.242619157e-01f, 1.002108008e-01f, 7.720924169e-02f,
     5.699317902e-02f, 4.038391262e-02f, 2.750506438e-02f, 1.802435517e-02f, 1.137267705e-02f,
     6.912847050e-03f, 4.049694166e-03f, 2.287165960e-03f, 1.245639753e-03f, 6.543241907e-04f,
     3.315648064e-04f, 1.620968978e-04f, 7.646404265e-05f, 3.480594751e-05f, 1.528952816e-05f,
     6.481938271e-06f, 2.652206149e-06f, 1.047416276e-06f, 3.992604150e-07f, 1.469031758e-07f,
     5.217411925e-08f, 0.000000000e+00f},
    {5.000000000e-01f,  3.521362841e-01f,  2.143850327e-01f,  9.531899542e-02f,  7.748286007e-04f,
     -6.675563753e-02f, -1.080664396e-01f, -1.266027242e-01f, -1.274692565e-01f, -1.163503304e-01f,
     -9.857811779e-02f, -7.850003242e-02f, -5.918991566e-02f, -4.245890677e-02f, -2.906859852e-02f,
     -1.903695613e-02f, -1.194564719e-02f, -7.191238459e-03f, -4.157177173e-03f, -2.309533069e-03f,
     -1.233800314e-03f, -6.341258995e-04f, -3.136845480e-04f, -1.493982127e-04f, -6.852618390e-05f,
     -3.027835737e-05f, -1.289030661e-05f, -5.288440661e-06f, -2.091190026e-06f, -7.971138984e-07f,
     -2.929279219e-07f, 0.000000000e+00f},
    {-3.989426494e-01f, -3.851002157e-01f, -3.457089067e-01f, -2.866886854e-01f, -2.164425850e-01f,
     -1.441021115e-01f, -7.779861987e-02f, -2.337928861e-02f, 1.618958078e-02f,  4.071350023e-02f,
     5.212708190e-02f,  5.359102786e-02f,  4.860138521e-02f,  4.030619562e-02f,  3.111464344e-02f,
     2.258452773e-02f,  1.551148854e-02f,  1.012346055e-02f,  6.296973675e-03f,  3.741198918e-03f,
     2.126588952e-03f,  1.157997525e-03f,  6.046795170e-04f,  3.030357475e-04f,  1.458501647e-04f,
     6.745410792e-05f,  2.999189019e-05f,  1.282531412e-05f,  5.276560842e-06f,  2.089212103e-06f,
     7.962987070e-07f,  0.000000000e+00f},
    {1.846127816e-05f,  4.844984412e-02f,  8.948548883e-02f,  1.173544675e-01f,  1.291444600e-01f,
     1.251667440e-01f,  1.085042506e-01f,  8.394692093e-02f,  5.669381842e-02f,  3.121044859e-02f,
     1.050999761e-02f,  -4.054551013e-03f, -1.256746519e-02f, -1.607592218e-02f, -1.606004126e-02f,
     -1.399530936e-02f, -1.107958611e-02f, -8.126731031e-03f, -5.584621802e-03f, -3.620603122e-03f,
     -2.224886790e-03f, -1.300206175e-03f, -7.243588334e-04f, -3.854249080e-04f, -1.961559028e-04f,
     -9.559671162e-05f, -4.465549500e-05f, -2.000951099e-05f, -8.606207302e-06f, -3.555016519e-06f,
     -1.411016456e-06f, 0.000000000e+00f},
    {6.624964625e-02f,  6.123560667e-02f,  4.696721211e-02f,  2.673471905e-02f,  4.780896008e-03f,
     -1.472101081e-02f, -2.868434601e-02f, -3.569252416e-02f, -3.603592888e-02f, -3.128767759e-02f,
     -2.363721468e-02f, -1.523030270e-02f, -7.701183204e-03f, -1.972971950e-03f, 1.701895497e-03f,
     3.552301088e-03f,  4.054002464e-03f,  3.729024669e-03f,  3.017460695e-03f,  2.223985735e-03f,
     1.519569079e-03f,  9.724601987e-04f,  5.867402069e-04f,  3.352742060e-04f,  1.820301259e-04f,
     9.413011867e-05f,  4.644815999e-05f,  2.190308987e-05f,  9.882290215e-06f,  4.270228146e-06f,
     1.768645006e-06f,  0.000000000e+00f},
};

SDAN_INLINE Vec gelu_lookup(Vec i, int k) {
  return {_mm512_permutex2var_ps(_mm512_load_ps(kGeluTable[k]), _mm512_castps_si512(i.v),
                                 _mm512_load_ps(kGeluTable[k] + 16))};
}

// In place, V vectors step by step together: a lone one is a chain of a dozen dependent
// instructions, and the processor's scheduler is too short to overlap enough of such chains by
// itself.
template <int V>
SDAN_INLINE void gelu_short(Vec (&x)[V]) {
  const Vec magic = set1(12582912.0f);
  Vec i[V], u[V], p[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    // min and max hand their second operand on if it is NaN.
    u[v] = min(set1(5.8125f), abs(x[v]));
    // Adding 1.5 * 2^23 leaves the index of the interval in the lowest bits.
    i[v] = fma(u[v], set1(16.0f / 3.0f), magic);
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) {
    p[v] = gelu_lookup(i[v], 4);
    u[v] = fnma(i[v] - magic, set1(0.1875f), u[v]);
    x[v] = max(zero(), x[v]);
  }
#pragma GCC unroll 4
  for (int k = 3; k >= 0; --k) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) p[v] = fma(p[v], u[v], gelu_lookup(i[v], k));
  }
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) x[v] = x[v] - p[v];
}

#else

template <int V>
SDAN_INLINE void gelu_short(Vec (&x)[V]) {
#pragma GCC unroll 8
  for (int v = 0; v < V; ++v) x[v] = gelu(x[v]);
}

#endif

}  // namespace SDAN_ISA
}  // namespace sdan_fast
