"""Triton kernels and their launchers, one file per op; a launcher has the name and signature of its op's reference."""
