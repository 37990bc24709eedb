// SPDX-License-Identifier: Apache-2.0
// Kernels of bias_act.py and modulated_bias_act.py. All are bound by memory: a thread owns a group of consecutive
// elements, moved 16 bytes at a time, and computes in float (double for double), rounding once.

#include "bias_act_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <type_traits>

namespace bias_act {
namespace {

constexpr int THREADS = 256;
constexpr int BYTES_PER_ACCESS = 16;

// torch.nn.functional.softplus is the identity beyond this.
constexpr float SOFTPLUS_THRESHOLD = 20;
// Klambauer et al. 2017: the fixed point of SELU is mean 0 and variance 1.
constexpr double SELU_SCALE = 1.0507009873554804934193349852946;
constexpr double SELU_ALPHA = 1.6732632423543772848170429916717;

// What the mask says of an element: its derivative is 0, gain, or gain * slope.
constexpr unsigned FLAT = 0, STEEP = 1, SLOPED = 2;
constexpr int BITS_PER_CODE = 2;

template <typename T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Elements of a group: 16 bytes, but at least four, so that the codes of a group fill bytes.
template <typename T>
constexpr int GROUP = sizeof(T) == 2 ? 8 : 4;

template <typename T>
using Codes = std::conditional_t<GROUP<T> == 8, uint16_t, uint8_t>;

template <typename T, int N>
struct alignas(BYTES_PER_ACCESS) Pack {
    T item[N];
};

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void narrow(float value, float& result) { result = value; }
__device__ inline void narrow(double value, double& result) { result = value; }
__device__ inline void narrow(float value, __half& result) { result = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }

// A division of 64 bits takes several times as long as one of 32, and tensors that need it are rare.
__device__ inline int64_t divide(int64_t a, int64_t b) {
    const bool is_short = ((static_cast<uint64_t>(a) | static_cast<uint64_t>(b)) >> 32) == 0;
    return is_short ? static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b)) : a / b;
}

// ---- Groups of elements

struct Span {
    int64_t first;
    int64_t size;     // Of the whole tensor: the last group may be cut.
    bool is_aligned;  // All tensors begin at a multiple of 16 bytes.
};

template <typename T>
__device__ Span own_span(int64_t size, bool is_aligned) {
    const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
    return {thread * GROUP<T>, size, is_aligned};
}

template <typename T>
__device__ void load(const T* source, const Span& span, Compute<T> (&value)[GROUP<T>]) {
    if (span.is_aligned && span.first + GROUP<T> <= span.size) {
        const auto pack = *reinterpret_cast<const Pack<T, GROUP<T>>*>(source + span.first);
#pragma unroll
        for (int k = 0; k < GROUP<T>; ++k)
            value[k] = widen(pack.item[k]);
    } else {
#pragma unroll
        for (int k = 0; k < GROUP<T>; ++k)
            value[k] = span.first + k < span.size ? widen(source[span.first + k]) : Compute<T>(0);
    }
}

template <typename T>
__device__ void store(T* target, const Span& span, const Compute<T> (&value)[GROUP<T>]) {
    if (span.is_aligned && span.first + GROUP<T> <= span.size) {
        Pack<T, GROUP<T>> pack;
#pragma unroll
        for (int k = 0; k < GROUP<T>; ++k)
            narrow(value[k], pack.item[k]);
        *reinterpret_cast<Pack<T, GROUP<T>>*>(target + span.first) = pack;
    } else {
#pragma unroll
        for (int k = 0; k < GROUP<T>; ++k)
            if (span.first + k < span.size)
                narrow(value[k], target[span.first + k]);
    }
}

// ---- Pre-activations

template <typename T, bool MODULATED>
struct Terms {
    using S = Compute<T>;
    using Bias = std::conditional_t<MODULATED, S, T>;

    const S* scale;
    const S* noise;
    const Bias* b;
    int64_t noise_stride;
    Layout layout;
    bool rows_fit;  // No group crosses from one row, along `inner`, to the next; the tables are aligned like groups.
};

struct Place {
    int64_t outer, middle, inner;

    __device__ Place(const Layout& layout, int64_t index) {
        const int64_t row = divide(index, layout.inner);
        inner = index - row * layout.inner;
        outer = divide(row, layout.middle);
        middle = row - outer * layout.middle;
    }

    __device__ void advance(const Layout& layout) {
        if (++inner < layout.inner)
            return;
        inner = 0;
        if (++middle < layout.middle)
            return;
        middle = 0;
        ++outer;
    }

    // Of all samples: outer * channels + channel.
    __device__ int64_t sample_channel(const Layout& layout) const {
        return outer * (layout.channel_is_inner ? layout.inner : layout.middle) + channel(layout);
    }

    __device__ int64_t channel(const Layout& layout) const { return layout.channel_is_inner ? inner : middle; }
    __device__ int64_t pixel(const Layout& layout) const { return layout.channel_is_inner ? middle : inner; }
};

// The table's entries for a group: consecutive ones where the table runs along the row, else one for all.
template <typename Entry, typename S, int N>
__device__ void look_up(const Entry* table, int64_t at, bool runs_along, S (&entry)[N]) {
    if (runs_along) {
        const auto pack = *reinterpret_cast<const Pack<Entry, N>*>(table + at);
#pragma unroll
        for (int k = 0; k < N; ++k)
            entry[k] = widen(pack.item[k]);
    } else {
        const S only = widen(table[at]);
#pragma unroll
        for (int k = 0; k < N; ++k)
            entry[k] = only;
    }
}

// Turn x into x * scale + noise + b, and tell the scale, of a group in one row.
template <typename T, bool MODULATED, typename S = Compute<T>, int N = GROUP<T>>
__device__ void apply_to_row(const Terms<T, MODULATED>& terms, int64_t first, S (&value)[N], S (&scale)[N]) {
    const Layout& layout = terms.layout;
    const Place place(layout, first);
    S entry[N];
    if (MODULATED && terms.scale) {
        look_up(terms.scale, place.sample_channel(layout), layout.channel_is_inner, scale);
#pragma unroll
        for (int k = 0; k < N; ++k)
            value[k] *= scale[k];
    }
    if (MODULATED && terms.noise) {
        look_up(terms.noise, place.outer * terms.noise_stride + place.pixel(layout), !layout.channel_is_inner, entry);
#pragma unroll
        for (int k = 0; k < N; ++k)
            value[k] += entry[k];
    }
    if (terms.b) {
        look_up(terms.b, place.channel(layout), layout.channel_is_inner, entry);
#pragma unroll
        for (int k = 0; k < N; ++k)
            value[k] += entry[k];
    }
}

// The same for a group that may cross rows and end beyond the tensor.
template <typename T, bool MODULATED, typename S = Compute<T>, int N = GROUP<T>>
__device__ void apply_singly(const Terms<T, MODULATED>& terms, int64_t first, S (&value)[N], S (&scale)[N]) {
    const Layout& layout = terms.layout;
    Place place(layout, first);
#pragma unroll
    for (int k = 0; k < N; ++k) {
        if (first + k >= layout.size)
            return;
        if (MODULATED && terms.scale) {
            scale[k] = terms.scale[place.sample_channel(layout)];
            value[k] *= scale[k];
        }
        if (MODULATED && terms.noise)
            value[k] += terms.noise[place.outer * terms.noise_stride + place.pixel(layout)];
        if (terms.b)
            value[k] += widen(terms.b[place.channel(layout)]);
        place.advance(layout);
    }
}

template <typename T, bool MODULATED, typename S = Compute<T>, int N = GROUP<T>>
__device__ void preactivate(const Terms<T, MODULATED>& terms, int64_t first, S (&value)[N], S (&scale)[N]) {
#pragma unroll
    for (int k = 0; k < N; ++k)
        scale[k] = 1;
    if (terms.rows_fit)
        apply_to_row(terms, first, value, scale);
    else
        apply_singly(terms, first, value, scale);
}

// ---- Activations, with torch's values and subgradients at the kinks, at infinity and for NaN

template <typename S>
struct Curve {
    Act act;
    S slope;  // Of the piecewise linear ones where p is not positive: 1, 0 or alpha.
    S gain;
    S clamp;

    __device__ bool is_within(S value) const { return clamp < 0 || std::fabs(value) <= clamp; }

    __device__ S limit(S value) const {  // Keeps NaN.
        if (clamp < 0)
            return value;
        return value > clamp ? clamp : value < -clamp ? -clamp : value;
    }
};

template <typename S>
__device__ S sigmoid(S p) {
    return 1 / (1 + std::exp(-p));
}

template <typename S>
__device__ S linear_value(const Curve<S>& curve, S p, unsigned& code) {
    // ReLU passes the gradient of NaN and is 0, not 0 * p, on the other side; leaky ReLU does neither.
    const bool is_relu = curve.act == Act::relu;
    const bool is_steep = is_relu ? !(p <= 0) : p > 0;
    const S value = curve.gain * (is_steep ? p : is_relu ? S(0) : p * curve.slope);
    code = !curve.is_within(value) ? FLAT : is_steep ? STEEP : is_relu ? FLAT : SLOPED;
    return value;
}

template <typename S>
__device__ S smooth_value(Act act, S p) {
    switch (act) {
        case Act::tanh: return std::tanh(p);
        case Act::sigmoid: return sigmoid(p);
        case Act::elu: return p <= 0 ? std::expm1(p) : p;
        case Act::selu: return S(SELU_SCALE) * (p <= 0 ? S(SELU_ALPHA) * std::expm1(p) : p);
        case Act::softplus: return p > S(SOFTPLUS_THRESHOLD) ? p : std::log1p(std::exp(p));
        default: return p * sigmoid(p);  // Swish.
    }
}

template <typename S>
__device__ S smooth_derivative(Act act, S p) {
    switch (act) {
        case Act::tanh: { const S y = std::tanh(p); return 1 - y * y; }
        case Act::sigmoid: { const S y = sigmoid(p); return y * (1 - y); }
        case Act::elu: return p <= 0 ? std::exp(p) : S(1);
        case Act::selu: return S(SELU_SCALE) * (p <= 0 ? S(SELU_ALPHA) * std::exp(p) : S(1));
        case Act::softplus: return p > S(SOFTPLUS_THRESHOLD) ? S(1) : sigmoid(p);
        default: { const S y = sigmoid(p); return y + p * y * (1 - y); }
    }
}

template <typename S>
__device__ S pull_back(const Curve<S>& curve, S g, unsigned code) {
    if (code == FLAT)
        return 0;  // And not 0 * g, which may be NaN.
    return g * curve.gain * (code == STEEP ? S(1) : curve.slope);
}

template <bool SMOOTH, typename S>
__device__ S gradient(const Curve<S>& curve, S p, S g) {
    if constexpr (SMOOTH) {
        const bool is_within = curve.is_within(curve.gain * smooth_value(curve.act, p));
        return (is_within ? g : S(0)) * curve.gain * smooth_derivative(curve.act, p);
    } else {
        unsigned code;
        linear_value(curve, p, code);
        return pull_back(curve, g, code);
    }
}

// ---- Kernels

template <typename T, bool SMOOTH, bool MODULATED>
__global__ void forward_kernel(const T* x, Terms<T, MODULATED> terms, Curve<Compute<T>> curve, T* y, Codes<T>* mask,
                               bool is_aligned) {
    const Span span = own_span<T>(terms.layout.size, is_aligned);
    if (span.first >= span.size)
        return;
    Compute<T> value[GROUP<T>], scale[GROUP<T>];
    load(x, span, value);
    preactivate(terms, span.first, value, scale);
    unsigned codes = 0;
#pragma unroll
    for (int k = 0; k < GROUP<T>; ++k) {
        if constexpr (SMOOTH) {
            value[k] = curve.limit(curve.gain * smooth_value(curve.act, value[k]));
        } else {
            unsigned code;
            value[k] = curve.limit(linear_value(curve, value[k], code));
            codes |= code << (BITS_PER_CODE * k);
        }
    }
    store(y, span, value);
    if (!SMOOTH && mask)
        mask[span.first / GROUP<T>] = static_cast<Codes<T>>(codes);
}

template <typename T, bool SMOOTH, bool MODULATED>
__global__ void backward_kernel(const T* g, const T* x, Terms<T, MODULATED> terms, Curve<Compute<T>> curve, T* gx,
                                T* gp, bool is_aligned) {
    const Span span = own_span<T>(terms.layout.size, is_aligned);
    if (span.first >= span.size)
        return;
    Compute<T> value[GROUP<T>], scale[GROUP<T>], slope[GROUP<T>];
    load(x, span, value);
    load(g, span, slope);
    preactivate(terms, span.first, value, scale);
#pragma unroll
    for (int k = 0; k < GROUP<T>; ++k)
        value[k] = gradient<SMOOTH>(curve, value[k], slope[k]);
    if (MODULATED && gp)
        store(gp, span, value);
#pragma unroll
    for (int k = 0; k < GROUP<T>; ++k)
        value[k] *= scale[k];
    store(gx, span, value);
}

template <typename T>
__global__ void masked_kernel(const T* g, const Codes<T>* mask, int64_t size, Curve<Compute<T>> curve, T* gx,
                              bool is_aligned) {
    const Span span = own_span<T>(size, is_aligned);
    if (span.first >= span.size)
        return;
    Compute<T> value[GROUP<T>];
    load(g, span, value);
    const unsigned codes = mask[span.first / GROUP<T>];
#pragma unroll
    for (int k = 0; k < GROUP<T>; ++k)
        value[k] = pull_back(curve, value[k], (codes >> (BITS_PER_CODE * k)) & 3);
    store(gx, span, value);
}

// ---- Launches

template <typename T, typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t size, cudaStream_t stream, Arguments... arguments) {
    const int64_t per_block = static_cast<int64_t>(THREADS) * GROUP<T>;
    const auto blocks = static_cast<unsigned>((size + per_block - 1) / per_block);
    kernel<<<blocks, THREADS, 0, stream>>>(arguments...);
    return cudaGetLastError();
}

template <typename... Pointers>
bool are_aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % BYTES_PER_ACCESS == 0) && ...);
}

template <typename T, bool MODULATED>
Terms<T, MODULATED> make_terms(const Inputs& inputs, const Layout& layout) {
    using S = Compute<T>;
    using Bias = typename Terms<T, MODULATED>::Bias;
    const bool rows_fit = layout.inner % GROUP<T> == 0 && are_aligned(inputs.scale, inputs.noise, inputs.b);
    return {static_cast<const S*>(inputs.scale), static_cast<const S*>(inputs.noise),
            static_cast<const Bias*>(inputs.b), inputs.noise_stride, layout, rows_fit};
}

template <typename S>
Curve<S> make_curve(const Function& function) {
    const double slope = function.act == Act::linear ? 1 : function.act == Act::relu ? 0 : function.alpha;
    return {function.act, static_cast<S>(slope), static_cast<S>(function.gain), static_cast<S>(function.clamp)};
}

template <typename T, bool SMOOTH, bool MODULATED>
cudaError_t forward(const Inputs& inputs, const Layout& layout, const Function& function, void* y, void* mask,
                    cudaStream_t stream) {
    return launch<T>(forward_kernel<T, SMOOTH, MODULATED>, layout.size, stream, static_cast<const T*>(inputs.x),
                     make_terms<T, MODULATED>(inputs, layout), make_curve<Compute<T>>(function), static_cast<T*>(y),
                     static_cast<Codes<T>*>(mask), are_aligned(inputs.x, y));
}

template <typename T, bool SMOOTH, bool MODULATED>
cudaError_t backward(const Inputs& inputs, const Layout& layout, const Function& function, const void* g, void* gx,
                     void* gp, cudaStream_t stream) {
    return launch<T>(backward_kernel<T, SMOOTH, MODULATED>, layout.size, stream, static_cast<const T*>(g),
                     static_cast<const T*>(inputs.x), make_terms<T, MODULATED>(inputs, layout),
                     make_curve<Compute<T>>(function), static_cast<T*>(gx), static_cast<T*>(gp),
                     are_aligned(inputs.x, g, gx, gp));
}

// Call function(T()) with the element type of a dtype.
template <typename Callable>
cudaError_t with_type(Dtype dtype, Callable function) {
    switch (dtype) {
        case Dtype::half: return function(__half());
        case Dtype::bfloat16: return function(__nv_bfloat16());
        case Dtype::single: return function(float());
        case Dtype::twice: return function(double());
    }
    return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t launch_forward(const Inputs& inputs, const Layout& layout, const Function& function, void* y, void* mask,
                           cudaStream_t stream) {
    if (layout.size == 0)
        return cudaSuccess;
    const bool is_smooth = !is_piecewise_linear(function.act);
    return with_type(inputs.dtype, [&](auto zero) {
        using T = decltype(zero);
        auto* plain = is_smooth ? forward<T, true, false> : forward<T, false, false>;
        auto* modulated = is_smooth ? forward<T, true, true> : forward<T, false, true>;
        return (inputs.modulated ? modulated : plain)(inputs, layout, function, y, mask, stream);
    });
}

cudaError_t launch_backward(const Inputs& inputs, const Layout& layout, const Function& function, const void* g,
                            void* gx, void* gp, cudaStream_t stream) {
    if (layout.size == 0)
        return cudaSuccess;
    const bool is_smooth = !is_piecewise_linear(function.act);
    if (!inputs.modulated && !is_smooth)
        return cudaErrorInvalidValue;
    return with_type(inputs.dtype, [&](auto zero) {
        using T = decltype(zero);
        auto* modulated = is_smooth ? backward<T, true, true> : backward<T, false, true>;
        return (inputs.modulated ? modulated : backward<T, true, false>)(inputs, layout, function, g, gx, gp, stream);
    });
}

cudaError_t launch_masked(Dtype dtype, const void* g, const void* mask, int64_t size, const Function& function,
                          void* gx, cudaStream_t stream) {
    if (size == 0)
        return cudaSuccess;
    return with_type(dtype, [&](auto zero) {
        using T = decltype(zero);
        return launch<T>(masked_kernel<T>, size, stream, static_cast<const T*>(g),
                         static_cast<const Codes<T>*>(mask), size, make_curve<Compute<T>>(function),
                         static_cast<T*>(gx), are_aligned(g, gx));
    });
}

}  // namespace bias_act
