"""Loads that simulations let come: of all sorts, and small."""

from __future__ import annotations

from hypothesis import strategies as st

from refengine.simulation import Costs, HeavyTails

LOADS = st.builds(
    HeavyTails,
    rate=st.sampled_from([20.0, 200.0, 2.0]),
    prompt_median=st.just(12.0),
    output_least=st.just(3.0),
    longest=st.just(40),
    tenants=st.just(3),
    priorities=st.just(3),
    samples=st.sampled_from([1, 3]),
    hinted=st.sampled_from([0.0, 0.5]),
)

COSTS = Costs(step=1.0, token=1 / 8, position=1 / 256, byte=1 / 1024)
"""Sums of these are exact."""
