"""Tensor operations of the algorithms: pure functions, each with a reference."""
