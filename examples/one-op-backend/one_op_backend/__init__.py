"""The smallest backend for refengine: one operation."""
