// Formants: the poles of a linear prediction.
#pragma once

#include "voice_spectra.h"

namespace clsp {

constexpr int kFormants = 4;

// Writes the frequencies of the lowest formants, in order, and returns their number.
int find_formants(const double* lags, double* hz);

}  // namespace clsp
