// Nearest neighbours. Scores are computed and compared tile by tile. Results do not depend on the
// number of threads.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "simd.h"

namespace clsp {

inline constexpr std::size_t kNoRow = static_cast<std::size_t>(-1);

// Updates the best k rows of each query with `rows`, the rows of a database from first_row on.
// scores and index are (queries, k), the best first; equal scores are ordered by index. Missing
// rows have -infinity and -1. Returns the first of `rows` that has NaN or infinity, or kNoRow.
std::size_t update_best(const Matrix<float>& queries, const Matrix<float>& rows,
                        std::size_t first_row, std::size_t k, Span<float> scores,
                        Span<std::int64_t> index, int threads, Isa isa);

}  // namespace clsp
