"""Scheduling: which requests advance in the next step, and by how many tokens."""

from __future__ import annotations

from refengine.scheduler.decision import Decision, Missing, Reclaim, schedule
from refengine.scheduler.job import Blocks, Job, Limits, Terms
from refengine.scheduler.policy import (
    BUILT_IN,
    FCFS,
    SchedulingPolicy,
    fair_sharing,
    first_come_first_served,
    priority,
    scheduling_policies,
    scheduling_policy,
    shortest_job_first,
)
from refengine.scheduler.queue import Queue
from refengine.scheduler.swapping import HostPool

__all__ = [
    "BUILT_IN",
    "FCFS",
    "Blocks",
    "Decision",
    "HostPool",
    "Job",
    "Limits",
    "Missing",
    "Queue",
    "Reclaim",
    "SchedulingPolicy",
    "Terms",
    "fair_sharing",
    "first_come_first_served",
    "priority",
    "schedule",
    "scheduling_policies",
    "scheduling_policy",
    "shortest_job_first",
]
