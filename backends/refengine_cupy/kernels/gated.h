// Activations of gated feed-forward blocks.
#pragma once
#include "vendor.h"

INLINE float silu(float g) { return g / (1.0f + expf(-g)); }

INLINE float gelu_tanh(float g) {
    const float inner = 0.7978845608028654f * (0.044715f * g * g * g + g);
    return 0.5f * g * (1.0f + tanhf(inner));
}
