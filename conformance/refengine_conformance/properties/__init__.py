"""Properties, one module per chapter of the specification."""
