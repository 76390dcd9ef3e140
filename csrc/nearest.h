// Nearest neighbours, chosen in the tile of scores. No result depends on the number of threads.
#pragma once

#include <cstdint>

#include "matrix.h"
#include "simd.h"

namespace clsp {

inline constexpr std::size_t kNoRow = static_cast<std::size_t>(-1);

// Updates the best k of each query with `rows`, which are rows first_row and following of a
// database. scores and index are (queries, k), the best first, equal scores by index; minus
// infinity and -1 if there are fewer. Returns the first row that has NaN or infinity, or kNoRow.
std::size_t update_best(const Matrix<float>& queries, const Matrix<float>& rows,
                        std::size_t first_row, std::size_t k, Span<float> scores,
                        Span<std::int64_t> index, int threads, Isa isa);

}  // namespace clsp
