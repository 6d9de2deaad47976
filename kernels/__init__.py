"""The CUDA sources (`*.cu`, `*.cuh`), read as package data; empty until the CUDA runtime lands."""
