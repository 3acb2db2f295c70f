"""Simulation: the scheduler at work on generated and recorded loads, without a model and without waiting."""

from __future__ import annotations

from refengine.simulation.journal import Journal, LineStream
from refengine.simulation.journal_reader import read_journal
from refengine.simulation.loads import Arrival, HeavyTails, Load, generate
from refengine.simulation.record import End, Fork, Part, Record
from refengine.simulation.replay import Trace, differences, replay, simulate, trace
from refengine.simulation.simulator import Costs, Course, Done, Mishaps, Simulator, small_layout

__all__ = [
    "Arrival",
    "Costs",
    "Course",
    "Done",
    "End",
    "Fork",
    "HeavyTails",
    "Journal",
    "LineStream",
    "Load",
    "Mishaps",
    "Part",
    "Record",
    "Simulator",
    "Trace",
    "differences",
    "generate",
    "read_journal",
    "replay",
    "simulate",
    "small_layout",
    "trace",
]
