// What turns queries and keys by their positions, and what keys and values become where they are stored as float16.
#pragma once
#include "vendor.h"

// How the i-th element of any head of a token turns, of which `dims` do; `table` has cosines, then sines, of the token.
struct ElementTurn {
    int other;
    bool turns, first;
    float cosine, sine;

    INLINE ElementTurn(const float *table, int i, int dims, int halves)
        : other(i), turns(i < dims), first(true), cosine(1.0f), sine(0.0f) {
        if (!turns) return;
        const int half = dims / 2;
        first = halves ? i < half : i % 2 == 0;
        other = halves ? (first ? i + half : i - half) : i ^ 1;
        const int pair = halves ? (first ? i : i - half) : i / 2;
        cosine = table[pair], sine = table[half + pair];
    }
    INLINE float of(float x, float x_other) const {
        if (!turns) return x;
        const float kept = x * cosine, turned = x_other * sine;
        return first ? kept - turned : kept + turned;
    }
};

// The i-th element of a head x.
INLINE float rotated(const float *x, const float *table, int i, int dims, int halves) {
    const ElementTurn turn(table, i, dims, halves);
    return turn.of(x[i], x[turn.other]);
}

struct HalfSlots {
    typedef u16 Number;
    static INLINE u16 of(float x) { // what would round to infinity is NaN
        const u16 h = float_to_half(x);
        return (h & 0x7FFF) == 0x7C00 ? (u16)0x7E00 : h;
    }
};
