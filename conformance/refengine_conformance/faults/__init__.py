"""Seeded faults: subjects wrong in one realistic way each, which the suite must catch."""
