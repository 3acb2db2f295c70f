"""refengine: a memory-efficient LLM inference engine whose NumPy implementation is the specification."""

__version__ = "0.1.0"
