// SPDX-License-Identifier: Apache-2.0
// Z-buffer rasteriser of rasterize.py on the CPU: the same fp32 operations in the same order, so equal bit for bit.

#include <ATen/Parallel.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>

namespace {

constexpr int64_t kWideBox = 16;      // Columns from which on a face's sides are worth a look.
constexpr int64_t kBlock = 32;        // Columns whose weights are computed together.
constexpr double kSlack = 1.0 / (1 << 18);  // Rounding of `edge` is 2^-22 of the face's size, or less.
constexpr double kFar = 1e30;

struct Corner {
    float x, y, z;
};

bool is_finite(const Corner& corner) {
    return std::isfinite(corner.x) && std::isfinite(corner.y) && std::isfinite(corner.z);
}

// Twice the signed area of the triangle (point, start, end).
inline float edge(float x, float y, const Corner& start, const Corner& end) {
    return (x - start.x) * (end.y - start.y) - (y - start.y) * (end.x - start.x);
}

// Pixel centres along one axis, ascending.
struct Axis {
    const float* centre;
    int64_t size;

    // Index of the first centre >= value (or, with `beyond`, > value); size if there is none. The guess is at most a
    // few pixels off, and the comparisons make the answer exact.
    int64_t first(float value, bool beyond) const {
        const auto before = [&](int64_t i) { return beyond ? centre[i] <= value : centre[i] < value; };
        const float guess = (value + 1.0f) * 0.5f * static_cast<float>(size);
        int64_t i = static_cast<int64_t>(std::min(std::max(guess, 0.0f), static_cast<float>(size)));
        while (i > 0 && !before(i - 1))
            --i;
        while (i < size && before(i))
            ++i;
        return i;
    }
};

struct Mesh {
    const float* positions;
    const int64_t* faces;
    int64_t num_faces;

    Corner corner(int64_t face, int number) const {
        const float* position = positions + 3 * faces[3 * face + number];
        return {position[0], position[1], position[2]};
    }
};

struct Image {
    int64_t* face;
    float* barycentric;
    float* depth;
};

// The x on one side of an edge, widened by far more than `edge` rounds: what lies beyond cannot be inside of the face.
struct Side {
    double x, y, slope, margin;
    int direction;  // 1: inside is to the right of the edge, -1: to the left, 0: nothing is known.

    Side() = default;
    Side(const Corner& start, const Corner& end, double width, double height) : x(start.x), y(start.y) {
        const double rise = double{end.y} - start.y;
        direction = rise > 0 ? 1 : rise < 0 ? -1 : 0;
        slope = direction == 0 ? 0 : (double{end.x} - start.x) / rise;
        margin = kSlack * (width + height * std::abs(slope) + 1);
    }

    void narrow(double row, double& low, double& high) const {
        const double at = x + (row - y) * slope;
        if (direction > 0)
            low = std::max(low, at - margin);
        if (direction < 0)
            high = std::min(high, at + margin);
    }
};

// One face against the columns [from, to) of the row that begins at pixel `first`. All weights of a block come before
// all stores, without a branch, so that the compiler computes several pixels at a time.
void draw_span(const Corner& a, const Corner& b, const Corner& c, float divisor, int64_t face, const Axis& columns,
               int64_t first, float y, int64_t from, int64_t to, const Image& image) {
    // The parts of `edge` that a row shares.
    const float rise_a = c.y - b.y, rise_b = a.y - c.y, rise_c = b.y - a.y;
    const float run_a = (y - b.y) * (c.x - b.x), run_b = (y - c.y) * (a.x - c.x), run_c = (y - a.y) * (b.x - a.x);
    float weight_a[kBlock], weight_b[kBlock], weight_c[kBlock], z[kBlock];
    int32_t is_seen[kBlock];
    for (; from < to; from += kBlock) {
        const int32_t count = static_cast<int32_t>(std::min(to - from, kBlock));
        const float* centre = columns.centre + from;
        const float* depth = image.depth + first + from;
        int32_t any = 0;
        for (int32_t i = 0; i < count; ++i) {
            weight_a[i] = ((centre[i] - b.x) * rise_a - run_a) / divisor;
            weight_b[i] = ((centre[i] - c.x) * rise_b - run_b) / divisor;
            weight_c[i] = ((centre[i] - a.x) * rise_c - run_c) / divisor;
            z[i] = weight_a[i] * a.z + weight_b[i] * b.z + weight_c[i] * c.z;
            // Strictly nearer: of equal depths the lower face stays. A quotient may have underflowed to 0.
            is_seen[i] = (weight_a[i] > 0) & (weight_b[i] > 0) & (weight_c[i] > 0) & (z[i] < depth[i]);
            any |= is_seen[i];
        }
        if (!any)
            continue;
        for (int32_t i = 0; i < count; ++i) {
            if (!is_seen[i])
                continue;
            const int64_t pixel = first + from + i;
            image.depth[pixel] = z[i];
            image.face[pixel] = face;
            float* weights = image.barycentric + 3 * pixel;
            weights[0] = weight_a[i];
            weights[1] = weight_c[i];
            weights[2] = weight_b[i];
        }
    }
}

// One face against the rows [begin, end) of one image.
void draw_face(const Mesh& mesh, int64_t face, Axis rows, Axis columns, int64_t begin, int64_t end, float epsilon,
               const Image& image) {
    const Corner a = mesh.corner(face, 0), b = mesh.corner(face, 2), c = mesh.corner(face, 1);
    const float low_y = std::min({a.y, b.y, c.y}), high_y = std::max({a.y, b.y, c.y});
    if (high_y < rows.centre[begin] || low_y > rows.centre[end - 1])
        return;
    const float area = edge(c.x, c.y, a, b);
    if (!(area > epsilon) || !is_finite(a) || !is_finite(b) || !is_finite(c))
        return;
    const float divisor = area + epsilon;
    const int64_t top = std::max(begin, rows.first(low_y, false)), bottom = std::min(end, rows.first(high_y, true));
    const float low_x = std::min({a.x, b.x, c.x}), high_x = std::max({a.x, b.x, c.x});
    const int64_t left = columns.first(low_x, false), right = columns.first(high_x, true);
    // Faces that lie aslant fill little of their box: in wide ones, only the columns between the edges are tried.
    const bool is_wide = right - left > kWideBox;
    const double width = double{high_x} - low_x, height = double{high_y} - low_y;
    Side sides[3];
    if (is_wide) {
        sides[0] = Side(b, c, width, height);
        sides[1] = Side(c, a, width, height);
        sides[2] = Side(a, b, width, height);
    }
    for (int64_t row = top; row < bottom; ++row) {
        int64_t from = left, to = right;
        if (is_wide) {
            double low = -kFar, high = kFar;
            for (const Side& side : sides)
                side.narrow(rows.centre[row], low, high);
            from = std::max(left, columns.first(static_cast<float>(low), false));
            to = std::min(right, columns.first(static_cast<float>(high), true));
        }
        draw_span(a, b, c, divisor, face, columns, row * columns.size, rows.centre[row], from, to, image);
    }
}

void draw_rows(const Mesh& mesh, Axis rows, Axis columns, int64_t begin, int64_t end, float epsilon,
               const Image& image) {
    const int64_t first = begin * columns.size, last = end * columns.size;
    std::fill(image.face + first, image.face + last, int64_t{-1});
    std::fill(image.barycentric + 3 * first, image.barycentric + 3 * last, 0.0f);
    std::fill(image.depth + first, image.depth + last, std::numeric_limits<float>::infinity());
    for (int64_t face = 0; face < mesh.num_faces; ++face)
        draw_face(mesh, face, rows, columns, begin, end, epsilon, image);
    for (int64_t pixel = first; pixel < last; ++pixel)
        if (image.face[pixel] < 0)
            image.depth[pixel] = 0.0f;
}

// Messages are literals: rasterize.py has said what it found, and where the C++ library is linked statically into
// extensions, formatting numbers through streams that torch set up crashes (seen with torch 2.11 on Ubuntu 24.04).
void check(const at::Tensor& positions, const at::Tensor& faces, const at::Tensor& rows, const at::Tensor& columns) {
    for (const at::Tensor* tensor : {&positions, &rows, &columns})
        TORCH_CHECK(tensor->device().is_cpu() && tensor->scalar_type() == at::kFloat, "expected fp32 on the CPU");
    TORCH_CHECK(faces.device().is_cpu() && faces.scalar_type() == at::kLong, "faces: expected int64 on the CPU");
    TORCH_CHECK(positions.dim() == 3 && positions.size(2) == 3, "positions: expected [B, V, 3]");
    TORCH_CHECK(faces.dim() == 2 && faces.size(1) == 3, "faces: expected [F, 3]");
    TORCH_CHECK(rows.dim() == 1 && columns.dim() == 1 && rows.numel() > 0 && columns.numel() > 0,
                "rows, columns: expected [H] and [W]");
}

void check_range(const at::Tensor& faces, int64_t num_vertices) {
    const int64_t* index = faces.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < faces.numel(); ++i)
        TORCH_CHECK(index[i] >= 0 && index[i] < num_vertices, "faces: expected indices of vertices");
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const at::Tensor& positions, const at::Tensor& faces,
                                                       const at::Tensor& rows, const at::Tensor& columns,
                                                       double epsilon) {
    check(positions, faces, rows, columns);
    const at::Tensor vertices = positions.contiguous(), corners = faces.contiguous();
    const at::Tensor centres_y = rows.contiguous(), centres_x = columns.contiguous();
    check_range(corners, vertices.size(1));
    const int64_t num_views = vertices.size(0), height = rows.numel(), width = columns.numel();
    at::Tensor face = corners.new_empty({num_views, height, width});
    at::Tensor barycentric = vertices.new_empty({num_views, height, width, 3});
    at::Tensor depth = vertices.new_empty({num_views, height, width});

    const float* position = vertices.const_data_ptr<float>();
    const int64_t* corner = corners.const_data_ptr<int64_t>();
    const Axis row_axis{centres_y.const_data_ptr<float>(), height};
    const Axis column_axis{centres_x.const_data_ptr<float>(), width};
    const Image images{face.mutable_data_ptr<int64_t>(), barycentric.mutable_data_ptr<float>(),
                       depth.mutable_data_ptr<float>()};

    // Fewer views than threads: each view is split into bands of rows. Bands share nothing, so the result does not
    // depend on their number.
    const int64_t num_bands = std::clamp<int64_t>(at::get_num_threads() / std::max<int64_t>(num_views, 1), 1, height);
    at::parallel_for(0, num_views * num_bands, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
            const int64_t view = task / num_bands, band = task % num_bands, offset = view * height * width;
            const Mesh mesh{position + view * vertices.size(1) * 3, corner, corners.size(0)};
            const Image image{images.face + offset, images.barycentric + 3 * offset, images.depth + offset};
            draw_rows(mesh, row_axis, column_axis, height * band / num_bands, height * (band + 1) / num_bands,
                      static_cast<float>(epsilon), image);
        }
    });
    return {face, barycentric, depth};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("forward", &forward, pybind11::call_guard<pybind11::gil_scoped_release>());
}
