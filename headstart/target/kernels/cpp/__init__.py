"""The C++ sources of the compiled kernels, and `build`, which compiles them."""
