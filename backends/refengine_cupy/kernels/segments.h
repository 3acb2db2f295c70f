// Segments of a row's columns in linear_a16: each is added up from zero, step by step, and then they are in order.
#pragma once
#include "halves.h"
#include "product.h"

#define SEGMENTS 8

INLINE int steps_each(int steps) { return (steps + SEGMENTS - 1) / SEGMENTS; }
INLINE int segments_of(int steps) { return (steps + steps_each(steps) - 1) / steps_each(steps); }

// Which part a block of threads has, where blocks have `rows` rows each; `block` is then counted from its first.
template <class A> INLINE int part_number(const A &a, int rows, int &block) {
    for (int number = 0; number < 2; number++) {
        const int blocks = ((number == 0 ? a.rows_0 : a.rows_1) + rows - 1) / rows;
        if (block < blocks) return number;
        block -= blocks;
    }
    return 2;
}
