"""Kernels that make a target fast and exact to the bit on this machine. Only `headstart.target` may import them.

Every kernel has a plain reference (the model's own module, `reference_attention`). Packed and fused modules are compared with it
when a model is loaded, and are not used where they disagree or where torch lacks the operation that they need.
"""
