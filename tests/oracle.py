"""Slow float64 versions of the C functions, written from the formulas and not from the C."""
