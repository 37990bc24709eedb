// SPDX-License-Identifier: Apache-2.0
// Kernels of upfirdn2d.py on a CUDA device: one for 4x4 filters, with its window in registers, one for everything else.
//
// A batch of pictures is seen as [outer, height, width, inner]: outer = N·C and inner = 1 for NCHW, outer = N and
// inner = C for channels_last. Output i of an axis is the sum over taps k of tap k times upsampled sample
// i·down + k - pad, where the samples between those of the input, and all beyond its ends, are 0.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace next3d {

// These three are declared in upfirdn2d_cuda.cpp too, word for word.
enum class Type { kHalf, kBFloat16, kFloat, kDouble };

struct Axis {
    int in, out, up, down, pad, taps;
};

struct Resampling {
    Axis x, y;
    int outer, inner;
    bool flip;  // False: the filter is turned round, a convolution.
    double gain;
};

namespace {

constexpr int kThreads = 256;
constexpr int kVectorBytes = 16;  // Of one load or store.
constexpr int kLineBytes = 128;   // Of a cache line.

template <class T>
struct Sum {
    using type = float;
};
template <>
struct Sum<double> {
    using type = double;
};

__device__ inline float widen(float value) { return value; }
__device__ inline double widen(double value) { return value; }
__device__ inline float widen(__half value) { return __half2float(value); }
__device__ inline float widen(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void narrow(float value, float& result) { result = value; }
__device__ inline void narrow(double value, double& result) { result = value; }
__device__ inline void narrow(float value, __half& result) { result = __float2half_rn(value); }
__device__ inline void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }

int divide_up(int64_t value, int64_t divisor) { return static_cast<int>((value + divisor - 1) / divisor); }

// The least power of two that is no less than `value`, and no more than `limit`, which is one.
int power_of_two(int value, int limit) {
    int power = 1;
    while (power < value && power < limit)
        power *= 2;
    return power;
}

// ---- Any filter and factors: a thread per output.

// The taps that meet input samples: `tap`, `tap` + up, ... meet `in`, `in` + 1, ...
struct Meeting {
    int in, tap, count;
};

__device__ inline Meeting meet(const Axis& axis, int out) {
    const int start = out * axis.down - axis.pad;
    const int in = start <= 0 ? 0 : (start + axis.up - 1) / axis.up;
    const int tap = in * axis.up - start;
    return {in, tap, min(axis.in - in, (axis.taps - tap + axis.up - 1) / axis.up)};
}

// Blocks go along a row of outputs (width x inner) first, then over the rows (outer x height).
template <class In, class Out>
__global__ void __launch_bounds__(kThreads)
filter_any(const In* __restrict__ x, const float* __restrict__ f, Out* __restrict__ y, Resampling r, int row_blocks) {
    using Number = typename Sum<In>::type;
    const int64_t element = static_cast<int64_t>(blockIdx.x % row_blocks) * blockDim.x + threadIdx.x;
    const int64_t row = static_cast<int64_t>(blockIdx.x / row_blocks) * blockDim.y + threadIdx.y;
    const int row_size = r.x.out * r.inner;
    if (element >= row_size || row >= static_cast<int64_t>(r.outer) * r.y.out)
        return;
    const int picture = static_cast<int>(row) / r.y.out, channel = static_cast<int>(element) % r.inner;
    const Meeting across = meet(r.x, static_cast<int>(element) / r.inner);
    const Meeting down = meet(r.y, static_cast<int>(row) % r.y.out);
    const int last = r.x.taps * r.y.taps - 1;
    Number sum = 0;
    for (int i = 0; i < down.count; ++i) {
        const int64_t in_row = static_cast<int64_t>(picture) * r.y.in + down.in + i;
        const In* sample = x + (in_row * r.x.in + across.in) * r.inner + channel;
        int tap = (down.tap + i * r.y.up) * r.x.taps + across.tap;
        for (int j = 0; j < across.count; ++j, tap += r.x.up, sample += r.inner) {
            const Number weight = f == nullptr ? 1.0f : f[r.flip ? tap : last - tap];
            sum = fma(weight, widen(*sample), sum);
        }
    }
    narrow(sum * static_cast<Number>(r.gain), y[row * row_size + element]);
}

template <class In, class Out>
void launch_any(const void* x, const float* f, void* y, const Resampling& r, cudaStream_t stream) {
    const int row_size = r.x.out * r.inner;
    const dim3 block(power_of_two(row_size, kThreads), kThreads / power_of_two(row_size, kThreads));
    const int row_blocks = divide_up(row_size, block.x);
    const int column_blocks = divide_up(static_cast<int64_t>(r.outer) * r.y.out, block.y);
    const unsigned grid = static_cast<unsigned>(row_blocks) * static_cast<unsigned>(column_blocks);
    filter_any<In, Out><<<grid, block, 0, stream>>>(static_cast<const In*>(x), f, static_cast<Out*>(y), r, row_blocks);
}

// ---- 4x4 filters: a thread makes a strip of outputs, top to bottom, for a pack of neighbouring channels.

constexpr int kTaps = 4;
// Long strips read fewer rows twice, short ones make more threads: as long as there are enough threads for a large GPU.
constexpr int kLongestStrip = 16, kShortestStrip = 4;
constexpr int64_t kEnoughThreads = 1 << 18;

template <int BYTES>
struct Bits;
template <>
struct Bits<2> {
    using type = unsigned short;
};
template <>
struct Bits<4> {
    using type = unsigned;
};
template <>
struct Bits<16> {
    using type = uint4;
};

// A step takes DOWN rows of input and finishes UP rows of output, each UP wide. Rows and columns are counted from the
// thread's first ones. Tap 0 of output 0 is at upsampled sample -kPhase: with two-fold upsampling both outputs of a
// step then meet the same inputs.
template <int UP, int DOWN>
struct Window {
    static constexpr int kPhase = UP - 1;
    static constexpr int kWidth = (UP - 1 + kTaps - 1 - kPhase) / UP + 1;  // Of the input.
    static constexpr int kDelay = (kWidth - 1) / DOWN;  // Steps from an output's first input to its last.
    static constexpr int kRows = UP * (kDelay + 1);     // Of output that have met some, but not all of their inputs.

    // The tap of output `out` that meets input `in`, if it is one of the filter.
    __host__ __device__ static constexpr int tap(int out, int in) { return in * UP + kPhase - out * DOWN; }
    __host__ __device__ static constexpr bool is_tap(int tap) { return tap >= 0 && tap < kTaps; }
};

// Blocks go over chunks of blockDim.x packs first, then along a row of strips, then over the rows of strips.
struct StripGrid {
    int packs, chunks;
    int columns, column_blocks;
    int steps, rows;       // Of a strip; of strips in one picture.
    int first_x, first_y;  // Where the first strip begins among the outputs: -1 where that gives it its phase, else 0.
};

// N neighbouring channels of a pixel, as one load brings them; 0 outside of the picture.
template <class T, int N>
struct Pack {
    typename Bits<sizeof(T) * N>::type bits;

    __device__ void load(const T* address, bool is_inside) {
        bits = {};
        if (is_inside)
            bits = *reinterpret_cast<const decltype(bits)*>(address);
    }

    __device__ void unpack(float (&values)[N]) const {
        T narrow_values[N];
        memcpy(narrow_values, &bits, sizeof(bits));
#pragma unroll
        for (int i = 0; i < N; ++i)
            values[i] = widen(narrow_values[i]);
    }

    __device__ void pack(const float (&values)[N]) {
        T narrow_values[N];
#pragma unroll
        for (int i = 0; i < N; ++i)
            narrow(values[i], narrow_values[i]);
        memcpy(&bits, narrow_values, sizeof(bits));
    }

    // The intrinsic keeps the compiler from storing a vector word by word.
    __device__ void store(T* address) const { __stwb(reinterpret_cast<decltype(bits)*>(address), bits); }
};

// The input that a thread reads: rows [0, end_y), of which y is the next. `address` is where row y begins for the
// thread, inside of the picture or not.
template <class T, int N, int WIDTH>
struct Reader {
    const T* address;
    int64_t row_stride;
    int column_stride, y, end_y;
    bool is_inside[WIDTH];

    __device__ void next(Pack<T, N> (&row)[WIDTH]) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i)
            row[i].load(address + static_cast<int64_t>(i) * column_stride, is_inside[i] && y >= 0 && y < end_y);
        address += row_stride;
        ++y;
    }
};

// The output that a thread writes: rows [begin_y, end_y); what it is given for rows before and after is dropped.
template <class T, int N, int WIDTH>
struct Writer {
    T* address;
    int64_t row_stride;
    int column_stride, y, begin_y, end_y;
    bool is_inside[WIDTH];

    __device__ void next(const float (&row)[WIDTH][N]) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            Pack<T, N> pack;
            pack.pack(row[i]);
            if (is_inside[i] && y >= begin_y && y < end_y)
                pack.store(address + static_cast<int64_t>(i) * column_stride);
        }
        address += row_stride;
        ++y;
    }
};

// Adds what row `in_y` of a step's input gives to the output rows that it meets; the step finishes the first UP.
template <class Shape, int UP, class T, int N>
__device__ inline void accumulate(const float (&taps)[kTaps][kTaps], const Pack<T, N> (&row)[Shape::kWidth], int in_y,
                                  float (&sums)[Shape::kRows][UP][N]) {
#pragma unroll
    for (int in_x = 0; in_x < Shape::kWidth; ++in_x) {
        float pixel[N];
        row[in_x].unpack(pixel);
#pragma unroll
        for (int out_y = 0; out_y < Shape::kRows; ++out_y)
#pragma unroll
            for (int out_x = 0; out_x < UP; ++out_x) {
                const int tap_y = Shape::tap(out_y - UP * Shape::kDelay, in_y), tap_x = Shape::tap(out_x, in_x);
                if (!Shape::is_tap(tap_y) || !Shape::is_tap(tap_x))
                    continue;
#pragma unroll
                for (int i = 0; i < N; ++i)
                    sums[out_y][out_x][i] = fmaf(taps[tap_y][tap_x], pixel[i], sums[out_y][out_x][i]);
            }
    }
}

// Moves the sums up by the UP rows that a step has finished.
template <int UP, int ROWS, int N>
__device__ inline void shift(float (&sums)[ROWS][UP][N]) {
#pragma unroll
    for (int y = 0; y < ROWS; ++y)
#pragma unroll
        for (int x = 0; x < UP; ++x)
#pragma unroll
            for (int i = 0; i < N; ++i)
                sums[y][x][i] = y + UP < ROWS ? sums[y + UP][x][i] : 0.0f;
}

// All loops but that over the steps are unrolled, so that sums and pixels are registers.
template <class T, int N, int UP, int DOWN>
__global__ void __launch_bounds__(kThreads)
filter_4x4(const T* __restrict__ x, const float* __restrict__ f, T* __restrict__ y, Resampling r, StripGrid grid) {
    using Shape = Window<UP, DOWN>;
    const int64_t channel = (static_cast<int64_t>(blockIdx.x % grid.chunks) * blockDim.x + threadIdx.x) * N;
    const unsigned position = blockIdx.x / grid.chunks;
    const int64_t column = static_cast<int64_t>(position % grid.column_blocks) * blockDim.y + threadIdx.y;
    const int64_t row = static_cast<int64_t>(position / grid.column_blocks) * blockDim.z + threadIdx.z;
    if (channel >= r.inner || column >= grid.columns || row >= static_cast<int64_t>(r.outer) * grid.rows)
        return;

    float taps[kTaps][kTaps];
#pragma unroll
    for (int i = 0; i < kTaps * kTaps; ++i)
        taps[i / kTaps][i % kTaps] = f[r.flip ? i : kTaps * kTaps - 1 - i] * static_cast<float>(r.gain);

    const int64_t picture = static_cast<int>(row) / grid.rows;
    const int out_x = static_cast<int>(column) * UP + grid.first_x;
    const int out_y = static_cast<int>(row) % grid.rows * UP * grid.steps + grid.first_y;
    const int in_x = (out_x * DOWN - r.x.pad + Shape::kPhase) / UP;
    const int in_y = (out_y * DOWN - r.y.pad + Shape::kPhase) / UP;
    const int out_end = min(r.y.out, out_y + UP * grid.steps), early_y = out_y - UP * Shape::kDelay;
    Reader<T, N, Shape::kWidth> reader{x + ((picture * r.y.in + in_y) * r.x.in + in_x) * r.inner + channel,
                                       static_cast<int64_t>(r.x.in) * r.inner, r.inner, in_y,
                                       min(r.y.in, in_y + DOWN * (grid.steps + Shape::kDelay))};
    Writer<T, N, UP> writer{y + ((picture * r.y.out + early_y) * r.x.out + out_x) * r.inner + channel,
                            static_cast<int64_t>(r.x.out) * r.inner, r.inner, early_y, max(out_y, 0), out_end};
#pragma unroll
    for (int i = 0; i < Shape::kWidth; ++i)
        reader.is_inside[i] = in_x + i >= 0 && in_x + i < r.x.in;
#pragma unroll
    for (int i = 0; i < UP; ++i)
        writer.is_inside[i] = out_x + i >= 0 && out_x + i < r.x.out;

    float sums[Shape::kRows][UP][N] = {};
    Pack<T, N> rows[DOWN][Shape::kWidth];
#pragma unroll
    for (int i = 0; i < DOWN; ++i)
        reader.next(rows[i]);
    while (writer.y < writer.end_y) {
#pragma unroll
        for (int i = 0; i < DOWN; ++i) {
            Pack<T, N> ahead[Shape::kWidth];  // On its way while the arithmetic goes on.
            reader.next(ahead);
            accumulate<Shape, UP>(taps, rows[i], i, sums);
            memcpy(rows[i], ahead, sizeof(ahead));
        }
#pragma unroll
        for (int i = 0; i < UP; ++i)
            writer.next(sums[i]);
        shift<UP>(sums);
    }
}

// -1 where the strips of an axis have to begin one output earlier to have their phase.
template <int UP>
int first_output(const Axis& axis) {
    return UP == 2 && axis.pad % 2 == 0 ? -1 : 0;
}

template <class T, int N, int UP, int DOWN>
void launch_4x4(const void* x, const float* f, void* y, const Resampling& r, cudaStream_t stream) {
    StripGrid grid;
    grid.first_x = first_output<UP>(r.x);
    grid.first_y = first_output<UP>(r.y);
    grid.packs = r.inner / N;
    grid.columns = divide_up(static_cast<int64_t>(r.x.out) - grid.first_x, UP);
    for (grid.steps = kLongestStrip;; grid.steps /= 2) {
        grid.rows = divide_up(static_cast<int64_t>(r.y.out) - grid.first_y, UP * grid.steps);
        const int64_t threads = static_cast<int64_t>(r.outer) * grid.rows * grid.columns * grid.packs;
        if (threads >= kEnoughThreads || grid.steps == kShortestStrip)
            break;
    }

    // A cache line of channels, then columns, which share their windows in the first-level cache, then rows.
    dim3 block;
    block.x = std::min<int>(grid.packs, kLineBytes / (sizeof(T) * N));
    block.y = power_of_two(grid.columns, 1 << 30);
    block.y = std::min(block.y, kThreads / block.x);
    block.z = std::min(kThreads / (block.x * block.y), 64u);  // The most that CUDA has of this dimension.
    grid.chunks = divide_up(grid.packs, block.x);
    grid.column_blocks = divide_up(grid.columns, block.y);
    const unsigned row_blocks = divide_up(static_cast<int64_t>(r.outer) * grid.rows, block.z);
    const unsigned blocks = row_blocks * static_cast<unsigned>(grid.column_blocks) * static_cast<unsigned>(grid.chunks);
    filter_4x4<T, N, UP, DOWN>
        <<<blocks, block, 0, stream>>>(static_cast<const T*>(x), f, static_cast<T*>(y), r, grid);
}

bool is_aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % kVectorBytes == 0; }

template <class T, int UP, int DOWN>
void launch_packed(const void* x, const float* f, void* y, const Resampling& r, cudaStream_t stream) {
    constexpr int kPack = kVectorBytes / sizeof(T);
    if (r.inner % kPack == 0 && is_aligned(x) && is_aligned(y))
        launch_4x4<T, kPack, UP, DOWN>(x, f, y, r, stream);
    else
        launch_4x4<T, 1, UP, DOWN>(x, f, y, r, stream);
}

bool has_factors(const Resampling& r, int up, int down) {
    return r.x.up == up && r.y.up == up && r.x.down == down && r.y.down == down;
}

template <class T>
void launch(const void* x, const float* f, void* y, const Resampling& r, cudaStream_t stream) {
    const bool is_4x4 = f != nullptr && r.x.taps == kTaps && r.y.taps == kTaps;
    if (is_4x4 && has_factors(r, 1, 1))
        launch_packed<T, 1, 1>(x, f, y, r, stream);
    else if (is_4x4 && has_factors(r, 2, 1))
        launch_packed<T, 2, 1>(x, f, y, r, stream);
    else if (is_4x4 && has_factors(r, 1, 2))
        launch_packed<T, 1, 2>(x, f, y, r, stream);
    else
        launch_any<T, T>(x, f, y, r, stream);
}

// Half types: to and from the float result of the first of two passes.
template <class T>
void launch_half(const void* x, Type x_type, const float* f, void* y, Type y_type, const Resampling& r,
                 cudaStream_t stream) {
    if (x_type == Type::kFloat)
        launch_any<float, T>(x, f, y, r, stream);
    else if (y_type == Type::kFloat)
        launch_any<T, float>(x, f, y, r, stream);
    else
        launch<T>(x, f, y, r, stream);
}

}  // namespace

// Filters x [outer, y.in, x.in, inner] to y [outer, y.out, x.out, inner], neither empty, on the current device.
// f: [y.taps, x.taps], or null for a tap of 1. The types are equal, or one is a half type and the other is float.
// Outputs of a row, and rows (of all pictures), have to be fewer than 2^31.
cudaError_t upfirdn2d(const void* x, Type x_type, const float* f, void* y, Type y_type, const Resampling& r,
                      cudaStream_t stream) {
    const Type narrower = std::min(x_type, y_type);
    if (narrower == Type::kHalf)
        launch_half<__half>(x, x_type, f, y, y_type, r, stream);
    else if (narrower == Type::kBFloat16)
        launch_half<__nv_bfloat16>(x, x_type, f, y, y_type, r, stream);
    else if (narrower == Type::kFloat)
        launch<float>(x, f, y, r, stream);
    else
        launch_any<double, double>(x, f, y, r, stream);
    return cudaGetLastError();
}

}  // namespace next3d
