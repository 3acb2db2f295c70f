"""Scheduling: which requests advance in the next step, and by how many tokens."""

from __future__ import annotations

from refengine.scheduler.fcfs import Decision, Job, Limits, schedule

__all__ = ["Decision", "Job", "Limits", "schedule"]
