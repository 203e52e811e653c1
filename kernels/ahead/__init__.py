"""Kernels compiled ahead of time: built without a GPU, described by a manifest, launched without a compiler.

`build` compiles, `manifest` says what was compiled, `launcher` runs it through the CUDA driver; importing
this loads none of them.
"""
