// SPDX-License-Identifier: Apache-2.0
// The rasteriser of rasterize.py on a GPU: the same fp32 operations in the same order, so equal bit for bit. Needs
// --fmad=false, and nvcc's default of correctly rounded divisions.
//
// Three launches, whatever the batch:
//   clear    No pixel is covered yet, and no list of large faces has an entry.
//   draw     One thread per view and face. A face whose box has few pixels is drawn at once, any other goes to the list
//            of its view: no thread has much to do.
//   resolve  One thread per pixel, one block per tile. The block tests the large faces of its view against the tile,
//            each thread tests those that touch it; then the nearest face is evaluated again and written.

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

namespace {

// Order-preserving bits of the depth above the index of the face: the least key is the face that is seen.
using Key = unsigned long long;

constexpr Key kNothing = ~Key{0};  // No face has it: a depth is below infinity.
constexpr int kThreads = 256;
constexpr int kTile = 16;  // Pixels along each side of a tile.
constexpr int kSmallBox = 128;  // Pixels.
static_assert(kTile * kTile == kThreads, "a block has one thread per pixel of a tile");

struct Scene {
    const float* positions;  // [B, V, 3]
    const int64_t* faces;    // [F, 3]
    const float* rows;       // [H] pixel centres, ascending.
    const float* columns;    // [W]
    int64_t num_vertices;
    int num_faces, height, width;
    float epsilon;
};

// Faces that `resolve` draws.
struct LargeFaces {
    int* count;  // [B]
    int* face;   // [B, F], unordered; the first `count` of each view are set.
};

struct Image {
    int64_t* face;       // [B, H, W]
    float* barycentric;  // [B, H, W, 3]
    float* depth;        // [B, H, W]
};

struct Corner {
    float x, y, z;
};

// All of its sides belong to it.
struct Box {
    float left, right, top, bottom;
};

// A front-facing face; in the file, c comes before b.
struct Triangle {
    Corner a, b, c;
    float divisor;
    Box box;
    int face;
};

struct Sample {
    float weight_a, weight_b, weight_c, z;
};

__device__ bool is_finite(const Corner& corner) {
    return isfinite(corner.x) && isfinite(corner.y) && isfinite(corner.z);
}

// Twice the signed area of the triangle (point, start, end).
__device__ float edge(float x, float y, const Corner& start, const Corner& end) {
    return (x - start.x) * (end.y - start.y) - (y - start.y) * (end.x - start.x);
}

// Returns whether the face can be seen: front-facing, large enough, finite, and made of vertices that exist.
__device__ bool load(const Scene& scene, int view, int face, Triangle& triangle) {
    const int64_t* index = scene.faces + 3 * static_cast<int64_t>(face);
    Corner* corners[3] = {&triangle.a, &triangle.c, &triangle.b};
    for (int i = 0; i < 3; ++i) {
        const int64_t vertex = index[i];
        if (vertex < 0 || vertex >= scene.num_vertices)
            return false;
        const float* position = scene.positions + 3 * (view * scene.num_vertices + vertex);
        *corners[i] = {position[0], position[1], position[2]};
    }
    const Corner &a = triangle.a, &b = triangle.b, &c = triangle.c;
    const float area = edge(c.x, c.y, a, b);
    if (!(area > scene.epsilon) || !is_finite(a) || !is_finite(b) || !is_finite(c))
        return false;
    triangle.divisor = area + scene.epsilon;
    triangle.box = {fminf(fminf(a.x, b.x), c.x), fmaxf(fmaxf(a.x, b.x), c.x), fminf(fminf(a.y, b.y), c.y),
                    fmaxf(fmaxf(a.y, b.y), c.y)};
    triangle.face = face;
    return true;
}

// Returns whether the face covers the point.
__device__ bool evaluate(const Triangle& triangle, float x, float y, Sample& sample) {
    const Corner &a = triangle.a, &b = triangle.b, &c = triangle.c;
    const float area_a = edge(x, y, b, c), area_b = edge(x, y, c, a), area_c = edge(x, y, a, b);
    if (!(area_a > 0.0f && area_b > 0.0f && area_c > 0.0f))
        return false;
    const float weight_a = area_a / triangle.divisor, weight_b = area_b / triangle.divisor;
    const float weight_c = area_c / triangle.divisor;
    const float z = weight_a * a.z + weight_b * b.z + weight_c * c.z;
    sample = {weight_a, weight_b, weight_c, z};
    // A quotient may have underflowed to 0, a depth overflowed.
    return weight_a > 0.0f && weight_b > 0.0f && weight_c > 0.0f && z < INFINITY;
}

__device__ Key make_key(float z, int face) {
    const uint32_t bits = __float_as_uint(z + 0.0f);  // Of -0 and 0, which are one depth, the sum is 0.
    const uint32_t ordered = bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
    return static_cast<Key>(ordered) << 32 | static_cast<uint32_t>(face);
}

// Index of the first of ascending pixel centres that is >= value (or, with `beyond`, > value); size if there is none.
// The guess is at most a few pixels off, and the comparisons make the answer exact.
__device__ int first_centre(const float* centre, int size, float value, bool beyond) {
    const auto before = [=](int i) { return beyond ? centre[i] <= value : centre[i] < value; };
    const float guess = (value + 1.0f) * 0.5f * static_cast<float>(size);
    int i = min(static_cast<int>(fminf(fmaxf(guess, 0.0f), static_cast<float>(size))), size);
    while (i > 0 && !before(i - 1))
        --i;
    while (i < size && before(i))
        ++i;
    return i;
}

__global__ void __launch_bounds__(kThreads) clear(Key* keys, int64_t num_keys, int* num_large, int num_views) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
    if (i < num_keys)
        keys[i] = kNothing;
    if (i < num_views)
        num_large[i] = 0;
}

__global__ void __launch_bounds__(kThreads) draw(Scene scene, Key* keys, LargeFaces large) {
    const int face = blockIdx.x * kThreads + threadIdx.x, view = blockIdx.y;
    Triangle triangle;
    if (face >= scene.num_faces || !load(scene, view, face, triangle))
        return;
    const Box& box = triangle.box;
    const int left = first_centre(scene.columns, scene.width, box.left, false);
    const int right = first_centre(scene.columns, scene.width, box.right, true);
    const int top = first_centre(scene.rows, scene.height, box.top, false);
    const int bottom = first_centre(scene.rows, scene.height, box.bottom, true);
    if ((right - left) * (bottom - top) > kSmallBox) {
        const int place = atomicAdd(large.count + view, 1);
        large.face[static_cast<int64_t>(view) * scene.num_faces + place] = face;
        return;
    }
    keys += static_cast<int64_t>(view) * scene.height * scene.width;
    for (int row = top; row < bottom; ++row)
        for (int column = left; column < right; ++column) {
            Sample sample;
            if (evaluate(triangle, scene.columns[column], scene.rows[row], sample))
                atomicMin(keys + row * scene.width + column, make_key(sample.z, face));
        }
}

__device__ bool meet(const Box& one, const Box& other) {
    return one.left <= other.right && one.right >= other.left && one.top <= other.bottom && one.bottom >= other.top;
}

// The key of the nearest of these faces at (x, y), or kNothing. All threads of a block call it; `tile` is the box of
// their points.
__device__ Key find_nearest(const Scene& scene, int view, const int* faces, int num_faces, const Box& tile, float x,
                            float y) {
    __shared__ Triangle staged[kThreads];
    __shared__ int num_staged;
    Key nearest = kNothing;
    for (int start = 0; start < num_faces; start += kThreads) {
        if (threadIdx.x == 0)
            num_staged = 0;
        __syncthreads();
        const int i = start + threadIdx.x;
        Triangle triangle;
        if (i < num_faces && load(scene, view, faces[i], triangle) && meet(triangle.box, tile))
            staged[atomicAdd(&num_staged, 1)] = triangle;
        __syncthreads();
        for (int j = 0; j < num_staged; ++j) {
            // Rounding could let a face cover a point outside of its box, which `draw` does not test.
            Sample sample;
            if (meet(staged[j].box, {x, x, y, y}) && evaluate(staged[j], x, y, sample))
                nearest = min(nearest, make_key(sample.z, staged[j].face));
        }
        __syncthreads();
    }
    return nearest;
}

__device__ void write(const Scene& scene, int view, Key key, float x, float y, int64_t pixel, const Image& image) {
    Triangle triangle;
    Sample sample{};
    const int face = key == kNothing ? -1 : static_cast<int>(key & 0xFFFFFFFFu);
    if (face >= 0 && load(scene, view, face, triangle))  // It was drawn, so loading succeeds.
        evaluate(triangle, x, y, sample);
    image.face[pixel] = face;
    image.depth[pixel] = sample.z;
    float* weights = image.barycentric + 3 * pixel;
    weights[0] = sample.weight_a;
    weights[1] = sample.weight_c;
    weights[2] = sample.weight_b;
}

__global__ void __launch_bounds__(kThreads) resolve(Scene scene, const Key* keys, LargeFaces large, Image image) {
    const int tiles_per_row = (scene.width + kTile - 1) / kTile, view = blockIdx.y;
    const int top = blockIdx.x / tiles_per_row * kTile, left = blockIdx.x % tiles_per_row * kTile;
    const int bottom = min(top + kTile, scene.height) - 1, right = min(left + kTile, scene.width) - 1;
    const int row = top + threadIdx.x / kTile, column = left + threadIdx.x % kTile;
    // Threads beyond the border help with the large faces, at a point of the tile.
    const float x = scene.columns[min(column, right)], y = scene.rows[min(row, bottom)];
    const Box tile{scene.columns[left], scene.columns[right], scene.rows[top], scene.rows[bottom]};
    const int* faces = large.face + static_cast<int64_t>(view) * scene.num_faces;
    const Key nearest_large = find_nearest(scene, view, faces, large.count[view], tile, x, y);
    if (row > bottom || column > right)
        return;
    const int64_t pixel = (static_cast<int64_t>(view) * scene.height + row) * scene.width + column;
    write(scene, view, min(keys[pixel], nearest_large), x, y, pixel, image);
}

int num_blocks(int64_t items, int per_block) {
    return static_cast<int>((items + per_block - 1) / per_block);
}

}  // namespace

// Inputs: positions [B, V, 3], faces [F, 3], rows [H], columns [W]; results: face [B, H, W], barycentric [B, H, W, 3],
// depth [B, H, W]; scratch: keys [B, H, W], num_large [B], large [B, F]. No size but V is 0; B is below 2^16, F and
// H * W are at most 2^30.
cudaError_t rasterize_views(const float* positions, const int64_t* faces, const float* rows, const float* columns,
                            int num_views, int64_t num_vertices, int num_faces, int height, int width, float epsilon,
                            unsigned long long* keys, int* num_large, int* large, int64_t* face, float* barycentric,
                            float* depth, cudaStream_t stream) {
    const Scene scene{positions, faces, rows, columns, num_vertices, num_faces, height, width, epsilon};
    const LargeFaces large_faces{num_large, large};
    const Image image{face, barycentric, depth};
    const int64_t num_pixels = static_cast<int64_t>(num_views) * height * width;
    const unsigned views = num_views;
    const unsigned tiles = num_blocks(height, kTile) * num_blocks(width, kTile);
    clear<<<num_blocks(num_pixels, kThreads), kThreads, 0, stream>>>(keys, num_pixels, num_large, num_views);
    draw<<<dim3(num_blocks(num_faces, kThreads), views), kThreads, 0, stream>>>(scene, keys, large_faces);
    resolve<<<dim3(tiles, views), kThreads, 0, stream>>>(scene, keys, large_faces, image);
    return cudaGetLastError();
}
