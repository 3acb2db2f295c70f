"""Backends that stand in for hardware: what passes on them has a chance on the real thing.

``loopback`` shows what the contract asks, and no more. ``device-strict`` shows what no accelerator forgives.
Both compute with the golden ops; neither shares a line with refengine's own way of running a Program.
"""
